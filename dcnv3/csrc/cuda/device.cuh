// What both kernels stand on: storage types, 128-bit loads and stores, lane groups, and the table of the points.
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
// A softmax needs its exponentials to a small part of the largest, 1: the quick ones are within 1e-7 of that.
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }
template <typename T>
__device__ __forceinline__ T sigmoid(T x) {
  return reciprocal(T(1) + exponential(-x));
}

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// N elements that are loaded and stored as one.
template <typename S, int N>
struct alignas(sizeof(S) * N) Pack {
  S at[N];
};

template <int N, typename S>
__device__ __forceinline__ void load(const S* from, Compute<S> (&to)[N]) {
  if constexpr (kSame<S, __nv_bfloat16> && N % 2 == 0) {
    // A bfloat16 is the upper half of a float: one shift or one mask of a word of two.
    const Pack<uint32_t, N / 2> pack = *reinterpret_cast<const Pack<uint32_t, N / 2>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = __uint_as_float(i % 2 == 0 ? pack.at[i / 2] << 16 : pack.at[i / 2] & 0xffff0000u);
  } else {
    const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(pack.at[i]);
  }
}
template <int N, typename S>
__device__ __forceinline__ void store(S* to, const Compute<S> (&from)[N]) {
  Pack<S, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(pack.at[i], from[i]);
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
}

// Numbers that a kernel knows when it is compiled where L is not kAny, for the published models: a 3 by 3 kernel, lane
// groups of 2^L lanes that move their channels at once.
constexpr int kAny = -1;
template <int N, int L>
struct Shape {
  int lanes_log2, points, channels, chunk;

  __device__ __forceinline__ explicit Shape(const Arguments& a)
      : lanes_log2(L != kAny ? L : a.lanes_log2),
        points(L != kAny ? 9 : static_cast<int>(a.q.points)),
        channels(L != kAny ? N << L : static_cast<int>(a.q.group_channels)),
        chunk(L != kAny ? 9 : a.chunk) {}
};

// The lanes of one (pixel, group). Lane groups past the last pair go along with their warp on the last one, and write
// nothing.
struct LaneGroup {
  int rank, size;  // of this lane, of all
  int slot;        // of the block's shared memory
  bool active;
  uint32_t pair, image, pixel, h, w, group;

  __device__ __forceinline__ LaneGroup(const Arguments& a, int size_log2) {
    size = 1 << size_log2;
    rank = threadIdx.x & (size - 1);
    slot = threadIdx.x >> size_log2;
    const uint32_t wanted = blockIdx.x * (blockDim.x >> size_log2) + slot;
    active = wanted < a.pairs;
    pair = active ? wanted : a.pairs - 1;
    pixel = divide(pair, a.by_groups), group = pair - pixel * a.by_groups.number;
    const uint32_t row = divide(pixel, a.by_out_width);
    image = divide(row, a.by_out_height);
    w = pixel - row * a.by_out_width.number, h = row - image * a.by_out_height.number;
  }

