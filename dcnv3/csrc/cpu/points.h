// The points of one output pixel, prepared as arrays over (group, point), many points at a time; the channel loops then
// only read them. Included once per instruction set, like kernels.h.

// One aligned, zeroed block, cut into arrays.
class Arena {
 public:
  static constexpr size_t kAlign = 64;

  explicit Arena(size_t bytes) : block_(static_cast<char*>(::operator new(bytes, std::align_val_t(kAlign)))), next_(block_) {
    __builtin_memset(block_, 0, bytes);
  }
  ~Arena() { ::operator delete(block_, std::align_val_t(kAlign)); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    return array;
  }

 private:
  char* block_;
  char* next_;
};

// With kGradient, what only the backward pass reads is kept too.
template <typename S, bool kGradient>
class Points {
 public:
  using T = Compute<S>;
  static constexpr int L = DCNV3_VECTOR_BYTES / sizeof(T);
  using V = Vec<T, L>;
  using Int = typename Lanes<V>::Int;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

  const int64_t groups, points, count, padded;       // padded: count to whole blocks of Arena::kAlign
  const int64_t right, down;                         // from one pixel to the next, and to the next row, times `step`
  T *p;                                              // weights of the points, after the activation
  T *w00, *w01, *w10, *w11;                          // those times the shares of the four pixels
  T *hw0, *hw1, *hs0, *hs1, *ww0, *ww1, *ws0, *ws1;  // the two axes (sampling.h), with kGradient
  Index* corner;                                     // number of the first of the four pixels in the image, times `step`

  Points(const PackedProblem& q, int64_t groups_here, int64_t step)
      : groups(groups_here),
        points(q.points),
        count(groups_here * q.points),
        padded((count + kBlock - 1) / kBlock * kBlock),
        right(q.width > 1 ? step : 0),
        down(q.height > 1 ? q.width * step : 0),
        arena_((16 * padded + kBlock) * sizeof(T)),
        q_(q),
        step_(static_cast<Index>(step)),
        radius_h_((q.dilation_h * (q.kernel_h - 1)) >> 1),
        radius_w_((q.dilation_w * (q.kernel_w - 1)) >> 1) {
    for (T** array : {&w00, &w01, &w10, &w11, &hw0, &hw1, &hs0, &hs1, &ww0, &ww1, &ws0, &ws1, &cell_h_, &cell_w_}) {
      *array = arena_.template take<T>(padded);
    }
    corner = arena_.template take<Index>(padded);
    p = arena_.template take<T>(padded + kBlock);  // a group's last vector reaches past its end
    int64_t k = 0;
    for (int64_t i = 0; i < q.kernel_w; ++i) {
      for (int64_t j = 0; j < q.kernel_h; ++j) {
        if (q.remove_center && i == q.kernel_w / 2 && j == q.kernel_h / 2) continue;
        for (int64_t g = 0; g < groups; ++g) {
          cell_w_[g * points + k] = T(i * q.dilation_w - radius_w_);
          cell_h_[g * points + k] = T(j * q.dilation_h - radius_h_);
        }
        ++k;
      }
    }
  }

  // Read the offsets and logits of output pixel (h, w) and fill the arrays. `pixels_left` follow in the same tensors:
  // vectors may be read past this pixel's end while they stay inside the tensor.
  void prepare(int64_t h, int64_t w, const S* offset, const S* mask, int64_t pixels_left) {
    const int64_t readable = pixels_left * q_.mask_stride + count;
    if (q_.activation == kSoftmax) {
      if (points <= L) {
        for (int64_t group = 0; group < groups; group += 4) softmax_of_four<1>(group, mask, readable);
      } else if (points <= 2 * L) {
        for (int64_t group = 0; group < groups; group += 4) softmax_of_four<2>(group, mask, readable);
      } else {
        for (int64_t first = 0; first < count; first += points) softmax(mask + first, readable - first, p + first);
      }
    } else {
      const bool sigmoid = q_.activation == kSigmoid;
      for (int64_t k = 0; k < count; k += L) {
        const V x = read(mask + k, readable - k);
        store<L, T>(p + k, sigmoid ? sigmoid_of(x) : x);
      }
    }
    place(T(h * q_.stride_h - q_.padding_h + radius_h_), T(w * q_.stride_w - q_.padding_w + radius_w_), offset,
          pixels_left * q_.offset_stride + 2 * count);
  }

  // The centre's share of each group of a pixel, from its logits; room for a vector more.
  void shares(const S* center, int64_t pixels_left, T* to) const {
    const int64_t readable = pixels_left * q_.center_stride + groups;
    for (int64_t g = 0; g < groups; g += L) store<L, T>(to + g, sigmoid_of(read(center + g, readable - g)));
  }

  // Which lanes of a vector stand for the `left` points that a group still has; the others count for nothing.
  static Int counted(int64_t left) {
    V lane;
    for (int i = 0; i < L; ++i) lane[i] = T(i);
    return lane < as<V>(T(left));
  }

 private:
  static constexpr int64_t kBlock = Arena::kAlign / sizeof(T);

