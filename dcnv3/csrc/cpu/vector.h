// Loads and stores of short vectors in every storage type. Included once per instruction set, like kernels.h.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

DCNV3_HD float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
DCNV3_HD uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

// One element, widened and narrowed. Rounding is to nearest even.
DCNV3_HD double widen(double x) { return x; }
DCNV3_HD float widen(float x) { return x; }
DCNV3_HD float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DCNV3_HD float widen(Half x) {
#if DCNV3_F16C
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent and normalises subnormal numbers at once.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}
DCNV3_HD void narrow(double* to, double x) { *to = x; }
DCNV3_HD void narrow(float* to, float x) { *to = x; }
DCNV3_HD void narrow(BFloat16* to, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
DCNV3_HD void narrow(Half* to, float x) {
#if DCNV3_F16C
  to->bits = _cvtss_sh(x, 0);
#else
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    to->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {
    to->bits = static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest
  } else if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa, and the addition rounds to nearest even.
    to->bits = static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  } else {
    rest += 0xfffu + ((rest >> 13) & 1u) - 0x38000000u;
    to->bits = static_cast<uint16_t>(sign | (rest >> 13));
  }
#endif
}

template <int L, typename S>
DCNV3_HD Vec<Compute<S>, L> load(const S* from) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    Vec<S, L> v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    Vec<uint16_t, L> bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    const Vec<uint32_t, L> wide = __builtin_convertvector(bits, Vec<uint32_t, L>) << 16;
    Vec<float, L> v;
    __builtin_memcpy(&v, &wide, sizeof(v));
    return v;
  } else {
#if DCNV3_AVX512
    if constexpr (L == 16) {
      return (Vec<float, L>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
#endif
#if DCNV3_F16C
    if constexpr (L == 8) {
      return (Vec<float, L>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
#endif
    Vec<float, L> v;
    for (int i = 0; i < L; ++i) v[i] = widen(from[i]);
    return v;
  }
}

template <int L, typename S>
DCNV3_HD void store(S* to, Vec<Compute<S>, L> v) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    __builtin_memcpy(to, &v, sizeof(v));
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    Vec<uint32_t, L> bits;
    __builtin_memcpy(&bits, &v, sizeof(v));
    const Vec<uint32_t, L> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Vec<uint32_t, L> quiet = Vec<uint32_t, L>{} + 0x7fc0u;
    const Vec<uint32_t, L> nan = (Vec<uint32_t, L>)(v != v);
    const Vec<uint16_t, L> narrow = __builtin_convertvector((nan & quiet) | (~nan & rounded), Vec<uint16_t, L>);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
  } else {
#if DCNV3_AVX512
    if constexpr (L == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, 0));
      return;
    }
#endif
#if DCNV3_F16C
    if constexpr (L == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, 0));
      return;
    }
#endif
    for (int i = 0; i < L; ++i) narrow(to + i, v[i]);
  }
}

// Lanes of two vectors by their numbers, those of b after those of a.
#if defined(__clang__) || __GNUC__ >= 12
#define DCNV3_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <int... I, typename V>
DCNV3_HD auto shuffled(V a, V b) {
  using T = std::remove_reference_t<decltype(a[0])>;
  constexpr int L = sizeof(V) / sizeof(T);
  return Vec<T, sizeof...(I)>{(I < L ? a[I % L] : b[I % L])...};
}
#define DCNV3_SHUFFLE(a, b, ...) shuffled<__VA_ARGS__>(a, b)
#endif

