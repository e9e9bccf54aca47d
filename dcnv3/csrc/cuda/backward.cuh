// Backward on a GPU, with the teams of forward.cuh. The gradients of a point's place and weight are sums over channels,
// taken by warp shuffles. The gradient of the value is added to global memory by reductions of four floats (sm_90) or one.
// In the deterministic mode it is added up in 64-bit fixed point, where the order of additions does not matter.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

// Four neighbouring floats in one reduction, which sm_90 has.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
#endif
}
// Add N numbers; nobody reads the result meanwhile.
template <int N>
__device__ __forceinline__ void add(float* to, const float (&x)[N], double /*scale*/) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kFours = N / 4;
#else
  constexpr int kFours = 0;
#endif
#pragma unroll
  for (int i = 0; i < kFours; ++i) add_four(to + 4 * i, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
#pragma unroll
  for (int n = 4 * kFours; n < N; ++n) atomicAdd(to + n, x[n]);
}
template <int N>
__device__ __forceinline__ void add(double* to, const double (&x)[N], double /*scale*/) {
#pragma unroll
  for (int n = 0; n < N; ++n) atomicAdd(to + n, x[n]);
}

// Fixed point, in two's complement.
using Fixed = unsigned long long;
template <int N, typename T>
__device__ __forceinline__ void add(Fixed* to, const T (&x)[N], double scale) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    atomicAdd(to + n, static_cast<Fixed>(__double2ll_rn(static_cast<double>(x[n]) * scale)));
  }
}

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

__device__ __forceinline__ float largest_addition(const Arguments& a) {
  return a.q.activation == kNone ? a.bound[0] * a.bound[1] : a.bound[0];
}
// What turns a number into fixed point, with room for all the additions that one pixel can get.
__device__ __forceinline__ double fixed_point_scale(const Arguments& a) {
  int exponent = 0;
  frexpf(largest_addition(a), &exponent);
  return ldexp(1.0, 61 - a.room_log2 - exponent);
}

