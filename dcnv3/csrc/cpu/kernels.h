// Forward on a CPU, for one instruction set. This file and those it includes are compiled once per instruction set, inside
// a namespace each (isa_*.cpp, so no include guards); DCNV3_VECTOR_BYTES is the width of its registers. Channels lie side
// by side in memory: they are the vector.

#include "../sampling.h"
#include "vector.h"
#include "points.h"

// Channels in a vector: a register, or all there are when that is fewer. CP is C', 0 for "read it from the problem".
template <typename T, int CP>
constexpr int kLanesOf = (CP != 0 && CP < int(DCNV3_VECTOR_BYTES / sizeof(T))) ? CP : int(DCNV3_VECTOR_BYTES / sizeof(T));

// What a pixel's number is multiplied by: in Points where C' is fixed (with_channels checks that it fits), else on use.
template <int CP>
DCNV3_HD int64_t early_step(const PackedProblem& q) {
  return CP == 0 ? 1 : q.value_stride;
}
template <int CP>
DCNV3_HD int64_t late_step(const PackedProblem& q) {
  return CP == 0 ? q.value_stride : 1;
}

// What is asked for ahead of time, because the processor does not foresee it: scattered reads hide the rows of the image,
// and one pixel's offsets span pages. Addresses past a tensor's end are asked for too, which does no harm.
template <bool kWrite>
DCNV3_HD void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, kWrite ? 1 : 0, 2);
}
// Pixels ahead: in the image the rows that a kernel spans and its offsets' first pixels; in the rest about a page.
DCNV3_HD int64_t image_lead(const PackedProblem& q) { return (q.dilation_h * (q.kernel_h - 1) - q.padding_h + 2) * q.width; }
DCNV3_HD int64_t page_lead(int64_t bytes) { return 4096 / bytes + 1; }

// Sum over the points of weight * share * pixel, for B vectors of L channels. The four pixels are summed apart: no product
// waits for the one before it.
template <int L, int B, typename S, typename P>
DCNV3_HD void gather(const S* image, const P& points, int64_t first, int64_t last, int64_t step, S* to) {
  const S *v00 = image, *v01 = v00 + points.right * step, *v10 = v00 + points.down * step, *v11 = v10 + points.right * step;
  Vec<Compute<S>, L> s00[B] = {}, s01[B] = {}, s10[B] = {}, s11[B] = {};
  for (int64_t k = first; k < last; ++k) {
    const int64_t at = points.corner[k] * step;
    const Compute<S> w00 = points.w00[k], w01 = points.w01[k], w10 = points.w10[k], w11 = points.w11[k];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      s00[b] += load<L>(v00 + at + b * L) * w00;
      s01[b] += load<L>(v01 + at + b * L) * w01;
      s10[b] += load<L>(v10 + at + b * L) * w10;
      s11[b] += load<L>(v11 + at + b * L) * w11;
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) store<L, S>(to + b * L, (s00[b] + s01[b]) + (s10[b] + s11[b]));
}

// The centre mixed into one group of a pixel: to = to + share * (center - to).
template <int L, typename S, typename T>
DCNV3_HD void mix(const S* center, T share, int64_t channels, S* to) {
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    const Vec<T, L> sampled = load<L>(to + c);
    store<L, S>(to + c, sampled + (load<L>(center + c) - sampled) * share);
  }
  for (; c < channels; ++c) {
    const T sampled = widen(to[c]);
    narrow(to + c, sampled + (widen(center[c]) - sampled) * share);
  }
}

