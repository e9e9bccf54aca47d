// Backward on a CPU, for one instruction set. One call does the groups [first_group, last_group) of one image, so that
// threads write apart, and each group's sum is taken in pixel order: the same bits for any number of threads.
// Here the value is contiguous, so that its gradient has the same places.

// For one point and B vectors of L channels: the products of the output's gradient with the four pixels, summed over
// channels, and its spread onto the four pixels' gradients.
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
  return sums<T>(d[0], d[1], d[2], d[3]);
}

// Write the gradients of one pixel's offsets and logits from the points' products `dots` [4, padded].
template <typename S, typename P, typename T>
void write_point_gradients(const Problem& q, const P& points, const T* __restrict dots, T* __restrict weight,
                           T* __restrict loc_h, T* __restrict loc_w, S* grad_offset, S* grad_mask) {
  const T scale = T(q.offset_scale);
  const T *__restrict p = points.p;
  const T *__restrict hw0 = points.hw0, *__restrict hw1 = points.hw1, *__restrict hs0 = points.hs0;
  const T *__restrict hs1 = points.hs1, *__restrict ww0 = points.ww0, *__restrict ww1 = points.ww1;
  const T *__restrict ws0 = points.ws0, *__restrict ws1 = points.ws1;
  for (int64_t k = 0; k < points.padded; ++k) {
    const PointGradient<T> g =
        point_gradient(dots[4 * k], dots[4 * k + 1], dots[4 * k + 2], dots[4 * k + 3], p[k], hw0[k], hw1[k], hs0[k],
                       hs1[k], ww0[k], ww1[k], ws0[k], ws1[k]);
    weight[k] = g.weight;
    loc_h[k] = g.loc_h * scale;
    loc_w[k] = g.loc_w * scale;
  }
  for (int64_t k = 0; k < points.count; ++k) {
    narrow(grad_offset + 2 * k, loc_w[k]);
    narrow(grad_offset + 2 * k + 1, loc_h[k]);
  }
  for (int64_t first = 0; first < points.count; first += points.points) {
    T mean = 0;
    for (int64_t k = first; k < first + points.points; ++k) mean += p[k] * weight[k];
    for (int64_t k = first; k < first + points.points; ++k) {
      narrow(grad_mask + k, logit_gradient(q.activation, p[k], weight[k], mean));
    }
  }
}

template <typename S, int CP>
void backward(const Problem& q, const Tensors& t, int64_t image, int64_t first_group, int64_t last_group) {
  using T = Compute<S>;
  constexpr int L = kLanesOf<T, CP>;
  constexpr int B = CP == 0 ? 1 : CP / L;
  using Index = std::conditional_t<CP == 0, int64_t, int32_t>;
  const int64_t channels = CP == 0 ? q.group_channels : CP, groups = last_group - first_group;
  const int64_t all = q.channels(), width = groups * channels, area = q.height * q.width;

  Points<S, Index> points(q, groups);
  Arena arena(11 * Arena::bytes(points.padded, sizeof(T)));
  T* dots = arena.take<T>(4 * points.padded);
  T *weight = arena.take<T>(points.padded), *loc_h = arena.take<T>(points.padded), *loc_w = arena.take<T>(points.padded);
  T* __restrict w00 = arena.take<T>(points.padded);
  T* __restrict w01 = arena.take<T>(points.padded);
  T* __restrict w10 = arena.take<T>(points.padded);
  T* __restrict w11 = arena.take<T>(points.padded);

  const int64_t corner = image * area * all + first_group * channels;  // the first element of these groups
  const S* value = static_cast<const S*>(t.value) + corner;
  T* sum = static_cast<T*>(t.sum) + corner;
  for (int64_t i = 0; i < area; ++i) __builtin_memset(sum + i * all, 0, width * sizeof(T));

  for (int64_t place = 0; place < q.pixels(); ++place) {
    const int64_t pixel = image * q.pixels() + place, first_point = first_group * q.points;
    points.prepare(place / q.out_width, place % q.out_width,
                   static_cast<const S*>(t.offset) + pixel * q.offset_stride + 2 * first_point,
                   static_cast<const S*>(t.mask) + pixel * q.mask_stride + first_point);
    for (int64_t k = 0; k < points.padded; ++k) {
      const T top = points.p[k] * points.hw0[k], bottom = points.p[k] * points.hw1[k];
      w00[k] = top * points.ww0[k], w01[k] = top * points.ww1[k];
      w10[k] = bottom * points.ww0[k], w11[k] = bottom * points.ww1[k];
    }
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
          const int64_t at[4] = {points.i00[k] + c, points.i01[k] + c, points.i10[k] + c, points.i11[k] + c};
          const T w[4] = {w00[k], w01[k], w10[k], w11[k]};
          Vec<T, 4> d = scatter<L, B, S, T>(from, to, at, w, grad);
          if (CP == 0 && c > 0) d += load<4>(dots + 4 * k);
          store<4, T>(dots + 4 * k, d);
        }
      }
      for (; c < channels; ++c) {
        const T grad = widen(grad_from[c]);
        for (int64_t k = g * q.points; k < (g + 1) * q.points; ++k) {
          const int64_t at[4] = {points.i00[k] + c, points.i01[k] + c, points.i10[k] + c, points.i11[k] + c};
          const T w[4] = {w00[k], w01[k], w10[k], w11[k]};
          for (int i = 0; i < 4; ++i) {
            const T product = grad * widen(from[at[i]]);
            dots[4 * k + i] = c == 0 ? product : dots[4 * k + i] + product;
            to[at[i]] += grad * w[i];
          }
        }
      }
    }
    write_point_gradients<S>(q, points, dots, weight, loc_h, loc_w,
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
