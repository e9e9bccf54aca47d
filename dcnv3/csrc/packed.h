// A call whose offsets, logits and centre's logits are parts of one tensor, as one matrix product gives them. A plain call is
// one without centre and padding.
#pragma once

#include "problem.h"

namespace dcnv3 {

struct PackedProblem : Problem {
  // Elements from one pixel's gradients to the next's, and from one pixel's centre's logits to the next's.
  int64_t center_stride, grad_offset_stride, grad_mask_stride, grad_center_stride;
  bool center;      // mix the value back in: output = (1 - s) * sampled + s * value, s = sigmoid(center), one a group
  int64_t padding;  // elements after a pixel's last gradient, set to zero
};

struct PackedTensors : Tensors {  // grad_offset and grad_mask have strides of their own
  const void* center;
  void *grad_center, *grad_padding;  // those of the first pixel
};

}  // namespace dcnv3
