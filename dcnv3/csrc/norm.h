// One call of a norm as plain numbers: what every kernel is given.
#pragma once

#include <cstdint>

#include "problem.h"

namespace dcnv3 {

// LayerNorm over the last dimension of `rows` rows, with GELU after it or without. `rows_of_factor` rows share a factor.
struct NormProblem {
  int64_t rows, channels;
  double eps;
  bool gelu;
  int64_t rows_of_factor;
};

// Tensors of a call, untyped and contiguous. mean, rstd and `sums` are in the type of the arithmetic: one number a row, and
// the gradients of weight and bias, 2 C of them, summed over each share of the rows.
struct NormTensors {
  const void *x, *weight, *bias;
  const void *residual, *factor;  // where there are any: the output is residual + factor * norm
  void *output, *mean, *rstd;
  const void *grad_output, *grad_again;  // the latter, where there is one, is a second reader's, and added to the first
  const void* grad_residual;             // where there is one: added to grad_x
  void *grad_x, *grad_weight, *grad_bias, *sums;
};

// Rows of a share in backward: on a CPU, where their number does not depend on that of the threads, and so neither do the
// sums; and on a GPU those of a warp, the fewest, which are more where it has not room for so many warps at once:
// there the sums round alike on one device only.
inline int64_t rows_of_a_share(int64_t rows, int64_t most_shares = 128) {
  const int64_t share = (rows + most_shares - 1) / most_shares;
  return share < 16 ? 16 : share;
}
inline int64_t rows_of_a_warp(int64_t rows) { return rows_of_a_share(rows, 2048); }

}  // namespace dcnv3
