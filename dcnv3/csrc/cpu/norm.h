// LayerNorm over the last dimension, with GELU or without, and GELU alone. Included once per instruction set, by kernels.h.

// 2^x in every lane, to 1e-7 of it. NaN stays NaN; x is between -126 and 127.
DCNV3_HD Floats power_of_two(Floats x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  const Floats shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  Floats y = r * 1.32765e-3f + 9.67554e-3f;
  y = y * r + 5.550713e-2f;
  y = y * r + 2.402212e-1f;
  y = y * r + 6.9314697e-1f;
  y = y * r + 1.00000007f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + (reinterpret_cast<Ints>(shifted) << 23));
}

// The standard normal distribution: the share below x, and the density at x. log2 of the share below -z, z >= 0, is close to
// a parabola: a polynomial of degree 8, fitted such that GELU is within 1e-8 of its value before rounding. From z = 10 on,
// where it is -109, the share does not count.
DCNV3_HD Floats share_below(Floats x) {
  const Floats z = at_most(reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff), Floats{} + 10.0f);
  Floats p = z * -1.99189660e-6f + 2.92719703e-5f;
  p = p * z - 1.38088054e-4f;
  p = p * z - 2.53437097e-4f;
  p = p * z + 7.21639074e-3f;
  p = p * z - 5.26030507e-2f;
  p = p * z - 4.59172217e-1f;
  p = p * z - 1.15110973f;
  p = p * z - 0.999999903f;
  const Floats outside = power_of_two(p);
  return choose(x > 0.0f, 1.0f - outside, outside);
}
DCNV3_HD Floats density(Floats x) {
  return power_of_two(at_least(x * x * -0.721347520f - 1.32574806f, Floats{} - 126.0f));
}
DCNV3_HD Doubles share_below(Doubles x) {
  for (int i = 0; i < int(DCNV3_VECTOR_BYTES / 8); ++i) x[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return x;
}
DCNV3_HD Doubles density(Doubles x) {
  for (int i = 0; i < int(DCNV3_VECTOR_BYTES / 8); ++i) x[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * x[i] * x[i]);
  return x;
}
template <typename V>
DCNV3_HD V gelu_of(V x) {
  return x * share_below(x);
}
template <typename V>
DCNV3_HD V gelu_slope(V x) {
  return share_below(x) + x * density(x);
}

// The first `count` of L elements, and zeros.
template <int L, typename S>
DCNV3_HD Vec<Compute<S>, L> load_first(const S* from, int64_t count) {
  if (count >= L) return load<L>(from);
  S some[L] = {};
  __builtin_memcpy(some, from, count * sizeof(S));
  return load<L>(static_cast<const S*>(some));
}
template <int L, typename S>
DCNV3_HD void store_first(S* to, int64_t count, Vec<Compute<S>, L> x) {
  if (count >= L) return store<L, S>(to, x);
  S some[L];
  store<L, S>(some, x);
  __builtin_memcpy(to, some, count * sizeof(S));
}
// `x` with zeros from lane `count` on.
template <int L, typename T>
DCNV3_HD Vec<T, L> keep_first(Vec<T, L> x, int64_t count) {
  for (int64_t i = count; i < L; ++i) x[i] = 0;
  return x;
}
template <int L, typename T>
DCNV3_HD T total(Vec<T, L> x) {
  if constexpr (L == 2) {
    return x[0] + x[1];
  } else {
    Vec<T, L / 2> halves[2];
    __builtin_memcpy(&halves, &x, sizeof(x));
    return total<L / 2, T>(halves[0] + halves[1]);
  }
}

DCNV3_HD float root(float x) { return __builtin_sqrtf(x); }
DCNV3_HD double root(double x) { return __builtin_sqrt(x); }

// Mean and the reciprocal of the standard deviation: squared distances to the mean are summed, not squares.
template <typename S>
DCNV3_HD void row_statistics(const NormProblem& q, const S* x, Compute<S>& mean, Compute<S>& rstd) {
  using T = Compute<S>;
  constexpr int L = DCNV3_VECTOR_BYTES / sizeof(T);
  Vec<T, L> sum = {}, squares = {};
  for (int64_t c = 0; c < q.channels; c += L) sum += load_first<L>(x + c, q.channels - c);
  mean = total<L, T>(sum) / q.channels;
  int64_t c = 0;
  for (; c + L <= q.channels; c += L) {
    const Vec<T, L> distance = load<L>(x + c) - mean;
    squares += distance * distance;
  }
  if (c < q.channels) {
    const Vec<T, L> distance = keep_first<L, T>(load_first<L>(x + c, q.channels - c) - mean, q.channels - c);
    squares += distance * distance;
  }
  rstd = T(1) / root(total<L, T>(squares) / q.channels + static_cast<T>(q.eps));
}

// What the row's norm is multiplied by.
template <typename S>
DCNV3_HD Compute<S> factor_of(const NormProblem& q, const NormTensors& t, int64_t row) {
  return t.factor == nullptr ? Compute<S>(1) : widen(static_cast<const S*>(t.factor)[row / q.rows_of_factor]);
}

template <typename S, bool kGelu>
void norm_forward(const NormProblem& q, const NormTensors& t, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int L = DCNV3_VECTOR_BYTES / sizeof(T);
  const S *weight = static_cast<const S*>(t.weight), *bias = static_cast<const S*>(t.bias);
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(t.x) + row * q.channels;
    S* output = static_cast<S*>(t.output) + row * q.channels;
    T mean, rstd;
    row_statistics(q, x, mean, rstd);
    const S* residual = t.residual == nullptr ? nullptr : static_cast<const S*>(t.residual) + row * q.channels;
    const T factor = factor_of<S>(q, t, row);
    static_cast<T*>(t.mean)[row] = mean, static_cast<T*>(t.rstd)[row] = rstd;
    for (int64_t c = 0; c < q.channels; c += L) {
      const int64_t left = q.channels - c;
      const Vec<T, L> normal = (load_first<L>(x + c, left) - mean) * rstd;
      Vec<T, L> y = normal * load_first<L>(weight + c, left) + load_first<L>(bias + c, left);
      if constexpr (kGelu) y = gelu_of(y);
      if (residual != nullptr) y = load_first<L>(residual + c, left) + y * factor;
      store_first<L, S>(output + c, left, y);
    }
  }
}

