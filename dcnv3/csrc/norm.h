// One call of a norm as plain numbers: what every kernel is given.
#pragma once

#include <cstdint>

#include "problem.h"

namespace dcnv3 {

// LayerNorm over the last dimension of `rows` rows, with GELU after it or without.
struct NormProblem {
  int64_t rows, channels;
  double eps;
  bool gelu;
};

// Tensors of a call, untyped and contiguous. mean, rstd and `sums` are in the type of the arithmetic: one number a row, and
// [shares, 2, C], the gradients of weight and bias summed over each share of the rows.
struct NormTensors {
  const void *x, *weight, *bias;
  void *output, *mean, *rstd;
  const void* grad_output;
  void *grad_x, *grad_weight, *grad_bias, *sums;
};

// A share's rows in backward. Their number does not depend on that of the threads, and so neither do the sums.
inline int64_t rows_of_a_share(int64_t rows) {
  const int64_t share = (rows + 127) / 128;
  return share < 16 ? 16 : share;
}

}  // namespace dcnv3
