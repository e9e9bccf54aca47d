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
  T *p;                                              // weights of the points, after the activation
  T *w00, *w01, *w10, *w11;                          // shares of the four pixels
  T *hw0, *hw1, *hs0, *hs1, *ww0, *ww1, *ws0, *ws1;  // the two axes (sampling.h), with kGradient
  Index *i00, *i01, *i10, *i11;                      // numbers of the four pixels in the image, times `step`

  Points(const Problem& q, int64_t groups_here, int64_t step)
      : groups(groups_here),
        points(q.points),
        count(groups_here * q.points),
        padded((count + kBlock - 1) / kBlock * kBlock),
        arena_((19 * padded + kBlock) * sizeof(T)),
        q_(q),
        step_(static_cast<Index>(step)),
        radius_h_((q.dilation_h * (q.kernel_h - 1)) >> 1),
        radius_w_((q.dilation_w * (q.kernel_w - 1)) >> 1) {
    for (T** array : {&w00, &w01, &w10, &w11, &hw0, &hw1, &hs0, &hs1, &ww0, &ww1, &ws0, &ws1, &cell_h_, &cell_w_}) {
      *array = arena_.template take<T>(padded);
    }
    for (Index** array : {&i00, &i01, &i10, &i11}) *array = arena_.template take<Index>(padded);
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
      for (int64_t first = 0; first < count; first += points) softmax(mask + first, readable - first, p + first);
    } else {
      const bool sigmoid = q_.activation == kSigmoid;
      for (int64_t k = 0; k < count; k += L) {
        const V x = read(mask + k, readable - k);
        store<L, T>(p + k, sigmoid ? as<V>(1) / (as<V>(1) + exponential(-x)) : x);
      }
    }
    place(T(h * q_.stride_h - q_.padding_h + radius_h_), T(w * q_.stride_w - q_.padding_w + radius_w_), offset,
          pixels_left * q_.offset_stride + 2 * count);
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

  // In registers, for as many points as a vector holds at a time; the lanes past the group's end count for nothing.
  void softmax(const S* logits, int64_t readable, T* to) const {
    V lane;
    for (int i = 0; i < L; ++i) lane[i] = T(i);
    const V none = as<V>(0), lowest = none - std::numeric_limits<T>::infinity();
    V most = lowest;
    for (int64_t k = 0; k < points; k += L) {
      const V x = choose(lane < as<V>(T(points - k)), read(logits + k, readable - k), lowest);
      most = choose(x > most, x, most);
    }
    const T top = largest<T>(most);
    V sum = none;
    for (int64_t k = 0; k < points; k += L) {
      const V e = choose(lane < as<V>(T(points - k)), exponential(read(logits + k, readable - k) - top), none);
      sum += e;
      store<L, T>(to + k, e);
    }
    const T share = T(1) / total<T>(sum);
    for (int64_t k = 0; k < points; k += L) store<L, T>(to + k, load<L>(to + k) * share);
  }

  void place(T start_h, T start_w, const S* offset, int64_t readable) {
    const T scale = T(q_.offset_scale);
    const int height = static_cast<int>(q_.height), width = static_cast<int>(q_.width);
    for (int64_t k = 0; k < padded; k += L) {
      const V one = read(offset + 2 * k, readable - 2 * k), two = read(offset + 2 * k + L, readable - 2 * k - L);
      const Axis<V> y = axis(location(start_h, load<L>(cell_h_ + k), odd(one, two), scale), height);
      const Axis<V> x = axis(location(start_w, load<L>(cell_w_ + k), even(one, two), scale), width);
      store<L, T>(w00 + k, y.w0 * x.w0), store<L, T>(w01 + k, y.w0 * x.w1);
      store<L, T>(w10 + k, y.w1 * x.w0), store<L, T>(w11 + k, y.w1 * x.w1);
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
  T *cell_h_, *cell_w_;
};