template <typename S, int CP>
void forward(const PackedProblem& q, const PackedTensors& t, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int L = kLanesOf<T, CP>;
  constexpr int B = CP == 0 ? 1 : (CP / L < 4 ? CP / L : 4);
  const int64_t channels = CP == 0 ? q.group_channels : CP, step = late_step<CP>(q);
  Points<S, false> points(q, q.groups, early_step<CP>(q));
  Arena arena((q.groups + points.L) * sizeof(T));
  T* const share = arena.take<T>(q.groups + points.L);
  const int64_t pixels = q.batch * q.pixels(), places = q.groups * q.points * int64_t(sizeof(S));
  const int64_t lead = image_lead(q), ahead = page_lead(2 * places);
  int64_t image = begin / q.pixels(), h = begin % q.pixels() / q.out_width, w = begin % q.out_width;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    points.prepare(h, w, static_cast<const S*>(t.offset) + pixel * q.offset_stride,
                   static_cast<const S*>(t.mask) + pixel * q.mask_stride, pixels - 1 - pixel);
    const S* from = static_cast<const S*>(t.value) + image * q.height * q.width * q.value_stride;
    S* to = static_cast<S*>(t.output) + pixel * q.channels();
    prefetch<false>(from + (lead + (h * q.width + w) * q.stride_h) * q.value_stride, q.channels() * int64_t(sizeof(S)));
    prefetch<false>(static_cast<const S*>(t.offset) + (pixel + ahead) * q.offset_stride, places * 2);
    prefetch<false>(static_cast<const S*>(t.mask) + (pixel + ahead) * q.mask_stride, places);
    if (q.center) points.shares(static_cast<const S*>(t.center) + pixel * q.center_stride, pixels - 1 - pixel, share);
    const int64_t middle = (h * q.width + w) * q.value_stride;
    for (int64_t g = 0; g < q.groups; ++g, from += channels, to += channels) {
      const int64_t first = g * q.points, last = first + q.points;
      int64_t c = 0;
      for (; c + L * B <= channels; c += L * B) gather<L, B, S>(from + c, points, first, last, step, to + c);
      for (; c < channels; ++c) {
        T sum = 0;
        for (int64_t k = first; k < last; ++k) {
          const S* pixel = from + points.corner[k] * step + c;
          sum += points.w00[k] * widen(pixel[0]) + points.w01[k] * widen(pixel[points.right * step]) +
                 points.w10[k] * widen(pixel[points.down * step]) +
                 points.w11[k] * widen(pixel[(points.down + points.right) * step]);
        }
        narrow(to + c, sum);
      }
      if (q.center) mix<L>(from + middle, share[g], channels, to);
    }
    if (++w == q.out_width) {
      w = 0;
      if (++h == q.out_height) h = 0, ++image;
    }
  }
}

#include "backward.h"
#include "norm.h"

// Calls f(S{}, C') for the problem's channels: the fast sizes, or the general kernel.
template <typename S, typename F>
void with_channels(const PackedProblem& q, const F& f) {
  const bool fits = q.height * q.width * q.value_stride < (int64_t(1) << 31);
  switch (fits ? q.group_channels : 0) {
    case 8: return f(S{}, std::integral_constant<int, 8>{});
    case 16: return f(S{}, std::integral_constant<int, 16>{});
    case 32: return f(S{}, std::integral_constant<int, 32>{});
    case 64: return f(S{}, std::integral_constant<int, 64>{});
    default: return f(S{}, std::integral_constant<int, 0>{});
  }
}

template <typename F>
void with_type(Type type, const PackedProblem& q, const F& f) {
  switch (type) {
    case Type::kDouble: return with_channels<double>(q, f);
    case Type::kFloat: return with_channels<float>(q, f);
    case Type::kBFloat16: return with_channels<BFloat16>(q, f);
    case Type::kHalf: return with_channels<Half>(q, f);
  }
}

inline void run_forward(Type type, const PackedProblem& q, const PackedTensors& t, int64_t begin, int64_t end) {
  with_type(type, q, [&](auto s, auto channels) { forward<decltype(s), channels.value>(q, t, begin, end); });
}
inline void run_backward(Type type, const PackedProblem& q, const PackedTensors& t, int64_t image, int64_t first, int64_t last) {
  with_type(type, q, [&](auto s, auto channels) { backward<decltype(s), channels.value>(q, t, image, first, last); });
}
