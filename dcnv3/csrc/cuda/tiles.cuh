// The value's gradient by tiles, for 3 by 3 kernels of stride 1: instead of a reduction in global memory for each pixel that
// a point touches, one for each pixel of a window that a tile of output pixels touches.
//
// The gradient of a window is the product of two matrices: shares [window's pixels, tile's pixels], what each pixel of the
// window gives to each pixel of the output, and the gradient of the output [tile's pixels, channels]. A warp makes the
// shares of 8 by 4 output pixels in shared memory, a lane each, so that no two lanes add to one number, and multiplies on
// the tensor cores. Their numbers (TF32) have 11 bits: those of 16-bit types fit in one, a share is the sum of two, and a
// float32 gradient too. A warp goes down a strip of the image, the window with it, whose sums stay in registers until
// the window has passed:
//
//     kWindowWidth
//     . . . . . . . .    rows that the warp has left: added to global memory
//     + + + + + + + +  ┐
//     + + o o o o + +  │ kWindowHeight rows of sums, o: the output pixels of this step
//     + + o o o o + +  │
//     + + + + + + + +  ┘
//
// A centre is one point more of each pixel, at its own place. Points that reach out of the window are added to global memory one by one, and so are all points of a tile whose gradient
// is not finite: zero times infinity would spread in the product.
#pragma once

#include "backward.cuh"

namespace dcnv3 {
namespace gpu {

// c [16, 8] += a [16, 8] times b [8, 8], of TF32: the lower 13 bits of a and b do not count. Lane 4 r + q has rows r and
// r + 8, columns q and q + 4 of a (a[0] = r, q; a[1] = r + 8, q), rows q and q + 4, column r of b, and columns 2 q, 2 q + 1 of c.
#if !defined(DCNV3_EMULATION)
__device__ __forceinline__ void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}
#endif

// What TF32 keeps of a number, cut off or rounded.
template <bool ROUNDED>
__device__ __forceinline__ float tf32(float x) {
  return __uint_as_float((__float_as_uint(x) + (ROUNDED ? 0x1000u : 0u)) & 0xffffe000u);
}

struct Tile {
  const Arguments& a;
  int lane;
  int slice, group;                  // of kSlice channels
  int image, column, row, end;       // of the output pixels: the strip's first column, the step's first row, the end
  int left, top;                     // of the window, in the value

  __device__ __forceinline__ Tile(const TileArguments& tiles) : a(tiles.a), lane(threadIdx.x) {
    uint32_t task = blockIdx.x;
    slice = task % tiles.slices, task /= tiles.slices;
    column = task % tiles.strips * kTileWidth, task /= tiles.strips;
    row = task % tiles.segments * tiles.steps * kTileHeight, image = task / tiles.segments;
    end = min(row + tiles.steps * kTileHeight, static_cast<int>(a.q.out_height));
    group = slice * kSlice / static_cast<int>(a.q.group_channels);
    left = column - static_cast<int>(a.q.padding_w) + a.radius_w - kHalo;
    top = row - static_cast<int>(a.q.padding_h) + a.radius_h - kHalo;
  }

  // Whether output pixel i of the step is there, and its number in the image, or that of one that is.
  __device__ __forceinline__ bool has(int i) const {
    return row + i / kTileWidth < end && column + i % kTileWidth < static_cast<int>(a.q.out_width);
  }
  __device__ __forceinline__ int64_t pixel(int i) const {
    const int width = static_cast<int>(a.q.out_width);
    return min(row + i / kTileWidth, end - 1) * width + min(column + i % kTileWidth, width - 1);
  }
  // Elements before the image in a tensor of one row of `stride` elements an output pixel.
  __device__ __forceinline__ int64_t before(int64_t stride) const { return image * a.q.pixels() * stride; }
};

template <typename S>
__device__ __forceinline__ float tile_center_share(const Tile& tile) {
  const Arguments& a = tile.a;
  const int64_t row = tile.before(a.q.center_stride) + tile.pixel(tile.lane) * a.q.center_stride;
  return sigmoid(widen(static_cast<const S*>(a.t.center)[row + tile.group]));
}

// The points of a step: number k of pixel i at 9 i + k.
struct TilePoints {
  float offset_w[kWarp * 9], offset_h[kWarp * 9], weight[kWarp * 9];

