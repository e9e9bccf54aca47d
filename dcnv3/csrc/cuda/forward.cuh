// Forward on a GPU: a group of lanes a (pixel, group). The lanes share out the points to find their places, once, and then
// share out the channels, in loads of 128 bits; warps never wait for each other.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

template <typename T>
struct ForwardPoint {
  Four<T> shares;  // of the four pixels in the output
  Corners pixels;
};

template <typename S, int N, int L>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 4) forward_kernel(const Arguments a) {
  using T = Compute<S>;
  const Shape<N, L> shape(a);
  const LaneGroup lanes(a, shape.lanes_log2);
  const int table = table_bytes(sizeof(T), shape.chunk, false);
  ForwardPoint<T>* entries = reinterpret_cast<ForwardPoint<T>*>(shared_memory + lanes.slot * table);
  T* weight = reinterpret_cast<T*>(shared_memory + (blockDim.x >> shape.lanes_log2) * table) + lanes.slot * shape.points;
  const T factor = point_weights<S>(a, lanes, shape.points, weight);
  int c = lanes.rank * N;
  const S* image = static_cast<const S*>(a.t.value) + lanes.image * (a.q.height * a.q.width * a.q.value_stride);
  const S* from = image + lanes.group * shape.channels + c;

  for (int first = 0; first < shape.channels; first += lanes.size * N, c += lanes.size * N, from += lanes.size * N) {
    T sum[N] = {};
    for (int begin = 0; begin < shape.points; begin += shape.chunk) {
      const int count = min(shape.chunk, shape.points - begin);
      if (first == 0 || shape.points > shape.chunk) {
        __syncwarp();
        const Points<S> where(a, lanes, shape.points);
#pragma unroll 1
        for (int k = lanes.rank; k < count; k += lanes.size) {
          Axis<T> y, x;
          where.axes(a, begin + k, y, x);
          const T p = weight[begin + k] * factor, top = p * y.w0, bottom = p * y.w1;
          entries[k] = {{{top * x.w0, top * x.w1, bottom * x.w0, bottom * x.w1}}, corners(a, y, x)};
        }
        __syncwarp();
      }
      if (c < shape.channels) {
        const auto add = [&](int k) {
          const ForwardPoint<T> point = entries[k];
          T v[4][N];
#pragma unroll
          for (int i = 0; i < 4; ++i) load<N>(advance(from, point.pixels.at[i], a.value_unit), v[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) sum[n] += point.shares.at[i] * v[i][n];
          }
        };
        // Several points at a time, by hand: where nvcc 13.0 unrolls this loop by three, it leaves out the remainder and so
        // reads past the last point where their number is no multiple of three (test_cuda_build.py).
        constexpr int together = L == kAny ? 2 : 3;  // with a remainder, three spill on sm_100
        int k = 0;
#pragma unroll 1
        for (; k + together <= count; k += together) {
#pragma unroll
          for (int i = 0; i < together; ++i) add(k + i);
        }
#pragma unroll 1
        for (; k < count; ++k) add(k);
      }
    }
    if (c < shape.channels && lanes.active) {
      if (a.q.center) {
        T v[N];
        load<N>(center_value<S>(a, lanes, shape.channels) + c, v);
        const T share = center_share<S>(a, lanes);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += share * (v[n] - sum[n]);
      }
      store<N>(static_cast<S*>(a.t.output) + static_cast<uint64_t>(lanes.pair) * shape.channels + c, sum);
    }
  }
}

}  // namespace gpu
}  // namespace dcnv3
