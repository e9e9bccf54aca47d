// The CUDA kernels as C functions over host memory, for float and double (emulation.h).
#define DCNV3_EMULATION
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

namespace dcnv3 {
namespace gpu {

alignas(64) unsigned char shared_memory[kSharedBytes];

namespace {

template <typename S, int N>
int run(const Problem& q, const Tensors& t, bool backward, bool deterministic) {
  Arguments a{};
  const Plan plan = make_plan(q, sizeof(S), N, backward);
  if (plan.shared > kSharedBytes) return 1;
  a.q = q, a.t = t, a.team_log2 = plan.team_log2, a.chunk = plan.chunk;
  a.pairs = q.batch * q.pixels() * q.groups;
  // what a kernel reads before it writes must not pass for zeros
  std::fill(shared_memory, shared_memory + kSharedBytes, 0xff);
  if (!backward) {
    emulation::launch(plan.blocks, plan.warps, [=] { forward_kernel<S, N>(a); });
    return 0;
  }
  const int64_t elements = q.batch * q.height * q.width * q.channels();
  if (!deterministic) {
    a.t.sum = t.grad_value;
    std::fill_n(static_cast<S*>(t.grad_value), elements, S(0));
    emulation::launch(plan.blocks, plan.warps, [=] { backward_kernel<S, N, S>(a); });
    return 0;
  }
  float bound[2] = {0, 0};
  const int64_t pixels = q.batch * q.pixels(), points = q.groups * q.points;
  emulation::launch(2, 2, [&] {
    bound_kernel<S>(static_cast<const S*>(t.grad_output), pixels, q.channels(), q.channels(), bound);
  });
  emulation::launch(2, 2, [&] {
    bound_kernel<S>(static_cast<const S*>(t.mask), pixels, points, q.mask_stride, bound + 1);
  });
  std::vector<Fixed> sum(elements, 0);
  a.bound = bound, a.t.sum = sum.data();
  while ((int64_t(1) << a.room_log2) < q.pixels() * q.points) ++a.room_log2;
  emulation::launch(plan.blocks, plan.warps, [=] { backward_kernel<S, N, Fixed>(a); });
  emulation::launch(3, 2, [=] { finish_kernel<S, Fixed>(a, elements); });
  return 0;
}

}  // namespace
}  // namespace gpu
}  // namespace dcnv3

// sizes: batch, height, width, out_height, out_width, groups, group_channels, then kernel, stride, padding, dilation (h, w).
// pointers: value, offset, mask, output, grad_output, grad_value, grad_offset, grad_mask; all packed.
extern "C" int run(const int64_t* sizes, double offset_scale, int remove_center, int activation, void* const* pointers,
                   int is_double, int wide, int backward, int deterministic) {
  dcnv3::Problem q{};
  q.batch = sizes[0], q.height = sizes[1], q.width = sizes[2], q.out_height = sizes[3], q.out_width = sizes[4];
  q.groups = sizes[5], q.group_channels = sizes[6];
  q.kernel_h = sizes[7], q.kernel_w = sizes[8], q.stride_h = sizes[9], q.stride_w = sizes[10];
  q.padding_h = sizes[11], q.padding_w = sizes[12], q.dilation_h = sizes[13], q.dilation_w = sizes[14];
  q.points = q.kernel_h * q.kernel_w - (remove_center ? 1 : 0);
  q.offset_scale = offset_scale, q.remove_center = remove_center != 0, q.activation = activation;
  q.value_stride = q.channels(), q.mask_stride = q.groups * q.points, q.offset_stride = 2 * q.mask_stride;
  dcnv3::Tensors t{};
  t.value = pointers[0], t.offset = pointers[1], t.mask = pointers[2], t.output = pointers[3];
  t.grad_output = pointers[4], t.grad_value = pointers[5], t.grad_offset = pointers[6], t.grad_mask = pointers[7];
  using namespace dcnv3::gpu;
  if (is_double) {
    return wide ? dcnv3::gpu::run<double, 2>(q, t, backward, deterministic) : dcnv3::gpu::run<double, 1>(q, t, backward, deterministic);
  }
  return wide ? dcnv3::gpu::run<float, 4>(q, t, backward, deterministic) : dcnv3::gpu::run<float, 1>(q, t, backward, deterministic);
}
