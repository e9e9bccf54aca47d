// Backward on a GPU, with the lane groups of forward.cuh. The value's gradient is added to global memory by reductions of
// four floats (sm_90) or one, laid out so that lanes write next to each other: the cache then adds whole sectors. (Sums of
// 16-bit pairs would lose the float32 arithmetic, and sums of floats in shared memory are loops of compare-and-swap.)
// The gradients of a point's place and weight come from the products of the output's gradient with the four pixels, which
// are sums over channels: warp shuffles leave each lane with some of them, one lane a point makes gradients of them.
// In the deterministic mode the value's gradient is added up in 64-bit fixed point, where the order does not matter.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

// Add W numbers to global memory where `counts`; nobody reads the result meanwhile. The condition is on the instruction
// itself: a branch would cost more.
#if defined(DCNV3_EMULATION)
constexpr int kFloats = DCNV3_EMULATION >= 900 ? 4 : 1;  // in one reduction
template <int W>
inline void reduce(float* to, const float (&x)[W], bool counts) {
  for (int i = 0; counts && i < W; ++i) to[i] += x[i];
}
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kFloats = 4;
__device__ __forceinline__ void reduce(float* to, const float (&x)[4], bool counts) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(unsigned(counts))
               : "memory");
}
#else
constexpr int kFloats = 1;
#endif
__device__ __forceinline__ void reduce(float* to, const float (&x)[1], bool counts) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p red.relaxed.gpu.global.add.f32 [%0], %1;}"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(x[0]), "r"(unsigned(counts))
               : "memory");
}
#endif

// Fixed point, in two's complement.
using Fixed = unsigned long long;
// Where tiles.cuh adds up the value's gradient, and this kernel does not.
struct Elsewhere {};

// Add W numbers times `factor` where `counts`. `scale` is that of fixed point.
template <int W>
__device__ __forceinline__ void add(float* to, const float* x, float factor, bool counts, double /*scale*/) {
  float product[W];
#pragma unroll
  for (int i = 0; i < W; ++i) product[i] = x[i] * factor;
  reduce(to, product, counts);
}
template <int W>
__device__ __forceinline__ void add(double* to, const double* x, double factor, bool counts, double /*scale*/) {
  if (counts) atomicAdd(to, x[0] * factor);
}
template <int W, typename T>
__device__ __forceinline__ void add(Fixed* to, const T* x, T factor, bool counts, double scale) {
  if (counts) atomicAdd(to, static_cast<Fixed>(__double2ll_rn(static_cast<double>(x[0] * factor) * scale)));
}

__device__ __forceinline__ float largest_addition(const Arguments& a) {
  const float weight = a.q.activation == kNone ? a.bound[1] : 1;
  return a.bound[0] * (a.q.center && weight < 1 ? 1 : weight);
}
// What turns a number into fixed point, with room for all the additions that one pixel can get.
__device__ __forceinline__ double fixed_point_scale(const Arguments& a) {
  int exponent = 0;
  frexpf(largest_addition(a), &exponent);
  return ldexp(1.0, 61 - a.room_log2 - exponent);
}

// Blocks of a multiprocessor that the registers must allow: as many as each form can do without spilling.
template <typename S, int N, int L, typename Sum>
constexpr int kBlocks = kSame<S, double> ? 2 : N == 1 || L != kAny ? 4 : kSame<Sum, Fixed> ? 2 : 3;

// An axis's weight, and in its sign whether the pixel is inside the image: weights are not negative, but may be -0.
template <typename T>
__device__ __forceinline__ T marked(T weight, T inside) {
  return inside != T(0) ? fabs(weight) : -T(0);
}
template <typename T>
__device__ __forceinline__ T is_inside(T marked_weight) {
  return signbit(marked_weight) ? T(0) : T(1);
}

template <typename T>
struct BackwardPoint {
  Four<T> axes;    // hw0, hw1, ww0, ww1, marked
  Corners pixels;  // 00, 01, 10, 11
  Four<T> dots;    // of the output's gradient with the pixels
};

// Which of the four dots a lane is left with (the first of two in a group of two lanes).
__device__ __forceinline__ int first_dot(const LaneGroup& lanes) {
  return lanes.size == 1 ? 0 : (lanes.rank & 1) * 2 + (lanes.rank >> 1 & 1);
}

