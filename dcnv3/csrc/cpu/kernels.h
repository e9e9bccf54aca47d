// Forward and backward on a CPU, for one instruction set. Included once per instruction set, inside its own namespace:
// DCNV3_VECTOR_BYTES is the width of its registers. Channels lie side by side in memory, so they are the vector.

constexpr int kWide = DCNV3_VECTOR_BYTES / 4;  // floats of a register

#include "vector.h"
#include "points.h"

// Channels in a vector: a register, or all there are when that is fewer. `CP` is C', 0 for "read it from the problem".
template <typename T, int CP>
constexpr int kLanesOf = (CP != 0 && CP < int(DCNV3_VECTOR_BYTES / sizeof(T))) ? CP : int(DCNV3_VECTOR_BYTES / sizeof(T));

// Sum over the points of weight * pixel for B vectors of L channels. Two running sums halve the chain of additions.
template <int L, int B, typename S, typename P>
DCNV3_HD void gather(const S* image, const P& points, int64_t first, int64_t last, const Compute<S>* const w[4], S* to) {
  using V = Vec<Compute<S>, L>;
  V top[B] = {}, bottom[B] = {};
  for (int64_t k = first; k < last; ++k) {
    const S *v00 = image + points.i00[k], *v01 = image + points.i01[k];
    const S *v10 = image + points.i10[k], *v11 = image + points.i11[k];
    const Compute<S> w00 = w[0][k], w01 = w[1][k], w10 = w[2][k], w11 = w[3][k];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      top[b] += load<L>(v00 + b * L) * w00;
      bottom[b] += load<L>(v10 + b * L) * w10;
      top[b] += load<L>(v01 + b * L) * w01;
      bottom[b] += load<L>(v11 + b * L) * w11;
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) store<L, S>(to + b * L, top[b] + bottom[b]);
}

template <typename S, int CP>
void forward(const Problem& q, const Tensors& t, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int L = kLanesOf<T, CP>;
  constexpr int B = CP == 0 ? 1 : (CP / L < 4 ? CP / L : 4);
  using Index = std::conditional_t<CP == 0, int64_t, int32_t>;
  const int64_t channels = CP == 0 ? q.group_channels : CP;
  Points<S, Index> points(q, q.groups);
  Arena arena(4 * Arena::bytes(points.padded, sizeof(T)));
  T* __restrict w00 = arena.take<T>(points.padded);
  T* __restrict w01 = arena.take<T>(points.padded);
  T* __restrict w10 = arena.take<T>(points.padded);
  T* __restrict w11 = arena.take<T>(points.padded);
  const T* const w[4] = {w00, w01, w10, w11};

  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t image = pixel / q.pixels(), place = pixel % q.pixels();
    points.prepare(place / q.out_width, place % q.out_width,
                   static_cast<const S*>(t.offset) + pixel * q.offset_stride,
                   static_cast<const S*>(t.mask) + pixel * q.mask_stride);
    for (int64_t k = 0; k < points.padded; ++k) {
      const T top = points.p[k] * points.hw0[k], bottom = points.p[k] * points.hw1[k];
      w00[k] = top * points.ww0[k], w01[k] = top * points.ww1[k];
      w10[k] = bottom * points.ww0[k], w11[k] = bottom * points.ww1[k];
    }
    const S* from = static_cast<const S*>(t.value) + image * q.height * q.width * q.value_stride;
    S* to = static_cast<S*>(t.output) + pixel * q.channels();
    for (int64_t g = 0; g < q.groups; ++g, from += channels, to += channels) {
      const int64_t first = g * q.points, last = first + q.points;
      int64_t c = 0;
      for (; c + L * B <= channels; c += L * B) gather<L, B, S>(from + c, points, first, last, w, to + c);
      for (; c < channels; ++c) {
        T sum = 0;
        for (int64_t k = first; k < last; ++k) {
          sum += w00[k] * widen(from[points.i00[k] + c]) + w01[k] * widen(from[points.i01[k] + c]) +
                 w10[k] * widen(from[points.i10[k] + c]) + w11[k] * widen(from[points.i11[k] + c]);
        }
        narrow(to + c, sum);
      }
    }
  }
}

#include "backward.h"

// Calls `f.template operator()<S, CP>()` for the problem's type and channels: the fast sizes, or the general kernel.
template <typename S, typename F>
void with_channels(const Problem& q, const F& f) {
  const bool small = q.height * q.width * q.value_stride < (int64_t(1) << 31);
  switch (small ? q.group_channels : 0) {
    case 8: return f(S{}, std::integral_constant<int, 8>{});
    case 16: return f(S{}, std::integral_constant<int, 16>{});
    case 32: return f(S{}, std::integral_constant<int, 32>{});
    case 64: return f(S{}, std::integral_constant<int, 64>{});
    default: return f(S{}, std::integral_constant<int, 0>{});
  }
}

template <typename F>
void with_type(Type type, const Problem& q, const F& f) {
  switch (type) {
    case Type::kDouble: return with_channels<double>(q, f);
    case Type::kFloat: return with_channels<float>(q, f);
    case Type::kBFloat16: return with_channels<BFloat16>(q, f);
    case Type::kHalf: return with_channels<Half>(q, f);
  }
}

inline void run_forward(Type type, const Problem& q, const Tensors& t, int64_t begin, int64_t end) {
  with_type(type, q, [&](auto s, auto channels) { forward<decltype(s), channels.value>(q, t, begin, end); });
}
inline void run_backward(Type type, const Problem& q, const Tensors& t, int64_t image, int64_t first, int64_t last) {
  with_type(type, q, [&](auto s, auto channels) { backward<decltype(s), channels.value>(q, t, image, first, last); });
}
