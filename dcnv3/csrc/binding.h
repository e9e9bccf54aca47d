// From tensors to a `Problem`, for every device. Through torch's stable ABI: one build serves several torch versions, and
// compiles in seconds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "packed.h"

namespace dcnv3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments that are not tensors, in the order of the schema (dcnv3/registration.py).
#define DCNV3_ARGUMENTS                                                                                            \
  int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h,       \
      int64_t padding_w, int64_t dilation_h, int64_t dilation_w, double offset_scale, bool remove_center,          \
      int64_t activation
#define DCNV3_PASS                                                                                                 \
  groups, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, offset_scale,      \
      remove_center, activation

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: STD_TORCH_CHECK(false, "dcnv3: expected float64, float32, bfloat16 or float16");
  }
  return Type::kFloat;
}

inline Tensor copy_of(const Tensor& t) {
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

// A dimension of size 1 may have any stride in a contiguous tensor; the kernels read that of dimension 2.
inline Tensor packed(const Tensor& t) { return t.is_contiguous() && t.stride(2) == t.size(3) ? t : copy_of(t); }

// `t` itself where its pixels follow each other at one distance (a slice of the channels does), else a packed copy.
inline Tensor in_rows(const Tensor& t) {
  const bool even = t.stride(3) == 1 && t.stride(1) == t.size(2) * t.stride(2) && t.stride(0) == t.size(1) * t.stride(1);
  return even ? t : packed(t);
}

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d != 0 ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// The last line of defence: `dcnv3.dcnv3` has checked all of this with better words.
inline Problem problem_of(const Tensor& value, const Tensor& offset, const Tensor& mask, DCNV3_ARGUMENTS) {
  STD_TORCH_CHECK(value.dim() == 4 && offset.dim() == 4 && mask.dim() == 4, "dcnv3: expected tensors of 4 dimensions");
  STD_TORCH_CHECK(offset.scalar_type() == value.scalar_type() && mask.scalar_type() == value.scalar_type(),
                  "dcnv3: expected value, offset and mask of one dtype");
  STD_TORCH_CHECK(offset.get_device_index() == value.get_device_index() && mask.get_device_index() == value.get_device_index(),
                  "dcnv3: expected value, offset and mask on one device");
  STD_TORCH_CHECK(groups > 0 && kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 &&
                      dilation_w > 0 && padding_h >= 0 && padding_w >= 0 && activation >= 0 && activation <= 2 &&
                      (!remove_center || (kernel_h == kernel_w && kernel_h % 2 == 1 && kernel_h > 1)),
                  "dcnv3: an argument is out of its range");
  STD_TORCH_CHECK(value.size(3) > 0 && value.size(3) % groups == 0, "dcnv3: channels are not a multiple of groups=", groups);
  Problem q{};
  q.batch = value.size(0), q.height = value.size(1), q.width = value.size(2);
  q.groups = groups, q.group_channels = value.size(3) / groups;
  q.points = kernel_h * kernel_w - (remove_center ? 1 : 0);
  q.kernel_h = kernel_h, q.kernel_w = kernel_w, q.stride_h = stride_h, q.stride_w = stride_w;
  q.padding_h = padding_h, q.padding_w = padding_w, q.dilation_h = dilation_h, q.dilation_w = dilation_w;
  q.offset_scale = offset_scale, q.remove_center = remove_center, q.activation = static_cast<int>(activation);
  const int64_t span_h = q.height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1;
  const int64_t span_w = q.width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1;
  STD_TORCH_CHECK(q.height > 0 && q.width > 0 && span_h >= 0 && span_w >= 0, "dcnv3: value is smaller than the kernel: ",
                  shape(value));
  STD_TORCH_CHECK(q.height * q.width < (int64_t(1) << 31), "dcnv3: more than 2^31 pixels in an image: ", shape(value));
  q.out_height = span_h / stride_h + 1, q.out_width = span_w / stride_w + 1;
  for (const Tensor* t : {&offset, &mask}) {
    const int64_t depth = groups * q.points * (t == &offset ? 2 : 1);
    STD_TORCH_CHECK(t->size(0) == q.batch && t->size(1) == q.out_height && t->size(2) == q.out_width && t->size(3) == depth,
                    "dcnv3: ", t == &offset ? "offset" : "mask", " has shape ", shape(*t), ", expected [", q.batch, ", ",
                    q.out_height, ", ", q.out_width, ", ", depth, "]");
  }
  q.value_stride = value.stride(2), q.offset_stride = offset.stride(2), q.mask_stride = mask.stride(2);
  return q;
}

inline PackedProblem plain(const Problem& problem) {
  PackedProblem q{problem};
  q.grad_offset_stride = 2 * q.groups * q.points, q.grad_mask_stride = q.groups * q.points;
  return q;
}

// A pixel's row of `places` is its offsets, its logits, with `center` a logit a group, and padding. The rows are even.
inline PackedProblem problem_of(const Tensor& value, Tensor places, DCNV3_ARGUMENTS, bool center) {
  const int64_t points = groups * (kernel_h * kernel_w - (remove_center ? 1 : 0));
  const int64_t end = 3 * points + (center ? groups : 0);
  STD_TORCH_CHECK(points > 0 && places.size(3) >= end, "dcnv3: packed has shape ", shape(places), ", expected at least ", end,
                  " numbers a pixel");
  const Tensor offset = torch::stable::narrow(places, 3, 0, 2 * points);
  const Tensor mask = torch::stable::narrow(places, 3, 2 * points, points);
  PackedProblem q{problem_of(value, offset, mask, DCNV3_PASS)};
  STD_TORCH_CHECK(!center || (stride_h == 1 && stride_w == 1 && q.out_height == q.height && q.out_width == q.width),
                  "dcnv3: the centre needs an output of the value's size");
  q.center = center, q.padding = places.size(3) - end;
  q.center_stride = places.stride(2);
  q.grad_offset_stride = q.grad_mask_stride = q.grad_center_stride = places.size(3);
  return q;
}

inline int64_t bytes_of(const Tensor& t) {
  const Type type = type_of(t);
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

// `t` pointed at the parts of `places`, and at those of their gradient where there is one.
inline void point_at(PackedTensors& t, const PackedProblem& q, const Tensor& places, const Tensor* gradient = nullptr) {
  const int64_t part = q.groups * q.points * bytes_of(places);
  const char* row = static_cast<const char*>(places.data_ptr());
  t.offset = row, t.mask = row + 2 * part, t.center = row + 3 * part;
  if (gradient == nullptr) return;
  char* to = static_cast<char*>(gradient->data_ptr());
  t.grad_offset = to, t.grad_mask = to + 2 * part, t.grad_center = to + 3 * part;
  t.grad_padding = to + 3 * part + (q.center ? q.groups * bytes_of(places) : 0);
}

inline void check_gradient(const Tensor& grad_output, const Tensor& value, const Problem& q) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.scalar_type() == value.scalar_type() &&
                      grad_output.get_device_index() == value.get_device_index() && grad_output.size(0) == q.batch &&
                      grad_output.size(1) == q.out_height && grad_output.size(2) == q.out_width &&
                      grad_output.size(3) == q.channels(),
                  "dcnv3: the gradient of the output has shape ", shape(grad_output));
}

}  // namespace dcnv3