// Rows [begin, end), which are share number `share`.
template <typename S, bool kGelu>
void norm_backward(const NormProblem& q, const NormTensors& t, int64_t share, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int L = DCNV3_VECTOR_BYTES / sizeof(T);
  using V = Vec<T, L>;
  const S *weight = static_cast<const S*>(t.weight), *bias = static_cast<const S*>(t.bias);
  const int64_t padded = (q.channels + L - 1) / L * L;
  Arena arena(4 * padded * sizeof(T));
  T *grad_weight = arena.take<T>(padded), *grad_bias = arena.take<T>(padded);
  T *of_normal = arena.take<T>(padded), *normals = arena.take<T>(padded);
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(t.x) + row * q.channels;
    const S* grad = static_cast<const S*>(t.grad_output) + row * q.channels;
    const S* again = t.grad_again == nullptr ? nullptr : static_cast<const S*>(t.grad_again) + row * q.channels;
    const S* residual = t.grad_residual == nullptr ? nullptr : static_cast<const S*>(t.grad_residual) + row * q.channels;
    S* grad_x = static_cast<S*>(t.grad_x) + row * q.channels;
    const T mean = static_cast<const T*>(t.mean)[row], rstd = static_cast<const T*>(t.rstd)[row];
    const T factor = factor_of<S>(q, t, row);
    V sum = {}, products = {};
    for (int64_t c = 0; c < q.channels; c += L) {
      const int64_t left = q.channels - c;
      const V normal = (load_first<L>(x + c, left) - mean) * rstd, w = load_first<L>(weight + c, left);
      V slope = load_first<L>(grad + c, left) * factor;  // zeros past the row's end, and so is all that follows from it
      if (again != nullptr) slope += load_first<L>(again + c, left) * factor;
      if constexpr (kGelu) slope *= gelu_slope(V(normal * w + load_first<L>(bias + c, left)));
      store<L, T>(grad_weight + c, load<L>(grad_weight + c) + slope * normal);
      store<L, T>(grad_bias + c, load<L>(grad_bias + c) + slope);
      const V scaled = slope * w;
      store<L, T>(of_normal + c, scaled), store<L, T>(normals + c, normal);
      sum += scaled, products += scaled * normal;
    }
    const T mean_slope = total<L, T>(sum) / q.channels, mean_product = total<L, T>(products) / q.channels;
    for (int64_t c = 0; c < q.channels; c += L) {
      const int64_t left = q.channels - c;
      V sum_x = (load<L>(of_normal + c) - (load<L>(normals + c) * mean_product + mean_slope)) * rstd;
      if (residual != nullptr) sum_x += load_first<L>(residual + c, left);
      store_first<L, S>(grad_x + c, left, sum_x);
    }
  }
  T* sums = static_cast<T*>(t.sums) + share * 2 * q.channels;
  __builtin_memcpy(sums, grad_weight, q.channels * sizeof(T));
  __builtin_memcpy(sums + q.channels, grad_bias, q.channels * sizeof(T));
}