// Add each of four sums over a lane group's lanes to its place, from `to` = the lane's first dot on. Lanes exchange halves
// of what they have, so that each is left with one (two, four in smaller groups); further lanes are added to the first four.
template <typename T>
__device__ __forceinline__ void add_dots(const LaneGroup& lanes, const T (&dot)[4], bool fresh, T* to) {
  auto put = [&](int i, T x) { to[i] = fresh ? x : to[i] + x; };
  if (lanes.size == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) put(i, dot[i]);
    return;
  }
  const bool odd = lanes.rank & 1, second = lanes.rank & 2;
  const T top = (odd ? dot[2] : dot[0]) + __shfl_xor_sync(0xffffffffu, odd ? dot[0] : dot[2], 1);
  const T bottom = (odd ? dot[3] : dot[1]) + __shfl_xor_sync(0xffffffffu, odd ? dot[1] : dot[3], 1);
  if (lanes.size == 2) {
    put(0, top), put(1, bottom);
    return;
  }
  T one = (second ? bottom : top) + __shfl_xor_sync(0xffffffffu, second ? top : bottom, 2);
  for (int step = 4; step < lanes.size; step *= 2) one += __shfl_xor_sync(0xffffffffu, one, step);
  if (lanes.rank < 4) put(0, one);
}

// The gradients of a point's place, side by side where their rows are `even`.
template <typename S, typename T>
__device__ __forceinline__ void store_pair(S* to, const T (&pair)[2], bool even) {
  if (even) {
    store<2>(to, pair);
  } else {
    narrow(to[0], pair[0]), narrow(to[1], pair[1]);
  }
}

// What the centre's share s of an output pixel brings, for its gradient g and value v: s g to the gradient of the value,
// s (1 - s) (g . v - g . samples) to that of the share's logit. `mean` is (1 - s) (g . samples).
template <typename S, int W, typename Sum>
__device__ __forceinline__ void center_gradients(const Arguments& a, const LaneGroup& lanes, int channels, Compute<S> mean,
                                                 double scale) {
  using T = Compute<S>;
  const T share = center_share<S>(a, lanes);
  const int64_t place = static_cast<int64_t>(lanes.pair) * channels;  // in all three, which are contiguous
  const S* gradient = static_cast<const S*>(a.t.grad_output) + place;
  const S* value = static_cast<const S*>(a.t.value) + place;
  Sum* to = static_cast<Sum*>(a.t.sum) + place;
  T product = 0;
  for (int c = lanes.rank * W; c < channels; c += lanes.size * W) {
    T g[W], v[W];
    load<W>(gradient + c, g), load<W>(value + c, v);
#pragma unroll
    for (int w = 0; w < W; ++w) product += g[w] * v[w];
    if constexpr (!kSame<Sum, Elsewhere>) add<W>(to + c, g, share, lanes.active && share != T(0), scale);
  }
  product = lanes.sum(product);
  S* to_center = static_cast<S*>(a.t.grad_center) + lanes.pixel * a.q.grad_center_stride + lanes.group;
  if (lanes.active && lanes.rank == 0) narrow(*to_center, share * ((T(1) - share) * product - mean));
}