  template <typename T>
  __device__ __forceinline__ T sum(T x) const {
    for (int step = size / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  template <typename T>
  __device__ __forceinline__ T reduce_max(T x) const {
    for (int step = size / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

// The weights of a lane group's points, into its shared memory, but for a factor, which is returned; each logit is read
// once. A lane works on points of its own here: those of others are there after the next __syncwarp.
template <typename S>
__device__ __forceinline__ Compute<S> point_weights(const Arguments& a, const LaneGroup& lanes, int points,
                                                    Compute<S>* weight) {
  using T = Compute<S>;
  const int activation = a.q.activation;
  const S* logits = static_cast<const S*>(a.t.mask) + lanes.pixel * a.q.mask_stride + lanes.group * points;
  if (activation != kSoftmax) {
#pragma unroll 1
    for (int k = lanes.rank; k < points; k += lanes.size) {
      const T x = widen(logits[k]);
      weight[k] = activation == kSigmoid ? sigmoid(x) : x;
    }
    return T(1);
  }
  T top = -INFINITY, sum = 0;
#pragma unroll 1
  for (int k = lanes.rank; k < points; k += lanes.size) {
    weight[k] = widen(logits[k]);
    top = max(top, weight[k]);
  }
  top = lanes.reduce_max(top);
#pragma unroll 1
  for (int k = lanes.rank; k < points; k += lanes.size) {
    weight[k] = exponential(weight[k] - top);
    sum += weight[k];
  }
  return reciprocal(lanes.sum(sum));
}

// The share that the value itself has in an output pixel of a lane group's.
template <typename S>
__device__ __forceinline__ Compute<S> center_share(const Arguments& a, const LaneGroup& lanes) {
  const S* logits = static_cast<const S*>(a.t.center) + lanes.pixel * a.q.center_stride;
  return sigmoid(widen(logits[lanes.group]));
}
// That value: of an output as large as the value, a pixel's number is the same in both.
template <typename S>
__device__ __forceinline__ const S* center_value(const Arguments& a, const LaneGroup& lanes, int channels) {
  return static_cast<const S*>(a.t.value) + lanes.pixel * a.q.value_stride + lanes.group * channels;
}

// Where the points of a lane group lie.
template <typename S>
struct Points {
  using T = Compute<S>;
  const S* offsets;
  T start_h, start_w, scale;

  __device__ __forceinline__ Points(const Arguments& a, const LaneGroup& lanes, int points)
      : offsets(static_cast<const S*>(a.t.offset) + lanes.pixel * a.q.offset_stride + lanes.group * points * 2),
        start_h(static_cast<T>(lanes.h * a.q.stride_h - a.q.padding_h + a.radius_h)),
        start_w(static_cast<T>(lanes.w * a.q.stride_w - a.q.padding_w + a.radius_w)) {
    if constexpr (kSame<T, double>) {
      scale = a.q.offset_scale;
    } else {
      scale = a.offset_scale;
    }
  }

  // The two axes of point k (sampling.h).
  __device__ __forceinline__ void axes(const Arguments& a, int k, Axis<T>& y, Axis<T>& x) const {
    const int cell = k + (k >= a.middle ? 1 : 0), i = static_cast<int>(divide(cell, a.by_kernel_h));
    const int j = cell - i * static_cast<int>(a.q.kernel_h);
    const int cell_w = i * static_cast<int>(a.q.dilation_w) - a.radius_w, cell_h = j * static_cast<int>(a.q.dilation_h) - a.radius_h;
    const S* pair = offsets + 2 * k;
    x = axis(location(start_w, static_cast<T>(cell_w), widen(pair[0]), scale), static_cast<int>(a.q.width));
    y = axis(location(start_h, static_cast<T>(cell_h), widen(pair[1]), scale), static_cast<int>(a.q.height));
  }
};

struct alignas(16) Corners {
  uint32_t at[4];  // the pixels' places in the image, in units (launch.h): 00, 01, 10, 11
};
template <typename T>
struct alignas(16) Four {
  T at[4];
};

template <typename T>
__device__ __forceinline__ Corners corners(const Arguments& a, const Axis<T>& y, const Axis<T>& x) {
  const uint32_t row = static_cast<uint32_t>(a.q.width) * a.pixel_units;
  const uint32_t left = x.i0 * a.pixel_units, right = x.i1 * a.pixel_units;
  return {{y.i0 * row + left, y.i0 * row + right, y.i1 * row + left, y.i1 * row + right}};
}

// The product of two 32-bit numbers. In C++ the compiler takes the second factor's upper half, which is 0, through a loop
// and adds its product.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// `base`, so many units on. (Through char*: from an integer the compiler would not know that the memory is global.)
template <typename E>
__device__ __forceinline__ const E* advance(const E* base, uint32_t units, uint32_t unit) {
  return reinterpret_cast<const E*>(reinterpret_cast<const char*>(base) + wide_product(units, unit));
}
template <typename E>
__device__ __forceinline__ E* advance(E* base, uint32_t units, uint32_t unit) {
  return reinterpret_cast<E*>(reinterpret_cast<char*>(base) + wide_product(units, unit));
}

extern __shared__ __align__(16) unsigned char shared_memory[];

}  // namespace gpu
}  // namespace dcnv3
