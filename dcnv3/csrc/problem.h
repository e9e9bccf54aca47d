// One call of the operator as plain numbers: what every kernel is given.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DCNV3_BOTH __host__ __device__
#else
#define DCNV3_BOTH
#endif

namespace dcnv3 {

enum Activation { kSoftmax = 0, kSigmoid = 1, kNone = 2 };  // as in dcnv3/geometry.py
enum class Type { kDouble, kFloat, kBFloat16, kHalf };

struct Problem {
  int64_t batch, height, width, out_height, out_width;
  int64_t groups, group_channels, points;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  double offset_scale;
  bool remove_center;
  int activation;
  // Elements from one pixel to the next; the rows of a tensor follow each other without a gap.
  int64_t value_stride, offset_stride, mask_stride;

  DCNV3_BOTH int64_t channels() const { return groups * group_channels; }
  DCNV3_BOTH int64_t pixels() const { return out_height * out_width; }
};

// Tensors of a call, untyped. Outputs (output, grad_*) are contiguous.
struct Tensors {
  const void *value, *offset, *mask;
  void* output;
  const void* grad_output;  // contiguous
  void *grad_value, *grad_offset, *grad_mask;
  void* sum;  // where the gradient of the value is summed, in the type of the arithmetic: grad_value itself if it has that
};

}  // namespace dcnv3
