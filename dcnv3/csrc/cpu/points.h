// The points of one output pixel, prepared as arrays over (group, point) so that the loops here vectorise over points;
// the channel loops then only read them. Included once per instruction set, like vector.h.

// One aligned block, cut into arrays.
class Arena {
 public:
  explicit Arena(size_t bytes)
      : block_(static_cast<char*>(::operator new(bytes + 64, std::align_val_t(64)))), next_(block_) {
    __builtin_memset(block_, 0, bytes + 64);
  }
  ~Arena() { ::operator delete(block_, std::align_val_t(64)); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  static size_t bytes(int64_t count, size_t size) { return (count * size + 63) / 64 * 64; }

 private:
  char* block_;
  char* next_;
};

// `Index` holds an element's place in one image: int where that fits, else int64_t.
template <typename S, typename Index>
class Points {
 public:
  using T = Compute<S>;
  static constexpr int kLanes = 64 / sizeof(T);

  const int64_t groups, points, count, padded;
  T *p;                         // weights of the points, after the activation
  T *hw0, *hw1, *hs0, *hs1;     // the two rows: weights, slopes
  T *ww0, *ww1, *ws0, *ws1;     // the two columns
  Index *i00, *i01, *i10, *i11; // places of the four pixels in the image of the first group

  Points(const Problem& q, int64_t groups_here)
      : groups(groups_here),
        points(q.points),
        count(groups_here * q.points),
        padded((count + kLanes - 1) / kLanes * kLanes),
        arena_(16 * Arena::bytes(padded, sizeof(T)) + 4 * Arena::bytes(padded, sizeof(Index))),
        q_(q) {
    for (T** array : {&p, &hw0, &hw1, &hs0, &hs1, &ww0, &ww1, &ws0, &ws1, &cell_h_, &cell_w_, &off_h_, &off_w_}) {
      *array = arena_.template take<T>(padded);
    }
    raw_ = arena_.template take<T>(2 * padded);
    for (Index** array : {&i00, &i01, &i10, &i11}) *array = arena_.template take<Index>(padded);
    radius_h_ = (q.dilation_h * (q.kernel_h - 1)) >> 1;
    radius_w_ = (q.dilation_w * (q.kernel_w - 1)) >> 1;
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
    T* __restrict off_h = off_h_;
    T* __restrict off_w = off_w_;
    const T* __restrict raw = raw_;
    for (int64_t k = 0; k < padded; ++k) {
      off_w[k] = raw[2 * k];
      off_h[k] = raw[2 * k + 1];
    }
    read(mask, count, p);
    activate();
    place(T(h * q_.stride_h - q_.padding_h + radius_h_), T(w * q_.stride_w - q_.padding_w + radius_w_));
  }

 private:
  void read(const S* from, int64_t n, T* to) {
    int64_t k = 0;
    for (; k + kWide <= n; k += kWide) store<kWide, T>(to + k, load<kWide>(from + k));
    for (; k < n; ++k) to[k] = widen(from[k]);
  }

  void activate() {
    T* __restrict weight = p;
    if (q_.activation == kNone) return;
    if (q_.activation == kSigmoid) {
      for (int64_t k = 0; k < padded; ++k) weight[k] = T(1) / (T(1) + exponential(-weight[k]));
      return;
    }
    for (int64_t first = 0; first < count; first += points) {
      T most = weight[first];
      for (int64_t k = 1; k < points; ++k) most = weight[first + k] > most ? weight[first + k] : most;
      for (int64_t k = 0; k < points; ++k) weight[first + k] -= most;
    }
    for (int64_t k = 0; k < padded; ++k) weight[k] = exponential(weight[k]);
    for (int64_t first = 0; first < count; first += points) {
      T sum = 0;
      for (int64_t k = 0; k < points; ++k) sum += weight[first + k];
      const T scale = T(1) / sum;
      for (int64_t k = 0; k < points; ++k) weight[first + k] *= scale;
    }
  }

  void place(T start_h, T start_w) {
    const T scale = T(q_.offset_scale);
    const int height = static_cast<int>(q_.height), width = static_cast<int>(q_.width);
    const Index pixel = static_cast<Index>(q_.value_stride), row = static_cast<Index>(q_.width * q_.value_stride);
    const T *__restrict off_h = off_h_, *__restrict off_w = off_w_;
    const T *__restrict cell_h = cell_h_, *__restrict cell_w = cell_w_;
    T *__restrict a0 = hw0, *__restrict a1 = hw1, *__restrict a2 = hs0, *__restrict a3 = hs1;
    T *__restrict b0 = ww0, *__restrict b1 = ww1, *__restrict b2 = ws0, *__restrict b3 = ws1;
    Index *__restrict c00 = i00, *__restrict c01 = i01, *__restrict c10 = i10, *__restrict c11 = i11;
    for (int64_t k = 0; k < padded; ++k) {
      const Axis<T> y = axis(location(start_h, cell_h[k], off_h[k], scale), height);
      const Axis<T> x = axis(location(start_w, cell_w[k], off_w[k], scale), width);
      a0[k] = y.w0, a1[k] = y.w1, a2[k] = y.s0, a3[k] = y.s1;
      b0[k] = x.w0, b1[k] = x.w1, b2[k] = x.s0, b3[k] = x.s1;
      const Index r0 = Index(y.i0) * row, r1 = Index(y.i1) * row, l0 = Index(x.i0) * pixel, l1 = Index(x.i1) * pixel;
      c00[k] = r0 + l0, c01[k] = r0 + l1, c10[k] = r1 + l0, c11[k] = r1 + l1;
    }
  }

  Arena arena_;
  Problem q_;
  int64_t radius_h_, radius_w_;
  T *cell_h_, *cell_w_, *off_h_, *off_w_, *raw_;
};
