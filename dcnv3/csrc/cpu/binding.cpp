// torch.ops.dcnv3.forward and .backward on the CPU: tensors in, threads over pixels or images, tensors out.
#include "../binding.h"

#include <Python.h>

#include <algorithm>

#include "kernels_api.h"
#include "threads.h"

namespace dcnv3 {
namespace {

// Points of a share of work below which another thread costs more than it saves.
constexpr int64_t kPointsPerShare = 4096;

// `t` points at the places already.
Tensor run_forward(const Tensor& value, const PackedProblem& q, PackedTensors t) {
  Tensor output = on_huge_pages(torch::stable::new_empty(value, {q.batch, q.out_height, q.out_width, q.channels()}));
  t.value = value.data_ptr(), t.output = output.data_ptr();
  const Type type = type_of(value);
  const int64_t grain = std::max<int64_t>(1, kPointsPerShare / (q.groups * q.points));
  const CpuKernels& kernels = cpu_kernels();
  parallel(q.batch * q.pixels(), grain,
           [&](int64_t begin, int64_t end) { kernels.forward(type, q, t, begin, end); });
  return output;
}

// The gradient of the value; `t` points at the places and at their gradients already.
Tensor run_backward(const Tensor& grad_output, const Tensor& value, const PackedProblem& q, PackedTensors t) {
  check_gradient(grad_output, value, q);
  const Type type = type_of(value);
  Tensor grad_value = on_huge_pages(torch::stable::new_empty(value, value.sizes()));
  const bool narrow = type == Type::kBFloat16 || type == Type::kHalf;
  Tensor sum = narrow ? on_huge_pages(torch::stable::new_empty(value, value.sizes(), ScalarType::Float)) : grad_value;
  t.value = value.data_ptr(), t.grad_output = grad_output.data_ptr();
  t.grad_value = grad_value.data_ptr(), t.sum = sum.data_ptr();

  // A share is some groups of one image; as many groups as still leave every thread a few shares.
  const int64_t wanted = threads() == 1 ? 1 : 4 * threads();
  const int64_t cuts = std::clamp<int64_t>(q.batch == 0 ? 1 : (wanted + q.batch - 1) / q.batch, 1, q.groups);
  const int64_t per_cut = (q.groups + cuts - 1) / cuts, shares = (q.groups + per_cut - 1) / per_cut;
  const int64_t grain = std::max<int64_t>(1, kPointsPerShare / (per_cut * q.points * q.pixels()));
  const CpuKernels& kernels = cpu_kernels();
  parallel(q.batch * shares, grain, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share % shares * per_cut;
      kernels.backward(type, q, t, share / shares, first, std::min(first + per_cut, q.groups));
    }
  });
  return grad_value;
}

Tensor forward(Tensor value, Tensor offset, Tensor mask, DCNV3_ARGUMENTS) {
  value = in_rows(value), offset = in_rows(offset), mask = in_rows(mask);
  PackedTensors t{};
  t.offset = offset.data_ptr(), t.mask = mask.data_ptr();
  return run_forward(value, plain(problem_of(value, offset, mask, DCNV3_PASS)), t);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor value, Tensor offset, Tensor mask,
                                            DCNV3_ARGUMENTS, bool /*deterministic: always is*/) {
  value = packed(value), offset = in_rows(offset), mask = in_rows(mask), grad_output = packed(grad_output);
  const PackedProblem q = plain(problem_of(value, offset, mask, DCNV3_PASS));
  Tensor grad_offset = on_huge_pages(torch::stable::new_empty(offset, offset.sizes()));
  Tensor grad_mask = on_huge_pages(torch::stable::new_empty(mask, mask.sizes()));
  PackedTensors t{};
  t.offset = offset.data_ptr(), t.mask = mask.data_ptr();
  t.grad_offset = grad_offset.data_ptr(), t.grad_mask = grad_mask.data_ptr();
  return {run_backward(grad_output, value, q, t), grad_offset, grad_mask};
}

Tensor packed_forward(Tensor value, Tensor places, DCNV3_ARGUMENTS, bool center) {
  value = in_rows(value), places = in_rows(places);
  const PackedProblem q = problem_of(value, places, DCNV3_PASS, center);
  PackedTensors t{};
  point_at(t, q, places);
  return run_forward(value, q, t);
}

std::tuple<Tensor, Tensor> packed_backward(Tensor grad_output, Tensor value, Tensor places, DCNV3_ARGUMENTS, bool center,
                                           bool /*deterministic: always is*/) {
  value = packed(value), places = in_rows(places), grad_output = packed(grad_output);
  const PackedProblem q = problem_of(value, places, DCNV3_PASS, center);
  Tensor grad_places = on_huge_pages(torch::stable::new_empty(places, places.sizes()));
  PackedTensors t{};
  point_at(t, q, places, &grad_places);
  return {run_backward(grad_output, value, q, t), grad_places};
}

}  // namespace
}  // namespace dcnv3

STABLE_TORCH_LIBRARY_IMPL(dcnv3, CPU, m) {
  m.impl("forward", TORCH_BOX(&dcnv3::forward));
  m.impl("backward", TORCH_BOX(&dcnv3::backward));
  m.impl("packed_forward", TORCH_BOX(&dcnv3::packed_forward));
  m.impl("packed_backward", TORCH_BOX(&dcnv3::packed_backward));
}

static PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(dcnv3::cpu_kernels().name); }

static PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels: baseline, avx2 or avx512."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The CPU kernels; importing registers them.", -1, methods,
                             nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
