// torch.ops.dcnv3.norm_forward, norm_backward and their kin on CUDA: any device, on its current stream.
#include "../norm_binding.h"

#include <optional>

#include "norm_plan.h"
#include "stream.h"

namespace dcnv3 {
namespace {

void check_norm(gpu::Status status) { STD_TORCH_CHECK(status.error == 0, gpu::describe(status)); }

std::tuple<Tensor, Tensor, Tensor> run_forward(Tensor x, const Tensor* residual, const Tensor* factor, Tensor weight, Tensor bias,
                                               double eps, bool gelu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormProblem q = norm_of(x, weight, bias, eps, gelu);
  x = dense(x), weight = dense(weight), bias = dense(bias);
  Tensor output = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {q.rows}, sum_type(x)), rstd = torch::stable::new_empty(x, {q.rows}, sum_type(x));
  if (q.rows > 0) {
    NormTensors t = pointers(x, weight, bias, output, mean, rstd);
    const Tensor added = residual == nullptr ? x : dense(*residual);
    if (residual != nullptr) check_like(added, x, "the residual"), t.residual = added.data_ptr();
    if (factor != nullptr) take_factor(q, *factor, x), t.factor = factor->data_ptr();
    check_norm(gpu::launch_norm_forward(type_of(x), q, t, current_stream(x.get_device_index())));
  }
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
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormProblem q = norm_of(x, weight, bias, 0, gelu);
  check_like(grad_output, x, "the output's gradient");
  check_beside(beside, x);
  check_statistics(mean, x, q), check_statistics(rstd, x, q);
  x = dense(x), weight = dense(weight), bias = dense(bias), grad_output = dense(grad_output);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(bias, bias.sizes());
  if (q.rows == 0) {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  const int64_t share = rows_of_a_warp(q.rows), shares = (q.rows + share - 1) / share;
  Tensor sums = torch::stable::new_empty(x, {shares, gpu::sums_stride(q)}, sum_type(x));
  NormTensors t = pointers(x, weight, bias, grad_x, mean, rstd);
  const std::array<Tensor, 2> kept = take_beside(q, t, beside, x);
  t.grad_output = grad_output.data_ptr(), t.grad_x = grad_x.data_ptr();
  t.grad_weight = grad_weight.data_ptr(), t.grad_bias = grad_bias.data_ptr(), t.sums = sums.data_ptr();
  const gpu::Status status = gpu::launch_norm_backward(type_of(x), q, t, current_stream(x.get_device_index()));
  STD_TORCH_CHECK(status.error != gpu::kTooManyPoints, "dcnv3: a norm of ", q.channels,
                  " channels needs more shared memory than a block has");
  check_norm(status);
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

}  // namespace
}  // namespace dcnv3

STABLE_TORCH_LIBRARY_IMPL(dcnv3, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&dcnv3::norm_forward));
  m.impl("norm_residual", TORCH_BOX(&dcnv3::norm_residual));
  m.impl("norm_backward", TORCH_BOX(&dcnv3::norm_backward));
  m.impl("norm_backward_split", TORCH_BOX(&dcnv3::norm_backward_split));
  m.impl("norm_backward_scaled", TORCH_BOX(&dcnv3::norm_backward_scaled));
}
