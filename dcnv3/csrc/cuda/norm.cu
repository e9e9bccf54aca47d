#include "norm.cuh"

#include <cooperative_groups.h>

#include <algorithm>

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

// The shares, and when every block is done with them, what they come to: in one launch.
template <typename S, int N, bool kGelu>
__global__ void __launch_bounds__(256, sizeof(S) == 8 ? 1 : 3) norm_backward_kernel(const NormArguments a) {
  norm_shares<S, N, kGelu>(a);
  cooperative_groups::this_grid().sync();
  norm_sums<S>(a);
}

template <typename S, int N, bool kGelu>
int forward(const NormProblem& q, const NormTensors& t, cudaStream_t stream) {
  const NormPlan plan = norm_plan(q, sizeof(Compute<S>), N, false);
  const NormArguments a{q, t, plan.lanes_log2, 0, 0};
  norm_forward_kernel<S, N, kGelu><<<static_cast<unsigned>(plan.blocks), plan.warps * kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename S, int N, bool kGelu>
int backward(const NormProblem& q, const NormTensors& t, cudaStream_t stream) {
  NormPlan plan = norm_plan(q, sizeof(Compute<S>), N, true);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  const auto kernel = norm_backward_kernel<S, N, kGelu>;
  const int threads = plan.warps * kWarp;
  // Blocks that wait for each other must all have a place at once. They take half of the places at most: the rest may be
  // another stream's, a collective's say, for as long as that waits for other ranks.
  int device = 0, processors = 0, places = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&places, kernel, threads, plan.shared) == cudaSuccess) {
    plan = within(plan, q, std::max(processors * places / 2, 1));
    NormArguments a{q, t, plan.lanes_log2, plan.share, plan.shares};
    void* arguments[] = {&a};
    cudaLaunchCooperativeKernel(kernel, static_cast<unsigned>(plan.blocks), threads, arguments, plan.shared, stream);
  }
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
