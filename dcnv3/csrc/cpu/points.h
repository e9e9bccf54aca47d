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

  const int64_t groups, points, count, padded;  // padded: to whole blocks of Arena::kAlign
  T *p;                                         // weights of the points, after the activation
  T *w00, *w01, *w10, *w11;                     // the same times the shares of the four pixels
  T *hw0, *hw1, *hs0, *hs1, *ww0, *ww1, *ws0, *ws1;  // the two axes (sampling.h), with kGradient
  Index *i00, *i01, *i10, *i11;                 // numbers of the four pixels in the image, times `step`

  Points(const Problem& q, int64_t groups_here, int64_t step)
      : groups(groups_here),
        points(q.points),
        count(groups_here * q.points),
        padded((count + kBlock - 1) / kBlock * kBlock),
        arena_(25 * padded * sizeof(T)),
        q_(q),
        step_(static_cast<Index>(step)),
        radius_h_((q.dilation_h * (q.kernel_h - 1)) >> 1),
        radius_w_((q.dilation_w * (q.kernel_w - 1)) >> 1) {
    for (T** array : {&p, &w00, &w01, &w10, &w11, &hw0, &hw1, &hs0, &hs1, &ww0, &ww1, &ws0, &ws1, &cell_h_, &cell_w_,
                      &off_h_, &off_w_}) {
      *array = arena_.template take<T>(padded);
    }
    raw_ = arena_.template take<T>(2 * padded);
    for (Index** array : {&i00, &i01, &i10, &i11}) *array = arena_.template take<Index>(padded);
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

  // Read the offsets and logits of output pixel (h, w) and fill the arrays.
  void prepare(int64_t h, int64_t w, const S* offset, const S* mask) {
    read(offset, 2 * count, raw_);
    for (int64_t k = 0; k < padded; ++k) {
      off_w_[k] = raw_[2 * k];
      off_h_[k] = raw_[2 * k + 1];
    }
    read(mask, count, p);
    activate();
    place(T(h * q_.stride_h - q_.padding_h + radius_h_), T(w * q_.stride_w - q_.padding_w + radius_w_));
  }

 private:
  static constexpr int64_t kBlock = Arena::kAlign / sizeof(T);

  static void read(const S* from, int64_t n, T* to) {
    int64_t k = 0;
    for (; k + L <= n; k += L) store<L, T>(to + k, load<L>(from + k));
    for (; k < n; ++k) to[k] = widen(from[k]);
  }

  void activate() {
    if (q_.activation == kNone) return;
    const V one = as<V>(1);
    if (q_.activation == kSigmoid) {
      for (int64_t k = 0; k < padded; k += L) store<L, T>(p + k, one / (one + exponential(-load<L>(p + k))));
      return;
    }
    for (int64_t first = 0; first < count; first += points) {
      T most = p[first];
      for (int64_t k = first + 1; k < first + points; ++k) most = p[k] > most ? p[k] : most;
      for (int64_t k = first; k < first + points; ++k) p[k] -= most;
    }
    for (int64_t k = 0; k < padded; k += L) store<L, T>(p + k, exponential(load<L>(p + k)));
    for (int64_t first = 0; first < count; first += points) {
      T sum = 0;
      for (int64_t k = first; k < first + points; ++k) sum += p[k];
      const T share = T(1) / sum;
      for (int64_t k = first; k < first + points; ++k) p[k] *= share;
    }
  }

  void place(T start_h, T start_w) {
    const T scale = T(q_.offset_scale);
    const int height = static_cast<int>(q_.height), width = static_cast<int>(q_.width);
    for (int64_t k = 0; k < padded; k += L) {
      const Axis<V> y = axis(location(start_h, load<L>(cell_h_ + k), load<L>(off_h_ + k), scale), height);
      const Axis<V> x = axis(location(start_w, load<L>(cell_w_ + k), load<L>(off_w_ + k), scale), width);
      const V weight = load<L>(p + k), top = weight * y.w0, bottom = weight * y.w1;
      store<L, T>(w00 + k, top * x.w0), store<L, T>(w01 + k, top * x.w1);
      store<L, T>(w10 + k, bottom * x.w0), store<L, T>(w11 + k, bottom * x.w1);
      const Int top_row = y.i0 * (width * step_), bottom_row = y.i1 * (width * step_);
      const Int left = x.i0 * step_, right = x.i1 * step_;
      put(i00 + k, top_row + left), put(i01 + k, top_row + right);
      put(i10 + k, bottom_row + left), put(i11 + k, bottom_row + right);
      if constexpr (kGradient) {
        store<L, T>(hw0 + k, y.w0), store<L, T>(hw1 + k, y.w1), store<L, T>(hs0 + k, y.s0), store<L, T>(hs1 + k, y.s1);
        store<L, T>(ww0 + k, x.w0), store<L, T>(ww1 + k, x.w1), store<L, T>(ws0 + k, x.s0), store<L, T>(ws1 + k, x.s1);
      }
    }
  }

  static void put(Index* to, Int i) { __builtin_memcpy(to, &i, sizeof(i)); }

  Arena arena_;
  const Problem q_;
  const Index step_;
  const int64_t radius_h_, radius_w_;
  T *cell_h_, *cell_w_, *off_h_, *off_w_, *raw_;
};
