// From a `NormProblem` to the kernels' arguments. Plain C++, tested without a GPU.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../norm.h"
#include "launch.h"

namespace dcnv3 {
namespace gpu {

struct NormArguments {
  NormProblem q;
  NormTensors t;
  int lanes_log2;
  int64_t share, shares;  // backward: rows of a share, and how many there are
};

// `width`: channels that a lane moves at once, all of them a multiple of it.
struct NormPlan {
  int lanes_log2, warps;  // warps of a block
  size_t shared;          // backward
  int64_t share, shares, blocks;
};

// Numbers from one share's sums to the next: those of weight and bias, and what makes their rows a multiple of 16 bytes.
DCNV3_BOTH inline int64_t sums_stride(const NormProblem& q) { return (2 * q.channels + 3) / 4 * 4; }

inline bool norm_aligned(const NormProblem& q, const NormTensors& t, int width) {
  uintptr_t addresses = 0;
  for (const void* pointer : {t.x, t.weight, t.bias, static_cast<const void*>(t.output), t.residual, t.grad_output, t.grad_again,
                              t.grad_residual, static_cast<const void*>(t.grad_x)}) {
    addresses |= reinterpret_cast<uintptr_t>(pointer);
  }
  return q.channels % width == 0 && addresses % 16 == 0;
}

inline NormPlan norm_plan(const NormProblem& q, int size, int width, bool backward) {
  NormPlan plan{};
  while (plan.lanes_log2 < 5 && (int64_t(width) << plan.lanes_log2) < q.channels) ++plan.lanes_log2;
  plan.warps = kMaxWarps;
  const int64_t groups = kWarp >> plan.lanes_log2, warp = groups * 3 * q.channels * size;
  while (backward && plan.warps > 1 && plan.warps * warp > kSharedBytes) plan.warps /= 2;
  plan.shared = backward ? static_cast<size_t>(plan.warps * warp) : 0;
  plan.share = rows_of_a_warp(q.rows), plan.shares = (q.rows + plan.share - 1) / plan.share;
  const int64_t warps = backward ? plan.shares : (q.rows + groups - 1) / groups;
  plan.blocks = (warps + plan.warps - 1) / plan.warps;
  return plan;
}

// The plan for a backward pass of `most` blocks at most, whose warps get larger shares where that is too few for the shares
// it had. Where these need fewer blocks, the sums that are made of them may need more: they are a warp's by fours.
inline NormPlan within(NormPlan plan, const NormProblem& q, int64_t most) {
  const auto over = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  if (plan.blocks > most) plan.share = over(q.rows, most * plan.warps), plan.shares = over(q.rows, plan.share);
  const int64_t wanted = over(std::max(plan.shares, sums_stride(q) / 4), plan.warps);
  plan.blocks = std::min(wanted, most);
  return plan;
}

}  // namespace gpu
}  // namespace dcnv3
