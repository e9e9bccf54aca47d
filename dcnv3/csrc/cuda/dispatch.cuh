// From a `Type` and the alignment of the tensors to a kernel's template arguments.
#pragma once

#include "device.cuh"

namespace dcnv3 {
namespace gpu {

template <int N>
struct Width {
  static constexpr int value = N;
};

// Whether all channels of a lane group can move in 128-bit pieces.
template <typename S>
bool aligned(const Problem& q, const void* a, const void* b) {
  const int64_t n = 16 / static_cast<int64_t>(sizeof(S));
  const auto address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return q.group_channels % n == 0 && q.value_stride % n == 0 && address % 16 == 0;
}

// f(S{}, Width<N>{}): N elements are 128 bits where everything is aligned to them, else one.
template <typename S, typename F>
int with_width(const Problem& q, const void* a, const void* b, const F& f) {
  if (aligned<S>(q, a, b)) return f(S{}, Width<16 / int(sizeof(S))>{});
  return f(S{}, Width<1>{});
}

// f(LanesLog2<L>{}): the published models have 16 or 32 channels a group and 3 by 3 kernels.
template <int L>
struct LanesLog2 {
  static constexpr int value = L;
};
template <int N, typename F>
int with_lanes(const Problem& q, const Plan& plan, const F& f) {
  if constexpr (N >= 4) {
    constexpr int sixteen = N == 8 ? 1 : 2;
    if (q.points == 9 && plan.chunk == 9 && q.group_channels == N << plan.lanes_log2) {
      if (plan.lanes_log2 == sixteen) return f(LanesLog2<sixteen>{});
      if (plan.lanes_log2 == sixteen + 1) return f(LanesLog2<sixteen + 1>{});
    }
  }
  return f(LanesLog2<kAny>{});
}

template <typename F>
int with_type(Type type, const Problem& q, const void* a, const void* b, const F& f) {
  switch (type) {
    case Type::kDouble: return with_width<double>(q, a, b, f);
    case Type::kFloat: return with_width<float>(q, a, b, f);
    case Type::kBFloat16: return with_width<__nv_bfloat16>(q, a, b, f);
    case Type::kHalf: return with_width<__half>(q, a, b, f);
  }
  return 0;
}

// What launch() comes to, which is not called where CUDA already has an error to tell: that is of an earlier operation.
template <typename F>
Status checked(const F& launch) {
  if (cudaPeekAtLastError() != cudaSuccess) return {static_cast<int>(cudaGetLastError()), true};
  return {launch(), false};
}

}  // namespace gpu
}  // namespace dcnv3
