// LayerNorm over the last dimension, with GELU or without. A *lane group* of 2^lanes_log2 lanes of a warp does one row, each
// lane `N` channels at a time; warps wait for each other between the two halves of the backward pass alone (norm.cu).
// Statistics are in the type of the arithmetic.
#pragma once

#include "device.cuh"
#include "norm_plan.h"

namespace dcnv3 {
namespace gpu {

__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }
__device__ __forceinline__ float accurate_exp(float x) { return expf(x); }
__device__ __forceinline__ double accurate_exp(double x) { return exp(x); }
__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1.0 / sqrt(x); }

template <typename T>
__device__ __forceinline__ T share_below(T x) {
  return T(0.5) * (T(1) + error_function(x * T(0.70710678118654752440)));
}
template <typename T>
__device__ __forceinline__ T gelu_slope(T x) {
  return share_below(x) + x * T(0.39894228040143267794) * accurate_exp(T(-0.5) * x * x);
}

// What the row's norm is multiplied by.
template <typename S>
__device__ __forceinline__ Compute<S> factor_of(const NormArguments& a, int64_t row) {
  return a.t.factor == nullptr ? Compute<S>(1) : widen(static_cast<const S*>(a.t.factor)[row / a.q.rows_of_factor]);
}

// The lane's place in its group, and the group's in the grid.
struct RowLanes {
  int rank, size;
  int64_t group;

