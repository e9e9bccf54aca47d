#include "dispatch.cuh"
#include "forward.cuh"

namespace dcnv3 {
namespace gpu {

int launch_forward(Type type, const Problem& q, const Tensors& t, void* stream) {
  return with_type(type, q, t.value, t.output, [&](auto s, auto width) -> int {
    using S = decltype(s);
    const Plan plan = make_plan(q, sizeof(Compute<S>), width.value, false);
    if (plan.shared > kSharedBytes) return kTooManyPoints;
    if (plan.blocks == 0) return 0;
    const Arguments a = make_arguments(q, t, plan);
    forward_kernel<S, width.value><<<static_cast<unsigned>(plan.blocks), plan.warps * kWarp, plan.shared,
                                     static_cast<cudaStream_t>(stream)>>>(a);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace gpu
}  // namespace dcnv3
