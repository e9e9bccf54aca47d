// Vectors of DCNV3_VECTOR_BYTES under the names that sampling.h asks for (included by it).

template <typename T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};
template <typename T, int L>
using Vec = typename VectorOf<T, L>::type;

using Floats = Vec<float, DCNV3_VECTOR_BYTES / 4>;
using Ints = Vec<int32_t, DCNV3_VECTOR_BYTES / 4>;
using Doubles = Vec<double, DCNV3_VECTOR_BYTES / 8>;
using Longs = Vec<int64_t, DCNV3_VECTOR_BYTES / 8>;

template <>
struct Lanes<Floats> {
  using Element = float;
  using Int = Ints;
};
template <>
struct Lanes<Doubles> {
  using Element = double;
  using Int = Longs;
};

DCNV3_HD Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
DCNV3_HD Ints choose(Ints condition, Ints yes, Ints no) { return condition ? yes : no; }
DCNV3_HD Doubles choose(Longs condition, Doubles yes, Doubles no) { return condition ? yes : no; }
DCNV3_HD Longs choose(Longs condition, Longs yes, Longs no) { return condition ? yes : no; }
DCNV3_HD Ints truncate(Floats x) { return __builtin_convertvector(x, Ints); }
DCNV3_HD Longs truncate(Doubles x) { return __builtin_convertvector(x, Longs); }
DCNV3_HD void assign(Floats& to, float x) { to = Floats{} + x; }
DCNV3_HD void assign(Floats& to, int x) { to = Floats{} + static_cast<float>(x); }
DCNV3_HD void assign(Floats& to, Ints x) { to = __builtin_convertvector(x, Floats); }
DCNV3_HD void assign(Ints& to, int x) { to = Ints{} + x; }
DCNV3_HD void assign(Doubles& to, double x) { to = Doubles{} + x; }
DCNV3_HD void assign(Doubles& to, int x) { to = Doubles{} + static_cast<double>(x); }
DCNV3_HD void assign(Doubles& to, Longs x) { to = __builtin_convertvector(x, Doubles); }
DCNV3_HD void assign(Longs& to, int x) { to = Longs{} + static_cast<int64_t>(x); }

// exp in every lane: range reduction and a polynomial (Cephes' coefficients), about 1 ulp. NaN stays NaN; below -80 it is
// too small to count, but what it is multiplied by later keeps it from the slow denormal numbers; x is at most 88.
DCNV3_HD Floats exponential(Floats x) {
  const Floats none = {};
  x = choose(x < none - 80.0f, none - 80.0f, x);
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f, whole = shifted - 12582912.0f;
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.0f);
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + (reinterpret_cast<Ints>(shifted) << 23));
}
DCNV3_HD Doubles exponential(Doubles x) {
  for (int i = 0; i < int(DCNV3_VECTOR_BYTES / 8); ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
