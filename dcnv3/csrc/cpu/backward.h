// Backward on a CPU, for one instruction set. One call does the groups [first_group, last_group) of one image, so that
// threads write apart, and each group's sum is taken in pixel order: the same bits for any number of threads.
// Here the value is contiguous, so that its gradient has the same places.

// For one point of weight p and B vectors of L channels: the products of the output's gradient with the four pixels,
// summed over channels, and its spread onto the four pixels' gradients.
template <int L, int B, typename S, typename T>
DCNV3_HD Vec<T, 4> scatter(const S* image, T* sum, const int64_t (&at)[4], const T (&w)[4], T p, const Vec<T, L>* grad) {
  Vec<T, L> d[4] = {};
#pragma GCC unroll 4
  for (int corner = 0; corner < 4; ++corner) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) d[corner] += grad[b] * load<L>(image + at[corner] + b * L);
  }
#pragma GCC unroll 4
  for (int corner = 0; corner < 4; ++corner) {
    const T weight = w[corner] * p;
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      T* to = sum + at[corner] + b * L;
      store<L, T>(to, load<L>(to) + grad[b] * weight);
    }
  }
  return sums<T>(d[0], d[1], d[2], d[3]);
}

// Write the gradients of one pixel's offsets and logits from the points' products with the four pixels, dots[corner][k].
template <typename S, typename P, typename T>
void write_point_gradients(const Problem& q, const P& points, const T* const (&dots)[4], T* weight, T* loc_h, T* loc_w,
                           S* grad_offset, S* grad_mask) {
  constexpr int L = P::L;
  const T scale = T(q.offset_scale);
  for (int64_t k = 0; k < points.padded; k += L) {
    const auto g = point_gradient(
        load<L>(dots[0] + k), load<L>(dots[1] + k), load<L>(dots[2] + k), load<L>(dots[3] + k), load<L>(points.p + k),
        load<L>(points.hw0 + k), load<L>(points.hw1 + k), load<L>(points.hs0 + k), load<L>(points.hs1 + k),
        load<L>(points.ww0 + k), load<L>(points.ww1 + k), load<L>(points.ws0 + k), load<L>(points.ws1 + k));
    store<L, T>(weight + k, g.weight);
    store<L, T>(loc_h + k, g.loc_h * scale);
    store<L, T>(loc_w + k, g.loc_w * scale);
  }
  for (int64_t k = 0; k < points.count; ++k) {
    narrow(grad_offset + 2 * k, loc_w[k]);
    narrow(grad_offset + 2 * k + 1, loc_h[k]);
  }
  for (int64_t first = 0; first < points.count; first += points.points) {
    T mean = 0;
    for (int64_t k = first; k < first + points.points; ++k) mean += points.p[k] * weight[k];
    for (int64_t k = first; k < first + points.points; ++k) {
      narrow(grad_mask + k, logit_gradient(q.activation, points.p[k], weight[k], mean));
    }
  }
}

template <typename S, int CP>
void backward(const Problem& q, const Tensors& t, int64_t image, int64_t first_group, int64_t last_group) {
  using T = Compute<S>;
  constexpr int L = kLanesOf<T, CP>;
  constexpr int B = CP == 0 ? 1 : CP / L;
  const int64_t channels = CP == 0 ? q.group_channels : CP, groups = last_group - first_group, step = late_step<CP>(q);
  const int64_t all = q.channels(), width = groups * channels, area = q.height * q.width;

  Points<S, true> points(q, groups, early_step<CP>(q));
  Arena arena(7 * points.padded * sizeof(T));
  T* const dots[4] = {arena.take<T>(points.padded), arena.take<T>(points.padded), arena.take<T>(points.padded),
                      arena.take<T>(points.padded)};
  const T* const done[4] = {dots[0], dots[1], dots[2], dots[3]};
  T *weight = arena.take<T>(points.padded), *loc_h = arena.take<T>(points.padded), *loc_w = arena.take<T>(points.padded);

  const int64_t places = groups * q.points * int64_t(sizeof(S)), lead = image_lead(q), ahead = page_lead(2 * places);
  const int64_t corner = image * area * all + first_group * channels;  // the first element of these groups
  const S* value = static_cast<const S*>(t.value) + corner;
  T* sum = static_cast<T*>(t.sum) + corner;
  for (int64_t i = 0; i < area; ++i) __builtin_memset(sum + i * all, 0, width * sizeof(T));

  for (int64_t place = 0; place < q.pixels(); ++place) {
    const int64_t pixel = image * q.pixels() + place, first_point = first_group * q.points;
    points.prepare(place / q.out_width, place % q.out_width,
                   static_cast<const S*>(t.offset) + pixel * q.offset_stride + 2 * first_point,
                   static_cast<const S*>(t.mask) + pixel * q.mask_stride + first_point, q.batch * q.pixels() - 1 - pixel);
    const int64_t next = (lead + place * q.stride_h) * all;
    prefetch<false>(value + next, width * int64_t(sizeof(S)));
    prefetch<true>(sum + next, width * int64_t(sizeof(T)));
    prefetch<false>(static_cast<const S*>(t.offset) + (pixel + ahead) * q.offset_stride + 2 * first_point, places * 2);
    prefetch<false>(static_cast<const S*>(t.mask) + (pixel + ahead) * q.mask_stride + first_point, places);
    const S* grad_output = static_cast<const S*>(t.grad_output) + pixel * all + first_group * channels;
    for (int64_t g = 0; g < groups; ++g) {
      const S *from = value + g * channels, *grad_from = grad_output + g * channels;
      T* to = sum + g * channels;
      int64_t c = 0;
      for (; c + L * B <= channels; c += L * B) {
        Vec<T, L> grad[B];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) grad[b] = load<L>(grad_from + c + b * L);
        for (int64_t k = g * q.points; k < (g + 1) * q.points; ++k) {
          const int64_t at[4] = {points.i00[k] * step + c, points.i01[k] * step + c, points.i10[k] * step + c,
                                 points.i11[k] * step + c};
          const T w[4] = {points.w00[k], points.w01[k], points.w10[k], points.w11[k]};
          const Vec<T, 4> d = scatter<L, B, S, T>(from, to, at, w, points.p[k], grad);
          for (int i = 0; i < 4; ++i) dots[i][k] = (CP == 0 && c > 0) ? dots[i][k] + d[i] : d[i];
        }
      }
      for (; c < channels; ++c) {
        const T grad = widen(grad_from[c]);
        for (int64_t k = g * q.points; k < (g + 1) * q.points; ++k) {
          const int64_t at[4] = {points.i00[k] * step + c, points.i01[k] * step + c, points.i10[k] * step + c,
                                 points.i11[k] * step + c};
          const T w[4] = {points.w00[k], points.w01[k], points.w10[k], points.w11[k]};
          for (int i = 0; i < 4; ++i) {
            const T product = grad * widen(from[at[i]]);
            dots[i][k] = c == 0 ? product : dots[i][k] + product;
            to[at[i]] += grad * (w[i] * points.p[k]);
          }
        }
      }
    }
    write_point_gradients<S>(q, points, done, weight, loc_h, loc_w,
                             static_cast<S*>(t.grad_offset) + (pixel * q.groups * q.points + first_point) * 2,
                             static_cast<S*>(t.grad_mask) + pixel * q.groups * q.points + first_point);
  }

  if constexpr (!std::is_same_v<S, T>) {
    S* to = static_cast<S*>(t.grad_value) + corner;
    for (int64_t i = 0; i < area; ++i) {
      for (int64_t c = 0; c < width; ++c) narrow(to + i * all + c, sum[i * all + c]);
    }
  }
}
