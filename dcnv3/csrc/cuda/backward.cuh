// Backward on a GPU, with the teams of forward.cuh. The gradients of a point's place and weight are sums over channels,
// taken by warp shuffles. The gradient of the value is added to global memory by reductions of four floats (sm_90) or one,
// laid out so that the lanes of a team write next to each other: the cache then adds whole sectors. (Sums of 16-bit pairs
// would lose the float32 arithmetic, and sums in shared memory are loops of compare-and-swap before sm_90.)
// In the deterministic mode it is added up in 64-bit fixed point, where the order of additions does not matter.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kFloats = 4;  // in one reduction
__device__ __forceinline__ void add_four(float* to, const float* x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
#elif defined(DCNV3_EMULATION) && DCNV3_EMULATION >= 900
constexpr int kFloats = 4;
inline void add_four(float* to, const float* x) {
  for (int i = 0; i < 4; ++i) to[i] += x[i];
}
#else
constexpr int kFloats = 1;
__device__ __forceinline__ void add_four(float*, const float*) {}
#endif

// Fixed point, in two's complement.
using Fixed = unsigned long long;

// Add W numbers times `factor`; nobody reads the result meanwhile. `scale` is that of fixed point.
template <int W>
__device__ __forceinline__ void add(float* to, const float* x, float factor, double /*scale*/) {
  if constexpr (W == 4) {
    const float product[4] = {x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor};
    add_four(to, product);
  } else {
    atomicAdd(to, x[0] * factor);
  }
}
template <int W>
__device__ __forceinline__ void add(double* to, const double* x, double factor, double /*scale*/) {
  atomicAdd(to, x[0] * factor);
}
template <int W, typename T>
__device__ __forceinline__ void add(Fixed* to, const T* x, T factor, double scale) {
  atomicAdd(to, static_cast<Fixed>(__double2ll_rn(static_cast<double>(x[0] * factor) * scale)));
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

// Blocks of a multiprocessor that the registers must allow: as many as each form can do without spilling.
template <int N, typename Sum>
constexpr int kBlocks = !kSame<Sum, float> ? 2 : N == 1 ? 4 : 3;

// `Sum` is what the value's gradient is added up in: float, double or Fixed.
template <typename S, int N, typename Sum>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kBlocks<N, Sum>) backward_kernel(const Arguments a) {
  using T = Compute<S>;
  const Team team(a);
  const int points = static_cast<int>(a.q.points), channels = static_cast<int>(a.q.group_channels);
  unsigned char* mine = shared_memory + team.slot * team_bytes(points, sizeof(T), a.chunk, true);
  T* weight = reinterpret_cast<T*>(mine);
  T *to_weight = weight + points, *to_h = to_weight + points, *to_w = to_h + points;
  Four<T>* axes = reinterpret_cast<Four<T>*>(mine + (4 * points * int(sizeof(T)) + 15) / 16 * 16);  // hw0, hw1, ww0, ww1
  Corners* pixels = reinterpret_cast<Corners*>(axes + a.chunk);
  T* inside = reinterpret_cast<T*>(pixels + a.chunk);  // hs0 + 2 hs1 + 4 ws0 + 8 ws1
  weigh<S>(a, team, weight);
  // The value's gradient goes out in pieces of W channels, piece i of all lanes side by side.
  constexpr int W = kSame<Sum, float> && N % kFloats == 0 ? kFloats : 1;
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
      inside[k] = y.s0 + T(2) * y.s1 + T(4) * x.s0 + T(8) * x.s1;
    }
    __syncwarp();
    for (int first = 0; first < channels; first += team.lanes * N) {
      const int c = first + team.member * N;
      const bool here = c < channels;
      T g[N] = {}, out[N] = {};
      if (here) load<N>(gradient + c, g);
#pragma unroll
      for (int i = 0; i < N / W; ++i) {
        const int at = first + (i * team.lanes + team.member) * W;
        if (at >= channels) continue;
        T piece[W];
        load<W>(gradient + at, piece);
#pragma unroll
        for (int w = 0; w < W; ++w) out[i * W + w] = piece[w];
      }
      for (int k = 0; k < count; ++k) {
        const Four<T> axis = axes[k];
        const Corners pixel = pixels[k];
        const T p = weight[begin + k];
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
#pragma unroll
            for (int n = 0; n < N; ++n) dot[i] += g[n] * v[i][n];
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!team.real || share[i] == T(0)) continue;
          Sum* to = sums + static_cast<int64_t>(pixel.at[i]) * all + first + team.member * W;
#pragma unroll
          for (int n = 0; n < N; n += W) {
            if (first + n * team.lanes + team.member * W < channels) add<W>(to + n * team.lanes, out + n, share[i], scale);
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
  for (int k = team.member; k < points; k += team.lanes) mean += weight[k] * to_weight[k];
  mean = team.sum(mean);
  if (!team.real) return;
  const int64_t point = (team.pixel * a.q.groups + team.group) * points;
  const T offset_scale = static_cast<T>(a.q.offset_scale);
  for (int k = team.member; k < points; k += team.lanes) {
    const T pair[2] = {to_w[k] * offset_scale, to_h[k] * offset_scale};
    store<2>(static_cast<S*>(a.t.grad_offset) + (point + k) * 2, pair);
    narrow(static_cast<S*>(a.t.grad_mask)[point + k], logit_gradient(a.q.activation, weight[k], to_weight[k], mean));
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
