// torch.ops.dcnv3 on CUDA, plain and packed: any device, on its current stream.
#include "../binding.h"

#include <Python.h>

#include "launch.h"
#include "stream.h"

namespace dcnv3 {
namespace {

void check(gpu::Status status, const Problem& q) {
  const int error = status.error;
  STD_TORCH_CHECK(error != gpu::kTooManyPoints, "dcnv3: a kernel of ", q.kernel_h, " by ", q.kernel_w,
                  " has more points than the cuda backend's shared memory holds; use backend='reference'");
  STD_TORCH_CHECK(error != gpu::kTooManyPairs, "dcnv3: an output of ", q.out_height, " by ", q.out_width, " pixels and ",
                  q.groups, " groups is more than 2^31 for one image; use backend='reference'");
  STD_TORCH_CHECK(error == 0, gpu::describe(status));
}

// Kernels reckon with the bytes from a pixel to the next in 32 bits.
constexpr int64_t kLargestStride = int64_t(1) << 28;

// The value as a forward pass reads it.
Tensor readable(const Tensor& value) {
  const Tensor rows = in_rows(value);
  return rows.stride(2) < kLargestStride ? rows : copy_of(rows);
}

// `t` points at the places already.
Tensor run_forward(const Tensor& value, const PackedProblem& q, PackedTensors t) {
  Tensor output = torch::stable::new_empty(value, {q.batch, q.out_height, q.out_width, q.channels()});
  t.value = value.data_ptr(), t.output = output.data_ptr();
  check(gpu::launch_forward(type_of(value), q, t, current_stream(value.get_device_index())), q);
  return output;
}

// The gradient of the value; `t` points at the places and at their gradients already.
Tensor run_backward(const Tensor& grad_output, const Tensor& value, const PackedProblem& q, PackedTensors t,
                    bool deterministic) {
  check_gradient(grad_output, value, q);
  const Type type = type_of(value);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  const bool narrow = type == Type::kBFloat16 || type == Type::kHalf;
  // Fixed point is of 64 bits: for float64, less than its own precision, but the same every time.
  Tensor sum = deterministic ? torch::stable::new_empty(value, value.sizes(), ScalarType::Long)
               : narrow      ? torch::stable::new_empty(value, value.sizes(), ScalarType::Float)
                             : grad_value;
  Tensor bound = torch::stable::new_empty(value, {2}, ScalarType::Float);
  t.value = value.data_ptr(), t.grad_output = grad_output.data_ptr();
  t.grad_value = grad_value.data_ptr(), t.sum = sum.data_ptr();
  check(gpu::launch_backward(type, q, t, deterministic, static_cast<float*>(bound.data_ptr()),
                             current_stream(value.get_device_index())),
        q);
  return grad_value;
}

Tensor forward(Tensor value, Tensor offset, Tensor mask, DCNV3_ARGUMENTS) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  value = readable(value), offset = in_rows(offset), mask = in_rows(mask);
  PackedTensors t{};
  t.offset = offset.data_ptr(), t.mask = mask.data_ptr();
  return run_forward(value, plain(problem_of(value, offset, mask, DCNV3_PASS)), t);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor value, Tensor offset, Tensor mask,
                                            DCNV3_ARGUMENTS, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  value = packed(value), offset = in_rows(offset), mask = in_rows(mask), grad_output = packed(grad_output);
  const PackedProblem q = plain(problem_of(value, offset, mask, DCNV3_PASS));
  Tensor grad_offset = torch::stable::new_empty(offset, offset.sizes());
  Tensor grad_mask = torch::stable::new_empty(mask, mask.sizes());
  PackedTensors t{};
  t.offset = offset.data_ptr(), t.mask = mask.data_ptr();
  t.grad_offset = grad_offset.data_ptr(), t.grad_mask = grad_mask.data_ptr();
  return {run_backward(grad_output, value, q, t, deterministic), grad_offset, grad_mask};
}

Tensor packed_forward(Tensor value, Tensor places, DCNV3_ARGUMENTS, bool center) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  value = readable(value), places = in_rows(places);
  const PackedProblem q = problem_of(value, places, DCNV3_PASS, center);
  PackedTensors t{};
  point_at(t, q, places);
  return run_forward(value, q, t);
}

std::tuple<Tensor, Tensor> packed_backward(Tensor grad_output, Tensor value, Tensor places, DCNV3_ARGUMENTS, bool center,
                                           bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  value = packed(value), places = in_rows(places), grad_output = packed(grad_output);
  const PackedProblem q = problem_of(value, places, DCNV3_PASS, center);
  Tensor grad_places = torch::stable::new_empty(places, places.sizes());
  PackedTensors t{};
  point_at(t, q, places, &grad_places);
  return {run_backward(grad_output, value, q, t, deterministic), grad_places};
}

}  // namespace
}  // namespace dcnv3

STABLE_TORCH_LIBRARY_IMPL(dcnv3, CUDA, m) {
  m.impl("forward", TORCH_BOX(&dcnv3::forward));
  m.impl("backward", TORCH_BOX(&dcnv3::backward));
  m.impl("packed_forward", TORCH_BOX(&dcnv3::packed_forward));
  m.impl("packed_backward", TORCH_BOX(&dcnv3::packed_backward));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "The CUDA kernels; importing registers them.", -1,
                             nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
