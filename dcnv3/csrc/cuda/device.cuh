// What both kernels stand on: storage types, 128-bit loads and stores, teams of lanes, and the places of the points.
#pragma once

#if defined(DCNV3_EMULATION)
#include "emulation.h"  // tests/dcnv3: the few CUDA names used here, for a CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "launch.h"

namespace dcnv3 {
namespace gpu {

#include "../sampling.h"

template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(double& to, double x) { to = x; }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(__half& to, float x) { to = __float2half(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// N elements that are loaded and stored as one.
template <typename S, int N>
struct alignas(sizeof(S) * N) Pack {
  S at[N];
};

template <int N, typename S>
__device__ __forceinline__ void load(const S* from, Compute<S> (&to)[N]) {
  const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.at[i]);
}
template <int N, typename S>
__device__ __forceinline__ void store(S* to, const Compute<S> (&from)[N]) {
  Pack<S, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(pack.at[i], from[i]);
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
}

// The lanes of one (pixel, group). Teams past the last pair go along with their warp on the last one, and write nothing.
struct Team {
  int member, lanes, slot;  // slot: of the block's shared memory
  bool real;
  int64_t image, h, w, group, pixel;

  __device__ __forceinline__ explicit Team(const Arguments& a) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, teams = kWarp >> a.team_log2;
    lanes = 1 << a.team_log2;
    member = lane & (lanes - 1);
    slot = warp * teams + (lane >> a.team_log2);
    int64_t pair = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp * teams) + slot;
    real = pair < a.pairs;
    pair = real ? pair : a.pairs - 1;
    if (a.pairs < (int64_t(1) << 31)) {  // division of 32 bits is many times cheaper
      const uint32_t p = static_cast<uint32_t>(pair), groups = static_cast<uint32_t>(a.q.groups);
      const uint32_t place = p / groups, columns = static_cast<uint32_t>(a.q.out_width);
      const uint32_t row = place / columns, rows = static_cast<uint32_t>(a.q.out_height);
      group = p - place * groups, pixel = place, w = place - row * columns;
      image = row / rows, h = row % rows;
    } else {
      pixel = pair / a.q.groups, group = pair % a.q.groups;
      w = pixel % a.q.out_width, h = pixel / a.q.out_width % a.q.out_height, image = pixel / a.q.pixels();
    }
  }

  template <typename T>
  __device__ __forceinline__ T sum(T x) const {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  template <typename T>
  __device__ __forceinline__ T most(T x) const {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

// The weights of a team's points, into its shared memory; each logit is read once. A lane works on points of its own here:
// those of others are there after the next __syncwarp.
template <typename S>
__device__ __forceinline__ void weigh(const Arguments& a, const Team& team, Compute<S>* weight) {
  using T = Compute<S>;
  const int points = static_cast<int>(a.q.points), activation = a.q.activation;
  const S* logits = static_cast<const S*>(a.t.mask) + team.pixel * a.q.mask_stride + team.group * a.q.points;
  T top = -INFINITY;
  for (int k = team.member; k < points; k += team.lanes) {
    const T x = widen(logits[k]);
    weight[k] = activation == kSigmoid ? T(1) / (T(1) + exponential(-x)) : x;
    top = max(top, x);
  }
  if (activation != kSoftmax) return;
  top = team.most(top);
  T sum = 0;
  for (int k = team.member; k < points; k += team.lanes) {
    weight[k] = exponential(weight[k] - top);
    sum += weight[k];
  }
  const T share = T(1) / team.sum(sum);
  for (int k = team.member; k < points; k += team.lanes) weight[k] *= share;
}

// Where point k of a team lies: the two axes (sampling.h).
template <typename S>
__device__ __forceinline__ void place(const Arguments& a, const Team& team, int k, Axis<Compute<S>>& y, Axis<Compute<S>>& x) {
  using T = Compute<S>;
  const int kernel_h = static_cast<int>(a.q.kernel_h);
  const int middle = a.q.remove_center ? kernel_h / 2 * kernel_h + kernel_h / 2 : kernel_h * static_cast<int>(a.q.kernel_w);
  const int cell = k + (k >= middle ? 1 : 0), i = cell / kernel_h, j = cell - i * kernel_h;
  const int dilation_h = static_cast<int>(a.q.dilation_h), dilation_w = static_cast<int>(a.q.dilation_w);
  const int radius_h = (dilation_h * (kernel_h - 1)) >> 1, radius_w = (dilation_w * (static_cast<int>(a.q.kernel_w) - 1)) >> 1;
  const S* pair = static_cast<const S*>(a.t.offset) + team.pixel * a.q.offset_stride + (team.group * a.q.points + k) * 2;
  const T scale = static_cast<T>(a.q.offset_scale);
  const T start_h = static_cast<T>(team.h * a.q.stride_h - a.q.padding_h + radius_h);
  const T start_w = static_cast<T>(team.w * a.q.stride_w - a.q.padding_w + radius_w);
  x = axis(location(start_w, static_cast<T>(i * dilation_w - radius_w), static_cast<T>(widen(pair[0])), scale), static_cast<int>(a.q.width));
  y = axis(location(start_h, static_cast<T>(j * dilation_h - radius_h), static_cast<T>(widen(pair[1])), scale), static_cast<int>(a.q.height));
}

struct alignas(16) Corners {
  int at[4];  // pixel numbers in the image: 00, 01, 10, 11
};
template <typename T>
struct alignas(16) Four {
  T at[4];
};

template <typename T>
__device__ __forceinline__ Corners corners(const Arguments& a, const Axis<T>& y, const Axis<T>& x) {
  const int width = static_cast<int>(a.q.width);
  return {{y.i0 * width + x.i0, y.i0 * width + x.i1, y.i1 * width + x.i0, y.i1 * width + x.i1}};
}

extern __shared__ __align__(16) unsigned char shared_memory[];

}  // namespace gpu
}  // namespace dcnv3