  // Loaded by all lanes side by side, three pixels at a time (the last lanes have one of the next three), then the weights
  // made of the logits by a lane a pixel. Returns the share of the lane's pixel that its centre has, 0 without one.
  template <typename S>
  __device__ __forceinline__ float load_from(const Tile& tile) {
    const Arguments& a = tile.a;
    constexpr int kRounds = (kWarp + 2) / 3;
    const int of_three = tile.lane / 9, k = tile.lane - 9 * of_three;
    const S* pairs = static_cast<const S*>(a.t.offset) + tile.before(a.q.offset_stride) + tile.group * 18 + 2 * k;
    const S* logits = static_cast<const S*>(a.t.mask) + tile.before(a.q.mask_stride) + tile.group * 9 + k;
    float pair[kRounds][2], logit[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int64_t pixel = tile.pixel(min(3 * i + of_three, kWarp - 1));
      load<2>(pairs + pixel * a.q.offset_stride, pair[i]);
      logit[i] = widen(logits[pixel * a.q.mask_stride]);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int at = min(3 * i + of_three, kWarp - 1) * 9 + k;
      offset_w[at] = pair[i][0], offset_h[at] = pair[i][1], weight[at] = logit[i];
    }
    __syncwarp();
    float* mine = weight + tile.lane * 9;
    float p[9], top = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < 9; ++k) p[k] = mine[k], top = max(top, p[k]);
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      if (a.q.activation == kSoftmax) {
        p[k] = exponential(p[k] - top), sum += p[k];
      } else if (a.q.activation == kSigmoid) {
        p[k] = sigmoid(p[k]);
      }
    }
    const float center = a.q.center && tile.has(tile.lane) ? tile_center_share<S>(tile) : 0.0f;
    const float factor = (a.q.activation == kSoftmax ? reciprocal(sum) : 1.0f) * (1.0f - center);
#pragma unroll
    for (int k = 0; k < 9; ++k) mine[k] = tile.has(tile.lane) ? p[k] * factor : 0.0f;
    return center;
  }

  // Weight and axes of point k of the lane's pixel. Point kCenter lies on the pixel's own place and has weight `center`.
  static constexpr int kCenter = 9;
  __device__ __forceinline__ float place(const Tile& tile, int k, float center, Axis<float>& y, Axis<float>& x) const {
    const Arguments& a = tile.a;
    const bool own = k == kCenter;
    const int at = tile.lane * 9 + (own ? 0 : k), i = k / 3, j = k - 3 * i;
    const float start_w = static_cast<float>(tile.left + kHalo + tile.lane % kTileWidth);
    const float start_h = static_cast<float>(tile.top + kHalo + tile.lane / kTileWidth);
    const float cell_w = static_cast<float>(i * static_cast<int>(a.q.dilation_w) - a.radius_w);
    const float cell_h = static_cast<float>(j * static_cast<int>(a.q.dilation_h) - a.radius_h);
    x = axis(own ? start_w : location(start_w, cell_w, offset_w[at], a.offset_scale), static_cast<int>(a.q.width));
    y = axis(own ? start_h : location(start_h, cell_h, offset_h[at], a.offset_scale), static_cast<int>(a.q.height));
    return own ? center : weight[at];
  }
};

// The first of an axis's two pixels, also where that is the one before the image.
__device__ __forceinline__ int first_pixel(const Axis<float>& axis) { return axis.s0 != 0 ? axis.i0 : axis.i1 - 1; }

template <typename S, typename Sum>
__global__ void __launch_bounds__(kWarp) tile_kernel(const TileArguments tiles) {
  const Arguments& a = tiles.a;
  Tile tile(tiles);
  const int lane = tile.lane;
  const int quad = lane & 3, eighth = lane >> 2;  // the lane in a product
  float* shares = reinterpret_cast<float*>(shared_memory);  // [window's pixel][output pixel]
  TilePoints& points = *reinterpret_cast<TilePoints*>(shared_memory + kWindow * kWarp * sizeof(float));
  constexpr int W = kSame<Sum, float> ? kFloats : 1;  // channels of a reduction
  constexpr bool kSplit = kSame<S, float>;
  const int channels = static_cast<int>(a.q.channels()), slice = tile.slice * kSlice;
  const S* gradient = static_cast<const S*>(a.t.grad_output) + tile.before(channels) + slice;
  Sum* sums = static_cast<Sum*>(a.t.sum) + tile.image * (a.q.height * a.q.width * channels) + slice;
  double scale = 0;
  if constexpr (kSame<Sum, Fixed>) scale = fixed_point_scale(a);

  // Add `count` channels times `factor` to pixel y, x from channel c of the slice on.
  auto reduce_to = [&](int y, int x, int c, const float(&numbers)[4], float factor, bool counts) {
    Sum* to = sums + (static_cast<int64_t>(y) * a.q.width + x) * channels + c;
#pragma unroll
    for (int n = 0; n < 4; n += W) add<W>(to + n, numbers + n, factor, counts, scale);
  };

  // Row r of the window, columns eighth and eighth + 8, channels 4 quad to 4 quad + 3.
  float sum[kWindowHeight][2][4] = {};
  auto flush = [&](int r, const float(&row)[2][4]) {
    const int y = tile.top + r;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float numbers[4] = {row[0][2 * half], row[1][2 * half], row[0][2 * half + 1], row[1][2 * half + 1]};
      const int x = tile.left + eighth + 8 * half;
      const bool inside = y >= 0 && y < a.q.height && x >= 0 && x < a.q.width;
      const bool any = numbers[0] != 0 || numbers[1] != 0 || numbers[2] != 0 || numbers[3] != 0;
      reduce_to(y, x, 4 * quad, numbers, 1.0f, inside && any);
    }
  };

