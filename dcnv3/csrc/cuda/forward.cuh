// Forward on a GPU: a team of lanes a (pixel, group). The lanes share out the points to find their places, once, and then
// share out the channels, in loads of 128 bits; warps never wait for each other.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

template <typename S, int N>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 4) forward_kernel(const Arguments a) {
  using T = Compute<S>;
  const Team team(a);
  const int points = static_cast<int>(a.q.points), channels = static_cast<int>(a.q.group_channels);
  unsigned char* mine = shared_memory + team.slot * team_bytes(points, sizeof(T), a.chunk, false);
  Four<T>* shares = reinterpret_cast<Four<T>*>(mine);
  Corners* pixels = reinterpret_cast<Corners*>(shares + a.chunk);
  T* weight = reinterpret_cast<T*>(pixels + a.chunk);
  weigh<S>(a, team, weight);
  const int stride = static_cast<int>(a.q.value_stride);
  const S* image = static_cast<const S*>(a.t.value) + team.image * a.q.height * a.q.width * a.q.value_stride + team.group * channels;
  S* output = static_cast<S*>(a.t.output) + team.pixel * a.q.channels() + team.group * channels;

  for (int first = 0; first < channels; first += team.lanes * N) {
    const int c = first + team.member * N;
    T sum[N] = {};
    for (int begin = 0; begin < points; begin += a.chunk) {
      const int count = min(a.chunk, points - begin);
      if (first == 0 || points > a.chunk) {
        __syncwarp();
        for (int k = team.member; k < count; k += team.lanes) {
          Axis<T> y, x;
          place<S>(a, team, begin + k, y, x);
          const T p = weight[begin + k], top = p * y.w0, bottom = p * y.w1;
          shares[k] = {{top * x.w0, top * x.w1, bottom * x.w0, bottom * x.w1}};
          pixels[k] = corners(a, y, x);
        }
        __syncwarp();
      }
      if (c < channels) {
#pragma unroll 3
        for (int k = 0; k < count; ++k) {
          const Four<T> share = shares[k];
          const Corners pixel = pixels[k];
          T v[4][N];
#pragma unroll
          for (int i = 0; i < 4; ++i) load<N>(image + static_cast<int64_t>(pixel.at[i]) * stride + c, v[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) sum[n] += share.at[i] * v[i][n];
          }
        }
      }
    }
    if (c < channels && team.real) store<N>(output + c, sum);
  }
}

}  // namespace gpu
}  // namespace dcnv3