template <typename V>
DCNV3_HD V larger(V a, V b) {
  return a > b ? a : b;
}
struct Plus {
  template <typename V>
  DCNV3_HD static V of(V a, V b) {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  DCNV3_HD static V of(V a, V b) {
    return larger(a, b);
  }
};

// The sums (or the largest) over the lanes of four vectors, side by side. Pairs are interleaved first, so that the work
// is shared.
template <typename Op, typename T>
DCNV3_HD Vec<T, 4> across(Vec<T, 2> a, Vec<T, 2> b, Vec<T, 2> c, Vec<T, 2> d) {
  return Op::of(Vec<T, 4>{a[0], b[0], c[0], d[0]}, Vec<T, 4>{a[1], b[1], c[1], d[1]});
}
template <typename Op, typename T>
DCNV3_HD Vec<T, 4> across(Vec<T, 4> a, Vec<T, 4> b, Vec<T, 4> c, Vec<T, 4> d) {
  const Vec<T, 4> ab = Op::of(DCNV3_SHUFFLE(a, b, 0, 4, 1, 5), DCNV3_SHUFFLE(a, b, 2, 6, 3, 7));
  const Vec<T, 4> cd = Op::of(DCNV3_SHUFFLE(c, d, 0, 4, 1, 5), DCNV3_SHUFFLE(c, d, 2, 6, 3, 7));
  return Op::of(DCNV3_SHUFFLE(ab, cd, 0, 1, 4, 5), DCNV3_SHUFFLE(ab, cd, 2, 3, 6, 7));
}
template <typename Op, typename T>
DCNV3_HD Vec<T, 4> across(Vec<T, 8> a, Vec<T, 8> b, Vec<T, 8> c, Vec<T, 8> d) {
  const Vec<T, 8> ab =
      Op::of(DCNV3_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13), DCNV3_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15));
  const Vec<T, 8> cd =
      Op::of(DCNV3_SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13), DCNV3_SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15));
  const Vec<T, 8> all =
      Op::of(DCNV3_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13), DCNV3_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15));
  return Op::of(DCNV3_SHUFFLE(all, all, 0, 1, 2, 3), DCNV3_SHUFFLE(all, all, 4, 5, 6, 7));
}
template <typename Op, typename T>
DCNV3_HD Vec<T, 4> across(Vec<T, 16> a, Vec<T, 16> b, Vec<T, 16> c, Vec<T, 16> d) {
  const Vec<T, 16> ab = Op::of(DCNV3_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                               DCNV3_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  const Vec<T, 16> cd = Op::of(DCNV3_SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                               DCNV3_SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  const Vec<T, 16> all = Op::of(DCNV3_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                                DCNV3_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  const Vec<T, 8> half = Op::of(DCNV3_SHUFFLE(all, all, 0, 1, 2, 3, 4, 5, 6, 7),
                                DCNV3_SHUFFLE(all, all, 8, 9, 10, 11, 12, 13, 14, 15));
  return Op::of(DCNV3_SHUFFLE(half, half, 0, 1, 2, 3), DCNV3_SHUFFLE(half, half, 4, 5, 6, 7));
}

// The even and the odd places of two vectors in a row, and the way back: the first and the second half of a and b in turns.
#define DCNV3_PLACES(V, EVEN, ODD, FIRST, SECOND)                        \
  DCNV3_HD V even(V a, V b) { return DCNV3_SHUFFLE(a, b, EVEN); }        \
  DCNV3_HD V odd(V a, V b) { return DCNV3_SHUFFLE(a, b, ODD); }          \
  DCNV3_HD V first_half(V a, V b) { return DCNV3_SHUFFLE(a, b, FIRST); } \
  DCNV3_HD V second_half(V a, V b) { return DCNV3_SHUFFLE(a, b, SECOND); }
#define DCNV3_LIST(...) __VA_ARGS__
#define DCNV3_PLACES_2(V) DCNV3_PLACES(V, DCNV3_LIST(0, 2), DCNV3_LIST(1, 3), DCNV3_LIST(0, 2), DCNV3_LIST(1, 3))
#define DCNV3_PLACES_4(V)                                                                                      \
  DCNV3_PLACES(V, DCNV3_LIST(0, 2, 4, 6), DCNV3_LIST(1, 3, 5, 7), DCNV3_LIST(0, 4, 1, 5), DCNV3_LIST(2, 6, 3, 7))
#define DCNV3_PLACES_8(V)                                                                          \
  DCNV3_PLACES(V, DCNV3_LIST(0, 2, 4, 6, 8, 10, 12, 14), DCNV3_LIST(1, 3, 5, 7, 9, 11, 13, 15),    \
               DCNV3_LIST(0, 8, 1, 9, 2, 10, 3, 11), DCNV3_LIST(4, 12, 5, 13, 6, 14, 7, 15))
#define DCNV3_PLACES_16(V)                                                                         \
  DCNV3_PLACES(V, DCNV3_LIST(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),           \
               DCNV3_LIST(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),              \
               DCNV3_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),                 \
               DCNV3_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
#if DCNV3_VECTOR_BYTES == 64
DCNV3_PLACES_16(Floats)
DCNV3_PLACES_8(Doubles)
#elif DCNV3_VECTOR_BYTES == 32
DCNV3_PLACES_8(Floats)
DCNV3_PLACES_4(Doubles)
#else
DCNV3_PLACES_4(Floats)
DCNV3_PLACES_2(Doubles)
#endif
#undef DCNV3_PLACES_16
#undef DCNV3_PLACES_8
#undef DCNV3_PLACES_4
#undef DCNV3_PLACES_2
#undef DCNV3_LIST
#undef DCNV3_PLACES