  __device__ __forceinline__ explicit RowLanes(int lanes_log2)
      : rank(threadIdx.x & ((1 << lanes_log2) - 1)),
        size(1 << lanes_log2),
        group((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> lanes_log2) {}

  template <typename T>
  __device__ __forceinline__ T sum(T x) const {
    for (int step = size / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

// A row for each lane group. Groups past the last row go along with their warp on the last one, and write nothing. The row
// is read three times, twice from the cache: the squared distances to the mean are summed, not the squares.
template <typename S, int N, bool kGelu>
__global__ void __launch_bounds__(256) norm_forward_kernel(const NormArguments a) {
  using T = Compute<S>;
  const RowLanes lanes(a.lanes_log2);
  const bool active = lanes.group < a.q.rows;
  const int64_t row = active ? lanes.group : a.q.rows - 1;
  const int channels = static_cast<int>(a.q.channels), first = lanes.rank * N, step = lanes.size * N;
  const S* x = static_cast<const S*>(a.t.x) + row * channels;
  T sum = 0, squares = 0;
  for (int c = first; c < channels; c += step) {
    T v[N];
    load<N>(x + c, v);
#pragma unroll
    for (int n = 0; n < N; ++n) sum += v[n];
  }
  const T mean = lanes.sum(sum) / channels;
  for (int c = first; c < channels; c += step) {
    T v[N];
    load<N>(x + c, v);
#pragma unroll
    for (int n = 0; n < N; ++n) squares += (v[n] - mean) * (v[n] - mean);
  }
  const T rstd = reciprocal_root(lanes.sum(squares) / channels + static_cast<T>(a.q.eps));
  if (!active) return;
  if (lanes.rank == 0) static_cast<T*>(a.t.mean)[row] = mean, static_cast<T*>(a.t.rstd)[row] = rstd;
  S* output = static_cast<S*>(a.t.output) + row * channels;
  const S* residual = static_cast<const S*>(a.t.residual);
  const T factor = kGelu ? T(1) : factor_of<S>(a, row);  // no branch ends with a GELU
  for (int c = first; c < channels; c += step) {
    T v[N], w[N], b[N];
    load<N>(x + c, v);
    load<N>(static_cast<const S*>(a.t.weight) + c, w);
    load<N>(static_cast<const S*>(a.t.bias) + c, b);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T y = (v[n] - mean) * rstd * w[n] + b[n];
      v[n] = kGelu ? y * share_below(y) : y;
    }
    if (!kGelu && residual != nullptr) {
      T r[N];
      load<N>(residual + row * channels + c, r);
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = r[n] + v[n] * factor;
    }
    store<N>(output + c, v);
  }
}

// `share` rows for each warp, a row at a time for each of its lane groups. A lane keeps, in shared memory that no other lane
// looks at: the sums for weight and bias over the rows, and for one row the gradient of its normal form. Neighbouring lanes'
// numbers lie side by side there, in different banks.
template <typename S, int N, bool kGelu>
__device__ __forceinline__ void norm_shares(const NormArguments& a) {
  using T = Compute<S>;
  const RowLanes lanes(a.lanes_log2);
  const int channels = static_cast<int>(a.q.channels), vectors = channels / N;
  const int groups = kWarp >> a.lanes_log2;  // of a warp
  T* const sums_weight = reinterpret_cast<T*>(shared_memory) + (threadIdx.x >> a.lanes_log2) * 3 * channels;
  T *const sums_bias = sums_weight + channels, *const slopes = sums_bias + channels;
  for (int v = lanes.rank; v < vectors; v += lanes.size) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums_weight[n * vectors + v] = 0, sums_bias[n * vectors + v] = 0;
  }
  const int64_t warp = lanes.group / groups, begin = warp * a.share, left = a.q.rows - begin;
  if (left <= 0) return;  // all lanes of a warp alike
  const int rows = static_cast<int>(a.share < left ? a.share : left);  // of a share: far fewer than all
  const S *weight = static_cast<const S*>(a.t.weight), *bias = static_cast<const S*>(a.t.bias);
  const int group = (threadIdx.x & (kWarp - 1)) >> a.lanes_log2;
  for (int next = 0; next < rows; next += groups) {
    const bool active = next + group < rows;
    const int64_t row = begin + (active ? next + group : rows - 1);
    const S* x = static_cast<const S*>(a.t.x) + row * channels;
    const S* grad = static_cast<const S*>(a.t.grad_output) + row * channels;
    const S* again = kGelu ? nullptr : static_cast<const S*>(a.t.grad_again);  // a GELU has one reader
    const T mean = static_cast<const T*>(a.t.mean)[row], rstd = static_cast<const T*>(a.t.rstd)[row];
    const T factor = kGelu ? T(1) : factor_of<S>(a, row);  // no branch ends with a GELU
    T sum = 0, products = 0;
    for (int v = lanes.rank; v < vectors; v += lanes.size) {
      T normal[N], w[N], g[N];
      load<N>(x + v * N, normal);
      load<N>(weight + v * N, w);
      load<N>(grad + v * N, g);
#pragma unroll
      for (int n = 0; n < N; ++n) normal[n] = (normal[n] - mean) * rstd, g[n] *= factor;
      if (again != nullptr) {
        T other[N];
        load<N>(again + row * channels + v * N, other);
#pragma unroll
        for (int n = 0; n < N; ++n) g[n] += other[n] * factor;
      }
      if constexpr (kGelu) {
        T b[N];
        load<N>(bias + v * N, b);
#pragma unroll
        for (int n = 0; n < N; ++n) g[n] *= gelu_slope(normal[n] * w[n] + b[n]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int at = n * vectors + v;
        const T slope = g[n] * w[n];
        if (active) sums_weight[at] += g[n] * normal[n], sums_bias[at] += g[n];
        slopes[at] = slope;
        sum += slope, products += slope * normal[n];
      }
    }
    const T mean_slope = lanes.sum(sum) / channels, mean_product = lanes.sum(products) / channels;
    if (!active) continue;
    const S* residual = kGelu ? nullptr : static_cast<const S*>(a.t.grad_residual);
    S* grad_x = static_cast<S*>(a.t.grad_x) + row * channels;
    for (int v = lanes.rank; v < vectors; v += lanes.size) {
      T normal[N];
      load<N>(x + v * N, normal);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        normal[n] = (slopes[n * vectors + v] - mean_slope - (normal[n] - mean) * rstd * mean_product) * rstd;
      }
      if (residual != nullptr) {
        T r[N];
        load<N>(residual + row * channels + v * N, r);
#pragma unroll
        for (int n = 0; n < N; ++n) normal[n] += r[n];
      }
      store<N>(grad_x + v * N, normal);
    }
  }
  T* const to = static_cast<T*>(a.t.sums) + warp * sums_stride(a.q);
  for (int start = 0; start < vectors; start += lanes.size) {
    const int v = start + lanes.rank;
    const bool mine = v < vectors;
    for (int n = 0; n < N; ++n) {
      T w = mine ? sums_weight[n * vectors + v] : T(0), b = mine ? sums_bias[n * vectors + v] : T(0);
      for (int other = lanes.size; other < kWarp; other *= 2) {
        w += __shfl_xor_sync(0xffffffffu, w, other);
        b += __shfl_xor_sync(0xffffffffu, b, other);
      }
      if (mine && group == 0) to[v * N + n] = w, to[channels + v * N + n] = b;
    }
  }
}

// The gradients of weight and bias from the shares' sums: a warp for as many columns as 16 bytes hold, a share for each lane.
template <typename S>
__device__ __forceinline__ void norm_sums(const NormArguments& a) {
  using T = Compute<S>;
  constexpr int kColumns = 16 / sizeof(T);
  const int channels = static_cast<int>(a.q.channels), stride = static_cast<int>(sums_stride(a.q));
  const int lane = threadIdx.x % kWarp, shares = static_cast<int>(a.shares), warps = gridDim.x * blockDim.x / kWarp;
  int first = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp * kColumns;
#pragma unroll 1
  for (; first < 2 * channels; first += warps * kColumns) {
    const T* sums = static_cast<const T*>(a.t.sums) + first;
    T sum[kColumns] = {};
#pragma unroll 4
    for (int share = lane; share < shares; share += kWarp) {
      T some[kColumns];
      load<kColumns>(sums + static_cast<int64_t>(share) * stride, some);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] += some[i];
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      for (int step = kWarp / 2; step > 0; step /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
      const int column = first + i;
      if (lane != i || column >= 2 * channels) continue;
      S* to = static_cast<S*>(column < channels ? a.t.grad_weight : a.t.grad_bias);
      narrow(to[column % channels], sum[i]);
    }
  }
}

}  // namespace gpu
}  // namespace dcnv3
