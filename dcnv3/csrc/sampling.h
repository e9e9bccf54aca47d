// The arithmetic of DCNv3, shared by the CPU and the CUDA kernels, so that what is tested on a CPU is what a GPU runs.
// Included inside a namespace: the CPU does so once per instruction set, and gives T short vectors of numbers too.
//
// A location samples the four pixels around it. Along one axis that is two pixels, each with a weight; the product of
// the axes' weights is the pixel's share. `s0` and `s1` say whether the pixel counts: the slope of its weight is -s0, +s1.

#if defined(__CUDACC__)
#define DCNV3_HD __host__ __device__ __forceinline__
#else
#define DCNV3_HD inline __attribute__((always_inline))
#endif

// What a number and a vector of numbers do under different names.
template <typename T>
struct Lanes {
  using Element = T;
  using Int = int;
};

DCNV3_HD float choose(bool condition, float yes, float no) { return condition ? yes : no; }
DCNV3_HD double choose(bool condition, double yes, double no) { return condition ? yes : no; }
DCNV3_HD int choose(bool condition, int yes, int no) { return condition ? yes : no; }
DCNV3_HD int truncate(float x) { return static_cast<int>(x); }
DCNV3_HD int truncate(double x) { return static_cast<int>(x); }
DCNV3_HD void assign(float& to, int x) { to = static_cast<float>(x); }
DCNV3_HD void assign(double& to, int x) { to = static_cast<double>(x); }
DCNV3_HD void assign(int& to, int x) { to = x; }

#if defined(DCNV3_VECTOR_BYTES)
#include "cpu/lanes.h"
#endif

// The larger and the smaller of two numbers; `bound` where x is a NaN.
template <typename T>
DCNV3_HD T at_least(T x, T bound) {
  return choose(x > bound, x, bound);
}
template <typename T>
DCNV3_HD T at_most(T x, T bound) {
  return choose(x < bound, x, bound);
}

// `x` as a T: one number in every lane, or lane by lane.
template <typename T, typename X>
DCNV3_HD T as(X x) {
  T t;
  assign(t, x);
  return t;
}

// The largest integer that is not above x.
template <typename T>
DCNV3_HD typename Lanes<T>::Int floor_of(T x) {
  const typename Lanes<T>::Int whole = truncate(x);
  return choose(as<T>(whole) > x, whole - 1, whole);
}

#if defined(__CUDA_ARCH__)  // single instructions that do the same
__device__ __forceinline__ float at_least(float x, float bound) { return fmaxf(x, bound); }
__device__ __forceinline__ float at_most(float x, float bound) { return fminf(x, bound); }
__device__ __forceinline__ int at_least(int x, int bound) { return max(x, bound); }
__device__ __forceinline__ int at_most(int x, int bound) { return min(x, bound); }
__device__ __forceinline__ int floor_of(float x) { return __float2int_rd(x); }
__device__ __forceinline__ int floor_of(double x) { return __double2int_rd(x); }
#endif

// Unpadded pixel coordinate of a point: `start` = out * stride - padding + r, `cell` = i * dilation - r.
template <typename T, typename E>
DCNV3_HD T location(E start, T cell, T offset, E scale) {
  return (cell + offset) * scale + start;
}

template <typename T>
struct Axis {
  using Int = typename Lanes<T>::Int;
  T w0, w1;    // weights of the two pixels, 0 outside the image
  T s0, s1;    // 1 where the pixel is inside the image, else 0
  Int i0, i1;  // the pixels, moved inside the image where they are not
};

// The two pixels around `loc` on an axis of `size` pixels. Without branches; a NaN location is outside.
template <typename T>
DCNV3_HD Axis<T> axis(T loc, int size) {
  using Int = typename Lanes<T>::Int;
  const T zero = as<T>(0), one = as<T>(1), before = as<T>(-1), end = as<T>(size), last = as<T>(size - 1);
  const T near = at_most(at_least(loc, before), end);
  const Int low = floor_of(near);
  const T fraction = near - as<T>(low);
  Axis<T> a;
  // The pixel below counts for locations in [0, size), the one above for those in (-1, size - 1).
  a.s0 = choose((loc >= zero) & (loc < end), one, zero);
  a.s1 = choose((loc > before) & (loc < last), one, zero);
  a.w0 = a.s0 * (one - fraction);
  a.w1 = a.s1 * fraction;
  const Int first = as<Int>(0), most = as<Int>(size - 1), high = low + 1;
  a.i0 = at_most(at_least(low, first), most);
  a.i1 = at_most(high, most);
  return a;
}

template <typename T>
struct PointGradient {
  T weight, loc_h, loc_w;
};

// From the products of the output's gradient with the four pixels (d_hw, summed over channels) to the gradient with
// respect to the point's weight, of value `p`, and its location. Rows are h*, columns w*, as in Axis.
template <typename T>
DCNV3_HD PointGradient<T> point_gradient(
    T d00, T d01, T d10, T d11, T p, T hw0, T hw1, T hs0, T hs1, T ww0, T ww1, T ws0, T ws1) {
  const T top = ww0 * d00 + ww1 * d01;
  const T bottom = ww0 * d10 + ww1 * d11;
  PointGradient<T> g;
  g.weight = hw0 * top + hw1 * bottom;
  g.loc_h = p * (hs1 * bottom - hs0 * top);
  g.loc_w = p * (hw0 * (ws1 * d01 - ws0 * d00) + hw1 * (ws1 * d11 - ws0 * d10));
  return g;
}

// From the gradient `g` of an activated weight `p` to that of its logit; `mean` = sum over the group of p * g.
template <typename T>
DCNV3_HD T logit_gradient(int activation, T p, T g, T mean) {
  return activation == kSoftmax ? p * (g - mean) : activation == kSigmoid ? g * p * (as<T>(1) - p) : g;
}
