// From tensors to a `NormProblem`, for every device.
#pragma once

#include "binding.h"
#include "norm.h"

namespace dcnv3 {

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : copy_of(t); }

// Statistics and sums of a tensor's numbers are kept in this type.
inline ScalarType sum_type(const Tensor& t) { return type_of(t) == Type::kDouble ? ScalarType::Double : ScalarType::Float; }

// The last line of defence: `dcnv3.fused` has checked all of this.
inline NormProblem norm_of(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool gelu) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "dcnv3: a norm of ", shape(x));
  NormProblem q{};
  q.channels = x.size(x.dim() - 1), q.rows = x.numel() / q.channels, q.eps = eps, q.gelu = gelu;
  for (const Tensor* t : {&weight, &bias}) {
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->get_device_index() == x.get_device_index() && t->dim() == 1 &&
                        t->size(0) == q.channels,
                    "dcnv3: weight and bias of a norm of ", shape(x), " have shape [", q.channels, "] and its dtype and device");
  }
  return q;
}

// `grad_residual`: null, or a gradient of x to be added.
inline void check_norm_gradient(const Tensor& grad_output, const Tensor* grad_residual, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                const NormProblem& q) {
  for (const Tensor* t : {&grad_output, grad_residual}) {
    STD_TORCH_CHECK(t == nullptr || (t->scalar_type() == x.scalar_type() && t->get_device_index() == x.get_device_index() &&
                                     t->numel() == x.numel()),
                    "dcnv3: the gradient of the norm's output has shape ", shape(*t));
  }
  for (const Tensor* t : {&mean, &rstd}) {
    STD_TORCH_CHECK(t->scalar_type() == sum_type(x) && t->numel() == q.rows && t->is_contiguous(),
                    "dcnv3: statistics of ", q.rows, " rows are expected");
  }
}

inline NormTensors pointers(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& output,
                            const Tensor& mean, const Tensor& rstd) {
  NormTensors t{};
  t.x = x.data_ptr(), t.weight = weight.data_ptr(), t.bias = bias.data_ptr(), t.output = output.data_ptr();
  t.mean = mean.data_ptr(), t.rstd = rstd.data_ptr();
  return t;
}

}  // namespace dcnv3
