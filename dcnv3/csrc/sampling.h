// The arithmetic of DCNv3, shared by the CPU and the CUDA kernels, so that what is tested on a CPU is what a GPU runs.
//
// A location samples the four pixels around it. Along one axis that is two pixels, each with a weight; the product of
// the axes' weights is the pixel's share. `s0` and `s1` say whether the pixel counts: the slope of its weight is -s0, +s1.
#pragma once

#if defined(__CUDACC__)
#define DCNV3_HD __host__ __device__ __forceinline__
#else
#define DCNV3_HD inline __attribute__((always_inline))
#endif

namespace dcnv3 {

// Unpadded pixel coordinate of a point: `start` = out * stride - padding + r, `cell` = i * dilation - r.
template <typename T>
DCNV3_HD T location(T start, T cell, T offset, T scale) {
  return start + (cell + offset) * scale;
}

template <typename T>
struct Axis {
  T w0, w1;    // weights of the two pixels, 0 outside the image
  T s0, s1;    // 1 where the pixel is inside the image, else 0
  int i0, i1;  // the pixels, moved inside the image where they are not
};

// Branch-free, so that a loop over points vectorises; a NaN location is outside.
template <typename T>
DCNV3_HD Axis<T> axis(T loc, int size) {
  const bool in = (loc > T(-1)) & (loc < T(size));
  const T safe = in ? loc : T(0);
  int low = static_cast<int>(safe);
  low -= T(low) > safe ? 1 : 0;  // floor; `safe` > -1
  const T fraction = safe - T(low);
  const bool in0 = in & (low >= 0);
  const bool in1 = in & (low + 1 < size);
  Axis<T> a;
  a.s0 = in0 ? T(1) : T(0);
  a.s1 = in1 ? T(1) : T(0);
  a.w0 = in0 ? T(1) - fraction : T(0);
  a.w1 = in1 ? fraction : T(0);
  a.i0 = low >= 0 ? low : 0;
  a.i1 = low + 1 < size ? low + 1 : size - 1;
  return a;
}

template <typename T>
struct PointGradient {
  T weight, loc_h, loc_w;
};

// From the products of the output's gradient with the four pixels (d_hw, summed over channels) to the gradient with
// respect to the point's weight, of value `p`, and its location.
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

enum Activation { kSoftmax = 0, kSigmoid = 1, kNone = 2 };

// Gradient of an activated weight p, `g`, to that of its logit; `mean` = sum over the group of p * g (softmax only).
template <typename T>
DCNV3_HD T logit_gradient(int activation, T p, T g, T mean) {
  return activation == kSoftmax ? p * (g - mean) : activation == kSigmoid ? g * p * (T(1) - p) : g;
}

}  // namespace dcnv3