// `Sum` is what the value's gradient is added up in: float, double or Fixed.
template <typename S, int N, typename Sum>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) backward_kernel(const Arguments a) {
  using T = Compute<S>;
  const Team team(a);
  const Weights<S> weights(a, team);
  const int points = static_cast<int>(a.q.points), channels = static_cast<int>(a.q.group_channels);
  const int small = (a.chunk * 2 * int(sizeof(T)) + 15) / 16 * 16, results = (3 * points * int(sizeof(T)) + 15) / 16 * 16;
  unsigned char* mine = shared_memory + team.slot * (a.chunk * int(sizeof(Four<T>) + sizeof(Corners)) + small + results);
  Four<T>* axes = reinterpret_cast<Four<T>*>(mine);           // hw0, hw1, ww0, ww1
  Corners* pixels = reinterpret_cast<Corners*>(axes + a.chunk);
  T* weight = reinterpret_cast<T*>(pixels + a.chunk);         // the point's weight, then
  T* inside = weight + a.chunk;                               // hs0 + 2 hs1 + 4 ws0 + 8 ws1
  T* to_weight = reinterpret_cast<T*>(mine + a.chunk * int(sizeof(Four<T>) + sizeof(Corners)) + small);
  T *to_h = to_weight + points, *to_w = to_h + points;
  double scale = 0;
  if constexpr (kSame<Sum, Fixed>) scale = fixed_point_scale(a);

  const int all = static_cast<int>(a.q.channels());
  const int64_t origin = team.image * a.q.height * a.q.width * all + team.group * channels;
  const S* image = static_cast<const S*>(a.t.value) + origin;
  Sum* sums = static_cast<Sum*>(a.t.sum) + origin;
  const S* gradient = static_cast<const S*>(a.t.grad_output) + team.pixel * all + team.group * channels;

  for (int begin = 0; begin < points; begin += a.chunk) {
    const int count = min(a.chunk, points - begin);
    __syncwarp();
    for (int k = team.member; k < count; k += team.lanes) {
      Axis<T> y, x;
      place<S>(a, team, begin + k, y, x);
      axes[k] = {{y.w0, y.w1, x.w0, x.w1}};
      pixels[k] = corners(a, y, x);
      weight[k] = weights.at(begin + k);
      inside[k] = y.s0 + T(2) * y.s1 + T(4) * x.s0 + T(8) * x.s1;
    }
    __syncwarp();
    for (int first = 0; first < channels; first += team.lanes * N) {
      const int c = first + team.member * N;
      const bool here = c < channels;
      T g[N] = {};
      if (here) load<N>(gradient + c, g);
      for (int k = 0; k < count; ++k) {
        const Four<T> axis = axes[k];
        const Corners pixel = pixels[k];
        const T p = weight[k];
        const int bits = static_cast<int>(inside[k]);
        const T share[4] = {p * axis.at[0] * axis.at[2], p * axis.at[0] * axis.at[3], p * axis.at[1] * axis.at[2],
                            p * axis.at[1] * axis.at[3]};
        T dot[4] = {};
        if (here) {
          T v[4][N];
#pragma unroll
          for (int i = 0; i < 4; ++i) load<N>(image + static_cast<int64_t>(pixel.at[i]) * all + c, v[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            T spread[N];
#pragma unroll
            for (int n = 0; n < N; ++n) {
              dot[i] += g[n] * v[i][n];
              spread[n] = g[n] * share[i];
            }
            if (team.real && share[i] != T(0)) add<N>(sums + static_cast<int64_t>(pixel.at[i]) * all + c, spread, scale);
          }
        }
        PointGradient<T> point =
            point_gradient(dot[0], dot[1], dot[2], dot[3], p, axis.at[0], axis.at[1], T(bits & 1), T(bits >> 1 & 1),
                           axis.at[2], axis.at[3], T(bits >> 2 & 1), T(bits >> 3 & 1));
        point.weight = team.sum(point.weight);
        point.loc_h = team.sum(point.loc_h);
        point.loc_w = team.sum(point.loc_w);
        if (team.member == 0) {
          to_weight[begin + k] = first == 0 ? point.weight : to_weight[begin + k] + point.weight;
          to_h[begin + k] = first == 0 ? point.loc_h : to_h[begin + k] + point.loc_h;
          to_w[begin + k] = first == 0 ? point.loc_w : to_w[begin + k] + point.loc_w;
        }
      }
    }
  }
  __syncwarp();
  T mean = 0;
  for (int k = team.member; k < points; k += team.lanes) mean += weights.at(k) * to_weight[k];
  mean = team.sum(mean);
  if (!team.real) return;
  const int64_t point = (team.pixel * a.q.groups + team.group) * points;
  const T offset_scale = static_cast<T>(a.q.offset_scale);
  for (int k = team.member; k < points; k += team.lanes) {
    const T pair[2] = {to_w[k] * offset_scale, to_h[k] * offset_scale};
    store<2>(static_cast<S*>(a.t.grad_offset) + (point + k) * 2, pair);
    narrow(static_cast<S*>(a.t.grad_mask)[point + k], logit_gradient(a.q.activation, weights.at(k), to_weight[k], mean));
  }
}

// The sum in its own type to the gradient in the value's.
template <typename S, typename Sum>
__global__ void finish_kernel(const Arguments a, int64_t count) {
  using T = Compute<S>;
  double scale = 1;
  if constexpr (kSame<Sum, Fixed>) scale = isfinite(largest_addition(a)) ? 1 / fixed_point_scale(a) : NAN;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const Sum sum = static_cast<const Sum*>(a.t.sum)[i];
    T x;
    if constexpr (kSame<Sum, Fixed>) {
      x = static_cast<T>(static_cast<double>(static_cast<long long>(sum)) * scale);
    } else {
      x = sum;
    }
    narrow(static_cast<S*>(a.t.grad_value)[i], x);
  }
}

// The largest |x|, as the bits of a float that is not negative (they order as integers do); NaN counts as the largest.
template <typename S>
__global__ void bound_kernel(const S* x, int64_t rows, int64_t columns, int64_t stride, float* bound) {
  float most = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * columns; i += step) {
    const float size = fabsf(static_cast<float>(widen(x[i / columns * stride + i % columns])));
    most = size <= most ? most : size;
  }
  for (int s = kWarp / 2; s > 0; s /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, most, s);
    most = other <= most ? most : other;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(reinterpret_cast<unsigned int*>(bound), __float_as_uint(most));
}

}  // namespace gpu
}  // namespace dcnv3
