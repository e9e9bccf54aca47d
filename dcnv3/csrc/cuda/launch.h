// From a `Problem` to the kernels' arguments: a small rule, no list of shapes. Plain C++, tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace dcnv3 {
namespace gpu {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 8;           // of a block
constexpr int kSharedBytes = 40 << 10; // of a block; every device has 48 KiB without asking

// What a kernel is given. A *team* of 2^team_log2 lanes of a warp does one (pixel, group), each lane `vector` channels
// at a time; warps never wait for each other.
struct Arguments {
  Problem q;
  Tensors t;
  int64_t pairs;     // (pixel, group) pairs of the call
  int team_log2;
  int chunk;  // points whose places are kept in shared memory at a time
  // Deterministic mode: the largest |gradient| and |weight| (on the device), and bits for the number of additions that
  // one pixel can get.
  const float* bound;
  int room_log2;
};

struct Plan {
  int team_log2, chunk, warps;
  int64_t blocks;
  size_t shared;
};

// Bytes of shared memory of one team, whose arithmetic is in numbers of `size` bytes; every part is a multiple of 16.
DCNV3_BOTH inline int64_t team_bytes(int64_t points, int size, int chunk, bool backward) {
  const int places = chunk * (4 * size + 16) + (backward ? (chunk * size + 15) / 16 * 16 : 0);
  return places + ((backward ? 4 : 1) * points * size + 15) / 16 * 16;
}

inline Plan make_plan(const Problem& q, int size, int64_t vector, bool backward) {
  Plan plan{};
  const int64_t vectors = (q.group_channels + vector - 1) / vector;
  while ((int64_t(1) << plan.team_log2) < vectors && plan.team_log2 < 5) ++plan.team_log2;
  plan.chunk = static_cast<int>(q.points < 32 ? q.points : 32);
  plan.warps = kMaxWarps;
  auto bytes = [&] {
    return plan.warps * (int64_t(kWarp) >> plan.team_log2) * team_bytes(q.points, size, plan.chunk, backward);
  };
  // Fewer warps of a block, then fewer points at a time, then fewer teams of a warp (with idle lanes).
  while (bytes() > kSharedBytes && plan.warps > 2) plan.warps /= 2;
  while (bytes() > kSharedBytes && plan.chunk > 1) plan.chunk = (plan.chunk + 1) / 2;
  while (bytes() > kSharedBytes && plan.warps > 1) plan.warps /= 2;
  while (bytes() > kSharedBytes && plan.team_log2 < 5) ++plan.team_log2;
  const int64_t teams = plan.warps * (int64_t(kWarp) >> plan.team_log2);
  plan.blocks = (q.batch * q.pixels() * q.groups + teams - 1) / teams;
  plan.shared = static_cast<size_t>(bytes());
  return plan;
}

// The error where one team's points are more than shared memory holds (with `plan.shared` above kSharedBytes).
constexpr int kTooManyPoints = -1;

// 0, CUDA's error code or kTooManyPoints. `stream` is a cudaStream_t.
int launch_forward(Type, const Problem&, const Tensors&, void* stream);
int launch_backward(Type, const Problem&, const Tensors&, bool deterministic, float* bound, void* stream);

}  // namespace gpu
}  // namespace dcnv3