// The gradients of weight and bias from the shares' sums, which are then in the first share's place.
template <typename S>
void norm_sums(const NormProblem& q, const NormTensors& t, int64_t shares) {
  using T = Compute<S>;
  T* sums = static_cast<T*>(t.sums);
  for (int64_t share = 1; share < shares; ++share) {
    for (int64_t c = 0; c < 2 * q.channels; ++c) sums[c] += sums[share * 2 * q.channels + c];
  }
  for (int64_t c = 0; c < q.channels; ++c) {
    narrow(static_cast<S*>(t.grad_weight) + c, shares == 0 ? T(0) : sums[c]);
    narrow(static_cast<S*>(t.grad_bias) + c, shares == 0 ? T(0) : sums[q.channels + c]);
  }
}

// Elements [begin, end). `grad` null: the GELU of x; else its gradient.
template <typename S>
void gelu(const S* x, const S* grad, S* to, int64_t begin, int64_t end) {
  constexpr int L = DCNV3_VECTOR_BYTES / sizeof(Compute<S>);
  if (grad == nullptr) {
    for (int64_t i = begin; i < end; i += L) store_first<L, S>(to + i, end - i, gelu_of(load_first<L>(x + i, end - i)));
    return;
  }
  for (int64_t i = begin; i < end; i += L) {
    store_first<L, S>(to + i, end - i, load_first<L>(grad + i, end - i) * gelu_slope(load_first<L>(x + i, end - i)));
  }
}

template <typename F>
void with_storage(Type type, const F& f) {
  switch (type) {
    case Type::kDouble: return f(double{});
    case Type::kFloat: return f(float{});
    case Type::kBFloat16: return f(BFloat16{});
    case Type::kHalf: return f(Half{});
  }
}

inline void run_norm_forward(Type type, const NormProblem& q, const NormTensors& t, int64_t begin, int64_t end) {
  with_storage(type, [&](auto s) {
    using S = decltype(s);
    q.gelu ? norm_forward<S, true>(q, t, begin, end) : norm_forward<S, false>(q, t, begin, end);
  });
}
inline void run_norm_backward(Type type, const NormProblem& q, const NormTensors& t, int64_t share, int64_t begin,
                              int64_t end) {
  with_storage(type, [&](auto s) {
    using S = decltype(s);
    q.gelu ? norm_backward<S, true>(q, t, share, begin, end) : norm_backward<S, false>(q, t, share, begin, end);
  });
}
inline void run_norm_sums(Type type, const NormProblem& q, const NormTensors& t, int64_t shares) {
  with_storage(type, [&](auto s) { norm_sums<decltype(s)>(q, t, shares); });
}
inline void run_gelu(Type type, const void* x, const void* grad, void* to, int64_t begin, int64_t end) {
  with_storage(type, [&](auto s) {
    using S = decltype(s);
    gelu(static_cast<const S*>(x), static_cast<const S*>(grad), static_cast<S*>(to), begin, end);
  });
}
