#include "dispatch.cuh"
#include "forward.cuh"

namespace dcnv3 {
namespace gpu {
namespace {

template <typename S, int N>
int run(const PackedProblem& q, const PackedTensors& t, cudaStream_t stream) {
  const Plan plan = make_plan(q, sizeof(Compute<S>), N, false);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  const Arguments arguments = make_arguments(q, t, plan, sizeof(S), 0);
  return with_lanes<N>(q, plan, [&](auto lanes) {
    return for_images<S, S>(arguments, plan, [&](const Arguments& a, unsigned blocks) {
      forward_kernel<S, N, lanes.value><<<blocks, plan.warps * kWarp, plan.shared, stream>>>(a);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace

Status launch_forward(Type type, const PackedProblem& q, const PackedTensors& t, void* stream) {
  return checked([&] {
    return with_type(type, q, t.value, t.output, [&](auto s, auto width) -> int {
      return run<decltype(s), width.value>(q, t, static_cast<cudaStream_t>(stream));
    });
  });
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace gpu
}  // namespace dcnv3
