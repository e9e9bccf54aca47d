// Backward on a CPU, for one instruction set. One call does the groups [first_group, last_group) of one image, so that
// threads write apart, and each group's sum is taken in pixel order: the same bits for any number of threads.
// Here the value is contiguous, so that its gradient has the same places.

// For one point and B vectors of L channels: the products of the output's gradient with the four pixels,
// summed over channels, and its spread onto the four pixels' gradients.
template <int L, int B, typename S, typename T>
DCNV3_HD Vec<T, 4> scatter(const S* image, T* sum, const int64_t (&at)[4], const T (&w)[4], const Vec<T, L>* grad) {
  Vec<T, L> d[4] = {};
#pragma GCC unroll 4
  for (int corner = 0; corner < 4; ++corner) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) d[corner] += grad[b] * load<L>(image + at[corner] + b * L);
  }
#pragma GCC unroll 4
  for (int corner = 0; corner < 4; ++corner) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      T* to = sum + at[corner] + b * L;
      store<L, T>(to, load<L>(to) + grad[b] * w[corner]);
    }
  }
  return across<Plus, T>(d[0], d[1], d[2], d[3]);
}

template <int L, typename S>
DCNV3_HD void write_row(S* to, const Compute<S>* from, int64_t count) {
  int64_t k = 0;
  for (; k + L <= count; k += L) store<L, S>(to + k, load<L>(from + k));
  for (; k < count; ++k) narrow(to + k, from[k]);
}

// What the gradients of one pixel's points are computed in.
template <typename T>
struct Scratch {
  T* dots;               // of each point, the products with its four pixels
  T *weight, *product;   // the gradient of each point's weight, and that times the weight
  T *offset, *mask;      // the results, before they are narrowed; the mask's a vector longer
  T *share, *center;     // of each group, with a centre: its share, and the product of the gradient with it
};

// One group's centre: its share of the output's gradient goes to the value's, and the product of the rest of the output's
// gradient with the centre is returned.
template <int L, typename S, typename T>
DCNV3_HD T scatter_center(const S* grad_output, const S* center, T share, int64_t channels, T* sum) {
  T product = 0;
  Vec<T, L> products = {};
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    const Vec<T, L> grad = load<L>(grad_output + c);
    products += grad * load<L>(center + c);
    store<L, T>(sum + c, load<L>(sum + c) + grad * share);
  }
  for (int i = 0; i < L; ++i) product += products[i];
  for (; c < channels; ++c) {
    const T grad = widen(grad_output[c]);
    product += grad * widen(center[c]);
    sum[c] += grad * share;
  }
  return product * (1 - share);
}

