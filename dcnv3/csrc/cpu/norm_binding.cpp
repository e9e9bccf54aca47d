// torch.ops.dcnv3.norm_forward, norm_backward, their kin, gelu and gelu_backward on the CPU: tensors in, threads over rows, tensors out.
#include "../norm_binding.h"

#include <algorithm>
#include <optional>

#include "kernels_api.h"
#include "threads.h"

namespace dcnv3 {
namespace {

constexpr int64_t kElementsPerShare = 16384;  // of work, below which another thread costs more than it saves

std::tuple<Tensor, Tensor, Tensor> run_forward(Tensor x, const Tensor* residual, const Tensor* factor, Tensor weight, Tensor bias,
                                               double eps, bool gelu) {
  NormProblem q = norm_of(x, weight, bias, eps, gelu);
  x = dense(x), weight = dense(weight), bias = dense(bias);
  Tensor output = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {q.rows}, sum_type(x)), rstd = torch::stable::new_empty(x, {q.rows}, sum_type(x));
  NormTensors t = pointers(x, weight, bias, output, mean, rstd);
  const Tensor added = residual == nullptr ? x : dense(*residual);
  if (residual != nullptr) check_like(added, x, "the residual"), t.residual = added.data_ptr();
  if (factor != nullptr) take_factor(q, *factor, x), t.factor = factor->data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  parallel(q.rows, std::max<int64_t>(1, kElementsPerShare / q.channels),
           [&](int64_t begin, int64_t end) { kernels.norm_forward(type_of(x), q, t, begin, end); });
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, bool gelu) {
  return run_forward(x, nullptr, nullptr, weight, bias, eps, gelu);
}

std::tuple<Tensor, Tensor, Tensor> norm_residual(Tensor x, Tensor residual, std::optional<Tensor> factor, Tensor weight,
                                                 Tensor bias, double eps) {
  return run_forward(x, &residual, factor ? &*factor : nullptr, weight, bias, eps, false);
}

std::tuple<Tensor, Tensor, Tensor> run_backward(Tensor grad_output, const Beside& beside, Tensor x, Tensor weight, Tensor bias,
                                                Tensor mean, Tensor rstd, bool gelu) {
  NormProblem q = norm_of(x, weight, bias, 0, gelu);
  check_like(grad_output, x, "the output's gradient");
  check_beside(beside, x);
  check_statistics(mean, x, q), check_statistics(rstd, x, q);
  x = dense(x), weight = dense(weight), bias = dense(bias), grad_output = dense(grad_output);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(bias, bias.sizes());
  const int64_t share = rows_of_a_share(q.rows), shares = (q.rows + share - 1) / share;
  Tensor sums = torch::stable::new_empty(x, {shares, 2 * q.channels}, sum_type(x));
  NormTensors t = pointers(x, weight, bias, grad_x, mean, rstd);
  const std::array<Tensor, 2> kept = take_beside(q, t, beside, x);
  t.grad_output = grad_output.data_ptr(), t.grad_x = grad_x.data_ptr();
  t.grad_weight = grad_weight.data_ptr(), t.grad_bias = grad_bias.data_ptr(), t.sums = sums.data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  parallel(shares, std::max<int64_t>(1, kElementsPerShare / (share * q.channels)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.norm_backward(type_of(x), q, t, i, i * share, std::min(q.rows, (i + 1) * share));
    }
  });
  kernels.norm_sums(type_of(x), q, t, shares);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                 Tensor rstd, bool gelu) {
  return run_backward(grad_output, {}, x, weight, bias, mean, rstd, gelu);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_split(Tensor grad_output, std::optional<Tensor> grad_again, Tensor grad_residual,
                                                       Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) {
  const Beside beside{grad_again ? &*grad_again : nullptr, &grad_residual, nullptr};
  return run_backward(grad_output, beside, x, weight, bias, mean, rstd, false);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_scaled(Tensor grad_output, Tensor factor, Tensor x, Tensor weight, Tensor bias,
                                                        Tensor mean, Tensor rstd) {
  return run_backward(grad_output, {nullptr, nullptr, &factor}, x, weight, bias, mean, rstd, false);
}

void run_gelu(const Tensor& x, const Tensor* grad, const Tensor& to) {
  const CpuKernels& kernels = cpu_kernels();
  parallel(x.numel(), kElementsPerShare, [&](int64_t begin, int64_t end) {
    kernels.gelu(type_of(x), x.data_ptr(), grad == nullptr ? nullptr : grad->data_ptr(), to.data_ptr(), begin, end);
  });
}

Tensor gelu(Tensor x) {
  x = dense(x);
  const Tensor output = torch::stable::new_empty(x, x.sizes());
  run_gelu(x, nullptr, output);
  return output;
}

void gelu_in_place(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "dcnv3: GELU in place needs a contiguous tensor");
  run_gelu(x, nullptr, x);
}

Tensor gelu_backward(Tensor grad_output, Tensor x) {
  STD_TORCH_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.numel() == x.numel(),
                  "dcnv3: the gradient of the output is not like x");
  x = dense(x), grad_output = dense(grad_output);
  const Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  run_gelu(x, &grad_output, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace dcnv3

STABLE_TORCH_LIBRARY_IMPL(dcnv3, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&dcnv3::norm_forward));
  m.impl("norm_residual", TORCH_BOX(&dcnv3::norm_residual));
  m.impl("norm_backward", TORCH_BOX(&dcnv3::norm_backward));
  m.impl("norm_backward_split", TORCH_BOX(&dcnv3::norm_backward_split));
  m.impl("norm_backward_scaled", TORCH_BOX(&dcnv3::norm_backward_scaled));
  m.impl("gelu", TORCH_BOX(&dcnv3::gelu));
  m.impl("gelu_", TORCH_BOX(&dcnv3::gelu_in_place));
  m.impl("gelu_backward", TORCH_BOX(&dcnv3::gelu_backward));
}