  // A vector from `from`, of which `readable` elements may be read; zeros after them.
  static V read(const S* from, int64_t readable) {
    if (readable >= L) return load<L>(from);
    V v = {};
    for (int64_t i = 0; i < readable; ++i) v[i] = widen(from[i]);
    return v;
  }

  static V sigmoid_of(V x) { return as<V>(1) / (as<V>(1) + exponential(choose(x < as<V>(-88), as<V>(88), -x))); }

  static V lowest() { return as<V>(0) - std::numeric_limits<T>::infinity(); }

  // Four groups from `group`, in registers, each in N vectors: their sums over lanes share the work. Past the last group,
  // that one again. A group's last vector is written past its end, before the next group is.
  template <int N>
  void softmax_of_four(int64_t group, const S* logits, int64_t readable) const {
    const Int whole = counted(L), counts = counted(points - (N - 1) * L);
    V e[N][4], most[4], sum[4];
    int64_t first[4];
    for (int i = 0; i < 4; ++i) first[i] = (group + i < groups ? group + i : groups - 1) * points;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = first[i] + n * L;
        e[n][i] = choose(n == N - 1 ? counts : whole, read(logits + at, readable - at), lowest());
        most[i] = n == 0 ? e[n][i] : larger(e[n][i], most[i]);
      }
    }
    const Vec<T, 4> top = across<Larger, T>(most[0], most[1], most[2], most[3]);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        e[n][i] = choose(n == N - 1 ? counts : whole, exponential(e[n][i] - top[i]), as<V>(0));
        sum[i] = n == 0 ? e[n][i] : sum[i] + e[n][i];
      }
    }
    const Vec<T, 4> share = T(1) / across<Plus, T>(sum[0], sum[1], sum[2], sum[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) store<L, T>(p + first[i] + n * L, e[n][i] * share[i]);
    }
  }

  // One group of any size.
  void softmax(const S* logits, int64_t readable, T* to) const {
    V most = lowest(), sum = {};
    for (int64_t k = 0; k < points; k += L) {
      most = larger(choose(counted(points - k), read(logits + k, readable - k), lowest()), most);
    }
    const T top = across<Larger, T>(most, most, most, most)[0];
    for (int64_t k = 0; k < points; k += L) {
      const V e = choose(counted(points - k), exponential(read(logits + k, readable - k) - top), as<V>(0));
      sum += e;
      store<L, T>(to + k, e);
    }
    const T share = T(1) / across<Plus, T>(sum, sum, sum, sum)[0];
    for (int64_t k = 0; k < points; k += L) store<L, T>(to + k, load<L>(to + k) * share);
  }

  void place(T start_h, T start_w, const S* offset, int64_t readable) {
    const T scale = T(q_.offset_scale);
    const int height = static_cast<int>(q_.height), width = static_cast<int>(q_.width);
    for (int64_t k = 0; k < padded; k += L) {
      const V one = read(offset + 2 * k, readable - 2 * k), two = read(offset + 2 * k + L, readable - 2 * k - L);
      const Beside y = beside(axis(location(start_h, load<L>(cell_h_ + k), odd(one, two), scale), height), height);
      const Beside x = beside(axis(location(start_w, load<L>(cell_w_ + k), even(one, two), scale), width), width);
      const V top = load<L>(p + k) * y.w0, bottom = load<L>(p + k) * y.w1;
      store<L, T>(w00 + k, top * x.w0), store<L, T>(w01 + k, top * x.w1);
      store<L, T>(w10 + k, bottom * x.w0), store<L, T>(w11 + k, bottom * x.w1);
      put(corner + k, y.i0 * (width * step_) + x.i0 * step_);
      if constexpr (kGradient) {
        store<L, T>(hw0 + k, y.w0), store<L, T>(hw1 + k, y.w1), store<L, T>(hs0 + k, y.s0), store<L, T>(hs1 + k, y.s1);
        store<L, T>(ww0 + k, x.w0), store<L, T>(ww1 + k, x.w1), store<L, T>(ws0 + k, x.s0), store<L, T>(ws1 + k, x.s1);
      }
    }
  }

  // An axis whose second pixel is the one after the first, so that one number says where both are. Where an Axis has both
  // at an edge, only one of them counts: it takes its weight along, and its slope, which is -s0 here and +s1 there.
  using Beside = Axis<V>;
  static Beside beside(Axis<V> a, int size) {
    const Int last = as<Int>(size > 1 ? size - 2 : 0);
    const Int edge = a.i0 == a.i1;
    Beside b;
    b.i0 = choose(a.i0 < last, a.i0, last), b.i1 = b.i0 + 1;
    b.w0 = choose(edge, a.w1, a.w0), b.w1 = choose(edge, a.w0, a.w1);
    b.s0 = choose(edge, -a.s1, a.s0), b.s1 = choose(edge, -a.s0, a.s1);
    return b;
  }

  static void put(Index* to, Int i) { __builtin_memcpy(to, &i, sizeof(i)); }

  Arena arena_;
  const PackedProblem q_;
  const Index step_;
  const int64_t radius_h_, radius_w_;
  T *cell_h_, *cell_w_;
};