#pragma unroll 1
  for (; tile.row < tile.end; tile.row += kTileHeight, tile.top += kTileHeight) {
    // The output's gradient, as the second matrix: row `quad` of the tile, channels 2 eighth and 2 eighth + 1. The products'
    // rows go through the pixels of a tile's row by two.
    float g[kTileWidth][2];
    float zero = 0;  // or NaN
#pragma unroll
    for (int i = 0; i < kTileWidth; ++i) {
      load<2>(gradient + tile.pixel(quad * kTileWidth + i) * channels + 2 * eighth, g[i]);
      zero += 0 * g[i][0] + 0 * g[i][1];
    }
    const bool finite = !__any_sync(0xffffffffu, zero != 0);
#pragma unroll
    for (int i = 0; i < kTileWidth; ++i) {
      if (!finite) g[i][0] = g[i][1] = 0;  // as all shares are, then
    }

    const float center = points.load_from<S>(tile);
#pragma unroll
    for (int i = 0; i < kWindow; i += 4) *reinterpret_cast<Four<float>*>(shares + i * kWarp + 4 * lane) = {};
    __syncwarp();

    uint32_t far = 0;  // points that reach out of the window, a bit each
#pragma unroll 1
    for (int k = 0; k < (a.q.center ? TilePoints::kCenter + 1 : 9); ++k) {
      Axis<float> y, x;
      const float p = points.place(tile, k, center, y, x), top = p * y.w0, bottom = p * y.w1;
      const uint32_t r = first_pixel(y) - tile.top, c = first_pixel(x) - tile.left;
      if (r < kWindowHeight - 1 && c < kWindowWidth - 1 && finite) {
        float* at = shares + (r * kWindowWidth + c) * kWarp + lane;
        float* below = at + kWindowWidth * kWarp;
        const float s00 = at[0], s01 = at[kWarp], s10 = below[0], s11 = below[kWarp];
        at[0] = s00 + top * x.w0, at[kWarp] = s01 + top * x.w1;
        below[0] = s10 + bottom * x.w0, below[kWarp] = s11 + bottom * x.w1;
      } else {
        far |= 1u << k;
      }
    }
#pragma unroll 1
    for (int k = 0; far >> k != 0; ++k) {
      if ((far >> k & 1) == 0) continue;
      const S* from = gradient + tile.pixel(lane) * channels;
      Axis<float> y, x;
      const float p = points.place(tile, k, center, y, x);
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const float share = p * (i < 2 ? y.w0 : y.w1) * (i % 2 == 0 ? x.w0 : x.w1);
        if (share == 0) continue;
#pragma unroll
        for (int n = 0; n < kSlice; n += 4) {
          float numbers[4];
          load<4>(from + n, numbers);
          reduce_to(i < 2 ? y.i0 : y.i1, i % 2 == 0 ? x.i0 : x.i1, n, numbers, share, true);
        }
      }
    }
    __syncwarp();

#pragma unroll
    for (int r = 0; r < kWindowHeight; ++r) {
      constexpr int kKept = kWindowHeight - kTileHeight;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[r][i / 4][i % 4] = r < kKept ? sum[(r + kTileHeight) % kWindowHeight][i / 4][i % 4] : 0.0f;
      // Rows eighth and eighth + 8 of the first matrix, the pixels of the tile's row `quad`. Odd rows load the second half
      // first: two rows then meet in no bank.
      __syncwarp();  // keeps the loads of the next rows, and their registers, behind this row
      float share[2][kTileWidth];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = shares + (r * kWindowWidth + eighth + 8 * half) * kWarp + quad * kTileWidth;
        const bool odd = eighth & 1;
        const Four<float> one = *reinterpret_cast<const Four<float>*>(from + (odd ? 4 : 0));
        const Four<float> other = *reinterpret_cast<const Four<float>*>(from + (odd ? 0 : 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          share[half][i] = odd ? other.at[i] : one.at[i], share[half][i + 4] = odd ? one.at[i] : other.at[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kTileWidth; i += 2) {
        const float all[4] = {share[0][i], share[1][i], share[0][i + 1], share[1][i + 1]};
        float whole[4], rest[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          whole[e] = tf32<kSplit>(all[e]);
          rest[e] = all[e] - whole[e];
          if (kSplit) rest[e] = tf32<true>(rest[e]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float second[2] = {g[i][n], g[i + 1][n]};
          if constexpr (kSplit) {
            const float high[2] = {tf32<true>(second[0]), tf32<true>(second[1])};
            const float low[2] = {tf32<true>(second[0] - high[0]), tf32<true>(second[1] - high[1])};
            multiply_add(sum[r][n], whole, low);
            second[0] = high[0], second[1] = high[1];
          }
          multiply_add(sum[r][n], rest, second);
          multiply_add(sum[r][n], whole, second);
        }
      }
      if (r < kTileHeight) flush(r, sum[r]);
    }
    __syncwarp();
  }
#pragma unroll
  for (int r = kTileHeight; r < kWindowHeight; ++r) {
    __syncwarp();  // as above
    flush(r - kTileHeight, sum[r]);
  }
}

}  // namespace gpu
}  // namespace dcnv3