// `Sum` is what the value's gradient is added up in: float, double, Fixed or Elsewhere.
template <typename S, int N, int L, typename Sum>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kBlocks<S, N, L, Sum>) backward_kernel(const Arguments a) {
  using T = Compute<S>;
  const Shape<N, L> shape(a);
  const LaneGroup lanes(a, shape.lanes_log2);
  const int points = shape.points, channels = shape.channels, table = table_bytes(sizeof(T), shape.chunk, true);
  BackwardPoint<T>* entries = reinterpret_cast<BackwardPoint<T>*>(shared_memory + lanes.slot * table);
  T* weight = reinterpret_cast<T*>(shared_memory + (blockDim.x >> shape.lanes_log2) * table) + lanes.slot * 2 * points;
  T* to_weight = weight + points;
  const T factor = point_weights<S>(a, lanes, points, weight);
  const Points<S> where(a, lanes, points);
  // The value's gradient goes out in pieces of W channels: of four channels, piece i of two lanes side by side, of one
  // channel, piece i of all lanes.
  constexpr int W = kSame<Sum, float> && N % kFloats == 0 ? kFloats : 1;
  const int hop_log2 = W == 4 ? 3 : shape.lanes_log2, hop = 1 << hop_log2;  // channels from a piece to the next
  const int piece = W == 4 ? (lanes.rank >> 1) * 2 * N + (lanes.rank & 1) * W : lanes.rank;
  const int mine = first_dot(lanes);
  double scale = 0;
  if constexpr (kSame<Sum, Fixed>) scale = fixed_point_scale(a);

  const int all = static_cast<int>(a.q.channels());
  const int64_t origin = lanes.image * (a.q.height * a.q.width * all) + lanes.group * channels;
  const S* image = static_cast<const S*>(a.t.value) + origin;
  Sum* sums = static_cast<Sum*>(a.t.sum) + origin;
  const S* gradient = static_cast<const S*>(a.t.grad_output) + static_cast<int64_t>(lanes.pair) * channels;

  for (int begin = 0; begin < points; begin += shape.chunk) {
    const int count = min(shape.chunk, points - begin);
    __syncwarp();
#pragma unroll 1
    for (int k = lanes.rank; k < count; k += lanes.size) {
      Axis<T> y, x;
      where.axes(a, begin + k, y, x);
      entries[k].axes = {{marked(y.w0, y.s0), marked(y.w1, y.s1), marked(x.w0, x.s0), marked(x.w1, x.s1)}};
      entries[k].pixels = corners(a, y, x);
      weight[begin + k] *= factor;
    }
    __syncwarp();
    for (int first = 0; first < channels; first += lanes.size * N) {
      const int c = first + lanes.rank * N;
      const S* from = image + c;
      Sum* into = sums + first + piece;
      const bool here = c < channels;
      T g[N] = {}, out[N] = {};
      // This lane's pieces inside the group's channels: all where the shape is known.
      const int pieces = !lanes.active ? 0 : L != kAny ? N / W : (channels - first - piece + hop - 1) >> hop_log2;
      if (here) load<N>(gradient + c, g);
#pragma unroll
      for (int i = 0; i < (kSame<Sum, Elsewhere> ? 0 : N / W); ++i) {
        if (i >= pieces) continue;
        T numbers[W];
        load<W>(gradient + first + piece + i * hop, numbers);
#pragma unroll
        for (int w = 0; w < W; ++w) out[i * W + w] = numbers[w];
      }
      if (a.q.center) {  // the samples' share of the output's gradient
        const T rest = T(1) - center_share<S>(a, lanes);
#pragma unroll
        for (int n = 0; n < N; ++n) g[n] *= rest, out[n] *= rest;
      }
      const BackwardPoint<T>* entry = entries;
      T* to_dots = entries->dots.at + mine;
#pragma unroll 1
      for (int k = 0; k < count; ++k, ++entry, to_dots += sizeof(BackwardPoint<T>) / sizeof(T)) {
        const Four<T> axis = entry->axes;
        const Corners pixel = entry->pixels;
        T dot[4] = {};
        if (here) {
          T v[4][N];
#pragma unroll
          for (int i = 0; i < 4; ++i) load<N>(advance(from, pixel.at[i], a.value_unit), v[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) dot[i] += g[n] * v[i][n];
          }
        }
        const T p = weight[begin + k], top = p * axis.at[0], bottom = p * axis.at[1];
        if constexpr (!kSame<Sum, Elsewhere>) {
          // Fixed point, one pixel at a time: its additions would take the registers of a block.
#pragma unroll kSame<Sum, Fixed> ? 1 : 4
          for (int i = 0; i < 4; ++i) {
            const T share = (i < 2 ? top : bottom) * (i % 2 == 0 ? axis.at[2] : axis.at[3]);
            Sum* to = advance(into, entry->pixels.at[i], a.sum_unit);
#pragma unroll
            for (int n = 0; n < N / W; ++n) {
              add<W>(to + n * hop, out + n * W, share, n < pieces && share != T(0), scale);
            }
          }
        }
        add_dots(lanes, dot, first == 0, to_dots);
      }
    }
    __syncwarp();
    S* to_offset = static_cast<S*>(a.t.grad_offset) + lanes.pixel * a.q.grad_offset_stride + (lanes.group * points + begin) * 2;
#pragma unroll 1
    for (int k = lanes.rank; k < count; k += lanes.size) {
      const Four<T> d = entries[k].dots, w = entries[k].axes;
      const PointGradient<T> point =
          point_gradient(d.at[0], d.at[1], d.at[2], d.at[3], weight[begin + k], w.at[0], w.at[1], is_inside(w.at[0]),
                         is_inside(w.at[1]), w.at[2], w.at[3], is_inside(w.at[2]), is_inside(w.at[3]));
      to_weight[begin + k] = point.weight;
      const T pair[2] = {point.loc_w * where.scale, point.loc_h * where.scale};
      if (lanes.active) store_pair(to_offset + k * 2, pair, a.q.grad_offset_stride % 2 == 0);
    }
  }
  __syncwarp();
  T mean = 0;
  if (a.q.activation == kSoftmax || a.q.center) {
#pragma unroll 1
    for (int k = lanes.rank; k < points; k += lanes.size) mean += weight[k] * to_weight[k];
    mean = lanes.sum(mean);
  }
  if (a.q.center) center_gradients<S, kSame<Sum, Elsewhere> ? N : W, Sum>(a, lanes, channels, mean, scale);
  if (!lanes.active) return;
  if (lanes.group == a.by_groups.number - 1) {
    S* to_padding = static_cast<S*>(a.t.grad_padding) + lanes.pixel * a.q.grad_offset_stride;
#pragma unroll 1
    for (int k = lanes.rank; k < a.q.padding; k += lanes.size) narrow(to_padding[k], T(0));
  }
  S* to_mask = static_cast<S*>(a.t.grad_mask) + lanes.pixel * a.q.grad_mask_stride + lanes.group * points;
#pragma unroll 1
  for (int k = lanes.rank; k < points; k += lanes.size) {
    narrow(to_mask[k], logit_gradient(a.q.activation, weight[k], to_weight[k], mean));
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