// Write the gradients of one pixel's offsets and logits from the points' products with the four pixels, and those of its
// centre's logits: with o the samples' sum and g the gradient, s (1 - s) (g . x - g . o), whose two products are at hand,
// times 1 - s already.
template <typename S, typename P, typename T>
void write_point_gradients(const PackedProblem& q, const P& points, const Scratch<T>& s, S* grad_offset, S* grad_mask,
                           S* grad_center) {
  constexpr int L = P::L;
  using V = Vec<T, L>;
  const T scale = T(q.offset_scale);
  for (int64_t k = 0; k < points.padded; k += L) {
    const V a = load<L>(s.dots + 4 * k), b = load<L>(s.dots + 4 * k + L);
    const V c = load<L>(s.dots + 4 * k + 2 * L), d = load<L>(s.dots + 4 * k + 3 * L), p = load<L>(points.p + k);
    const V even_ab = even(a, b), even_cd = even(c, d), odd_ab = odd(a, b), odd_cd = odd(c, d);
    const auto g = point_gradient(
        even(even_ab, even_cd), even(odd_ab, odd_cd), odd(even_ab, even_cd), odd(odd_ab, odd_cd), p,
        load<L>(points.hw0 + k), load<L>(points.hw1 + k), load<L>(points.hs0 + k), load<L>(points.hs1 + k),
        load<L>(points.ww0 + k), load<L>(points.ww1 + k), load<L>(points.ws0 + k), load<L>(points.ws1 + k));
    store<L, T>(s.weight + k, g.weight);
    store<L, T>(s.product + k, g.weight * p);
    store<L, T>(s.offset + 2 * k, first_half(g.loc_w * scale, g.loc_h * scale));
    store<L, T>(s.offset + 2 * k + L, second_half(g.loc_w * scale, g.loc_h * scale));
  }
  write_row<L>(grad_offset, s.offset, 2 * points.count);
  // Four groups at a time, as in Points; a group's last vector is written past its end, before the next group is.
  for (int64_t group = 0; group < points.groups; group += 4) {
    int64_t first[4];
    for (int i = 0; i < 4; ++i) first[i] = (group + i < points.groups ? group + i : points.groups - 1) * points.points;
    V sum[4] = {};
    for (int64_t k = 0; k < points.points; k += L) {
      const auto counts = P::counted(points.points - k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += choose(counts, load<L>(s.product + first[i] + k), as<V>(0));
    }
    const Vec<T, 4> mean = across<Plus, T>(sum[0], sum[1], sum[2], sum[3]);
    if (q.center) {
      for (int i = 0; i < 4 && group + i < points.groups; ++i) {
        narrow(grad_center + group + i, s.share[group + i] * (s.center[group + i] - mean[i]));
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int64_t k = first[i]; k < first[i] + points.points; k += L) {
        store<L, T>(s.mask + k, logit_gradient(q.activation, load<L>(points.p + k), load<L>(s.weight + k), as<V>(mean[i])));
      }
    }
  }
  write_row<L>(grad_mask, s.mask, points.count);
}

template <typename S, int CP>
void backward(const PackedProblem& q, const PackedTensors& t, int64_t image, int64_t first_group, int64_t last_group) {
  using T = Compute<S>;
  constexpr int L = kLanesOf<T, CP>;
  constexpr int B = CP == 0 ? 1 : CP / L;
  const int64_t channels = CP == 0 ? q.group_channels : CP, groups = last_group - first_group, step = late_step<CP>(q);
  const int64_t all = q.channels(), width = groups * channels, area = q.height * q.width;

  using P = Points<S, true>;
  P points(q, groups, early_step<CP>(q));
  const int64_t right = points.right * step, down = points.down * step;
  const int64_t room = points.padded + P::L;
  Arena arena((9 * room + 2 * (groups + P::L)) * sizeof(T));
  Scratch<T> scratch;
  scratch.dots = arena.take<T>(4 * room);
  scratch.offset = arena.take<T>(2 * room);
  for (T** array : {&scratch.weight, &scratch.product, &scratch.mask}) *array = arena.take<T>(room);
  T* const dots = scratch.dots;
  for (T** array : {&scratch.share, &scratch.center}) *array = arena.take<T>(groups + P::L);

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
    if (q.center) {
      points.shares(static_cast<const S*>(t.center) + pixel * q.center_stride + first_group, q.batch * q.pixels() - 1 - pixel,
                    scratch.share);
      for (int64_t g = 0; g < groups; ++g) {
        scratch.center[g] = scatter_center<L>(grad_output + g * channels, value + place * all + g * channels,
                                              scratch.share[g], channels, sum + place * all + g * channels);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const S *from = value + g * channels, *grad_from = grad_output + g * channels;
      T* to = sum + g * channels;
      const T kept = 1 - scratch.share[g];  // of the gradient: all of it without a centre, whose shares are then zeros
      int64_t c = 0;
      for (; c + L * B <= channels; c += L * B) {
        Vec<T, L> grad[B];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) grad[b] = load<L>(grad_from + c + b * L) * kept;
        for (int64_t k = g * q.points; k < (g + 1) * q.points; ++k) {
          const int64_t at = points.corner[k] * step + c;
          const int64_t corners[4] = {at, at + right, at + down, at + down + right};
          const T w[4] = {points.w00[k], points.w01[k], points.w10[k], points.w11[k]};
          const Vec<T, 4> d = scatter<L, B, S, T>(from, to, corners, w, grad);
          store<4, T>(dots + 4 * k, (CP == 0 && c > 0) ? load<4>(dots + 4 * k) + d : d);
        }
      }
      for (; c < channels; ++c) {
        const T grad = widen(grad_from[c]) * kept;
        for (int64_t k = g * q.points; k < (g + 1) * q.points; ++k) {
          const int64_t at = points.corner[k] * step + c;
          const int64_t corners[4] = {at, at + right, at + down, at + down + right};
          const T w[4] = {points.w00[k], points.w01[k], points.w10[k], points.w11[k]};
          for (int i = 0; i < 4; ++i) {
            const T product = grad * widen(from[corners[i]]);
            dots[4 * k + i] = c == 0 ? product : dots[4 * k + i] + product;
            to[corners[i]] += grad * w[i];
          }
        }
      }
    }
    write_point_gradients<S>(q, points, scratch,
                             static_cast<S*>(t.grad_offset) + pixel * q.grad_offset_stride + 2 * first_point,
                             static_cast<S*>(t.grad_mask) + pixel * q.grad_mask_stride + first_point,
                             static_cast<S*>(t.grad_center) + pixel * q.grad_center_stride + first_group);
    if (last_group == q.groups && q.padding != 0) {
      __builtin_memset(static_cast<S*>(t.grad_padding) + pixel * q.grad_offset_stride, 0, q.padding * sizeof(S));
    }
  }

  if constexpr (!std::is_same_v<S, T>) {
    S* to = static_cast<S*>(t.grad_value) + corner;
    for (int64_t i = 0; i < area; ++i) {
      for (int64_t c = 0; c < width; ++c) narrow(to + i * all + c, sum[i * all + c]);
    }
  }
}
