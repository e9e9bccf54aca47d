// From tensors to a `NormProblem`, for every device.
#pragma once

#include <array>

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

inline void check_like(const Tensor& t, const Tensor& x, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index() && t.numel() == x.numel(),
                  "dcnv3: ", what, " has shape ", shape(t), ", the norm's input ", shape(x));
}

inline void check_statistics(const Tensor& t, const Tensor& x, const NormProblem& q) {
  STD_TORCH_CHECK(t.scalar_type() == sum_type(x) && t.numel() == q.rows && t.is_contiguous(), "dcnv3: statistics of ", q.rows,
                  " rows are expected");
}

// Where there is a `factor`, one number for as many rows as another: the rows of a sample.
inline void take_factor(NormProblem& q, const Tensor& factor, const Tensor& x) {
  STD_TORCH_CHECK(factor.scalar_type() == x.scalar_type() && factor.get_device_index() == x.get_device_index() &&
                      factor.is_contiguous() && factor.numel() > 0 && q.rows % factor.numel() == 0,
                  "dcnv3: factors of ", q.rows, " rows have shape ", shape(factor));
  q.rows_of_factor = q.rows / factor.numel();
}

inline NormTensors pointers(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& output,
                            const Tensor& mean, const Tensor& rstd) {
  NormTensors t{};
  t.x = x.data_ptr(), t.weight = weight.data_ptr(), t.bias = bias.data_ptr(), t.output = output.data_ptr();
  t.mean = mean.data_ptr(), t.rstd = rstd.data_ptr();
  return t;
}

// What goes into a backward pass beside the gradient of the output; null where there is none.
struct Beside {
  const Tensor *again, *residual, *factor;
};

inline void check_beside(const Beside& beside, const Tensor& x) {
  if (beside.again != nullptr) check_like(*beside.again, x, "the output's second gradient");
  if (beside.residual != nullptr) check_like(*beside.residual, x, "the residual's gradient");
}

// Gives `q` and `t` what there is of them. The tensors that it returns hold the memory that `t` points to.
inline std::array<Tensor, 2> take_beside(NormProblem& q, NormTensors& t, const Beside& beside, const Tensor& x) {
  std::array<Tensor, 2> kept{x, x};
  if (beside.again != nullptr) kept[0] = dense(*beside.again), t.grad_again = kept[0].data_ptr();
  if (beside.residual != nullptr) kept[1] = dense(*beside.residual), t.grad_residual = kept[1].data_ptr();
  if (beside.factor != nullptr) take_factor(q, *beside.factor, x), t.factor = beside.factor->data_ptr();
  return kept;
}

}  // namespace dcnv3
