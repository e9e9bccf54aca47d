#include "norm.cuh"

#include "dispatch.cuh"

namespace dcnv3 {
namespace gpu {
namespace {

// f(S{}, Width<N>{}): N elements are 128 bits where rows and pointers are multiples of that, else one.
template <typename S, typename F>
int with_norm_width(const NormProblem& q, const NormTensors& t, const F& f) {
  constexpr int n = 16 / int(sizeof(S));
  return norm_aligned(q, t, n) ? f(S{}, Width<n>{}) : f(S{}, Width<1>{});
}

template <typename F>
int with_norm_type(Type type, const NormProblem& q, const NormTensors& t, const F& f) {
  switch (type) {
    case Type::kDouble: return with_norm_width<double>(q, t, f);
    case Type::kFloat: return with_norm_width<float>(q, t, f);
    case Type::kBFloat16: return with_norm_width<__nv_bfloat16>(q, t, f);
    case Type::kHalf: return with_norm_width<__half>(q, t, f);
  }
  return 0;
}

template <typename S, int N, bool kGelu>
int forward(const NormProblem& q, const NormTensors& t, cudaStream_t stream) {
  const NormPlan plan = norm_plan(q, sizeof(Compute<S>), N, false);
  const NormArguments a{q, t, plan.lanes_log2, 0};
  norm_forward_kernel<S, N, kGelu><<<static_cast<unsigned>(plan.blocks), plan.warps * kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename S, int N, bool kGelu>
int backward(const NormProblem& q, const NormTensors& t, cudaStream_t stream) {
  const NormPlan plan = norm_plan(q, sizeof(Compute<S>), N, true);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  const NormArguments a{q, t, plan.lanes_log2, plan.share};
  norm_backward_kernel<S, N, kGelu><<<static_cast<unsigned>(plan.blocks), plan.warps * kWarp, plan.shared, stream>>>(a);
  if (const int error = cudaGetLastError()) return error;
  norm_sums_kernel<S><<<static_cast<unsigned>((2 * q.channels + 7) / 8), kWarp, 0, stream>>>(a, plan.shares);
  return cudaGetLastError();
}

}  // namespace

Status launch_norm_forward(Type type, const NormProblem& q, const NormTensors& t, void* opaque) {
  const auto stream = static_cast<cudaStream_t>(opaque);
  return checked([&] {
    return with_norm_type(type, q, t, [&](auto s, auto width) -> int {
      using S = decltype(s);
      return q.gelu ? forward<S, width.value, true>(q, t, stream) : forward<S, width.value, false>(q, t, stream);
    });
  });
}

Status launch_norm_backward(Type type, const NormProblem& q, const NormTensors& t, void* opaque) {
  const auto stream = static_cast<cudaStream_t>(opaque);
  return checked([&] {
    return with_norm_type(type, q, t, [&](auto s, auto width) -> int {
      using S = decltype(s);
      return q.gelu ? backward<S, width.value, true>(q, t, stream) : backward<S, width.value, false>(q, t, stream);
    });
  });
}

}  // namespace gpu
}  // namespace dcnv3
