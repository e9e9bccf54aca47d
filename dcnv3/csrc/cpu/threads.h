// Threads, and memory for results.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../binding.h"

namespace dcnv3 {

// torch's own threads where the stable ABI gives them (torch 2.10), else this thread.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count == 0) return;
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
  torch::stable::parallel_for(0, count, grain, f);
#else
  (void)grain;
  f(int64_t(0), count);
#endif
}

inline int64_t threads() {
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
  return torch::stable::get_num_threads();
#else
  return 1;
#endif
}

// A tensor about to be written, on huge pages where it is large: fresh memory is otherwise given 4 KiB at a fault, and the
// faults of a result take as long as the arithmetic. Advice only: whatever becomes of it, the tensor is the same.
inline Tensor on_huge_pages(Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t bytes = uintptr_t(t.numel() * bytes_of(t));
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data_ptr()), end = (start + bytes) / kPage * kPage;
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace dcnv3
