// From a `NormProblem` to the kernels' arguments. Plain C++, tested without a GPU.
#pragma once

#include <initializer_list>

#include "../norm.h"
#include "launch.h"

namespace dcnv3 {
namespace gpu {

struct NormArguments {
  NormProblem q;
  NormTensors t;
  int lanes_log2;
  int64_t share;  // backward: rows of a warp
};

// `width`: channels that a lane moves at once, all of them a multiple of it.
struct NormPlan {
  int lanes_log2, warps;  // warps of a block
  size_t shared;          // backward
  int64_t share, shares, blocks;
};

inline bool norm_aligned(const NormProblem& q, const NormTensors& t, int width) {
  uintptr_t addresses = 0;
  for (const void* pointer : {t.x, t.weight, t.bias, static_cast<const void*>(t.output), t.residual, t.grad_output, t.grad_residual,
                              static_cast<const void*>(t.grad_x)}) {
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

}  // namespace gpu
}  // namespace dcnv3
