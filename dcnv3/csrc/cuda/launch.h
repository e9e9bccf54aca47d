// From a `Problem` to the kernels' arguments: a small rule, no list of shapes. Plain C++, tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../norm.h"
#include "../packed.h"

namespace dcnv3 {
namespace gpu {

// Errors of the launchers beside CUDA's: one lane group's points are more than shared memory holds (`shared` of the plan
// is above kSharedBytes); one image has more than kMostPairs.
constexpr int kTooManyPoints = -1, kTooManyPairs = -2;

// What a launch came to: 0, CUDA's error or one of the above. `earlier`: CUDA had the error before anything was launched.
struct Status {
  int error;
  bool earlier;
};

// Whether CUDA's error comes up while a kernel runs, as an illegal address (700) does. Kernels run after their launch has
// returned, so a launch that answers with one tells of an earlier kernel, unless CUDA_LAUNCH_BLOCKING is set.
inline bool comes_up_in_a_kernel(int error) {
  return error == 700 || error == 702 || error == 710 || (error >= 714 && error <= 719);
}

constexpr int kWarp = 32;
constexpr int kMaxWarps = 8;           // of a block
constexpr int kSharedBytes = 40 << 10; // of a block; every device has 48 KiB without asking
constexpr int64_t kMostPairs = (int64_t(1) << 31) - 1;  // of a launch: numbers of 32 bits, divided as below

// Division by a number that the host knows, as one multiplication: n / d = n * m >> (31 + shift) for every n below 2^31,
// with shift = ceil(log2(d)) and m = ceil(2^(31 + shift) / d). The error of m, less than d <= 2^shift, times n stays below
// 2^(31 + shift), so that the quotient is exact; m < 2^32.
struct Divisor {
  uint32_t number, multiplier;
  int shift;
};

inline Divisor divisor(int64_t number) {
  Divisor d{static_cast<uint32_t>(number), 0, 0};
  while ((int64_t(1) << d.shift) < number) ++d.shift;
  const uint64_t power = uint64_t(1) << (31 + d.shift);
  d.multiplier = static_cast<uint32_t>((power + number - 1) / number);
  return d;
}

DCNV3_BOTH inline uint32_t divide(uint32_t n, const Divisor& by) {
  return static_cast<uint32_t>(static_cast<uint64_t>(2 * n) * by.multiplier >> 32) >> by.shift;
}

// What a kernel is given. A *lane group* of 2^lanes_log2 lanes of a warp does one (pixel, group), each lane `vector`
// channels at a time; warps never wait for each other.
struct Arguments {
  PackedProblem q;
  PackedTensors t;
  uint32_t pairs;  // (pixel, group) pairs of the launch
  int lanes_log2;
  int chunk;            // points whose table is kept in shared memory at a time
  float offset_scale;   // for arithmetic in float
  int middle;           // the cell of the kernel that is left out, or the number of cells
  int radius_h, radius_w;
  Divisor by_groups, by_out_width, by_out_height, by_kernel_h;
  // A pixel's place in its image is a number of 32 bits, in units of one element where an image of the value has at most
  // 2^32 of them, else of a whole pixel (there are fewer than 2^31 pixels).
  uint32_t pixel_units, value_unit, sum_unit;  // units of a pixel; bytes of a unit in the value, and in its gradient's sum
  // Deterministic mode: the largest |gradient| and |weight| (on the device), and bits for the number of additions that
  // one pixel can get.
  const float* bound;
  int room_log2;
};

struct Plan {
  int lanes_log2, chunk, warps;
  size_t shared;
  int lane_groups() const { return warps * (kWarp >> lanes_log2); }  // of a block
};

// Shared memory of a lane group, whose arithmetic is in numbers of `size` bytes: the tables of a block's lane groups, each
// a multiple of 16 bytes, then the numbers that each keeps for all of its points.
DCNV3_BOTH inline int table_bytes(int size, int chunk, bool backward) { return chunk * ((backward ? 8 : 4) * size + 16); }
DCNV3_BOTH inline int64_t points_bytes(int64_t points, int size, bool backward) { return (backward ? 2 : 1) * points * size; }

inline Plan make_plan(const Problem& q, int size, int64_t vector, bool backward) {
  Plan plan{};
  const int64_t vectors = (q.group_channels + vector - 1) / vector;
  while ((int64_t(1) << plan.lanes_log2) < vectors && plan.lanes_log2 < 5) ++plan.lanes_log2;
  // Two lanes share a sector of the value's gradient (backward.cuh).
  if (backward && vector == 8 && plan.lanes_log2 == 0) plan.lanes_log2 = 1;
  plan.chunk = static_cast<int>(q.points < 32 ? q.points : 32);
  plan.warps = kMaxWarps;
  auto bytes = [&] {
    return plan.lane_groups() * (table_bytes(size, plan.chunk, backward) + points_bytes(q.points, size, backward));
  };
  // Fewer warps of a block, then fewer points at a time, then fewer lane groups of a warp (with idle lanes).
  while (bytes() > kSharedBytes && plan.warps > 2) plan.warps /= 2;
  while (bytes() > kSharedBytes && plan.chunk > 1) plan.chunk = (plan.chunk + 1) / 2;
  while (bytes() > kSharedBytes && plan.warps > 1) plan.warps /= 2;
  while (bytes() > kSharedBytes && plan.lanes_log2 < 5) ++plan.lanes_log2;
  plan.shared = static_cast<size_t>(bytes());
  return plan;
}

// Bits for the number of additions that one pixel of the value's gradient can get: from each point, and from its centre.
inline int room_log2(const PackedProblem& q) {
  int bits = 0;
  while ((int64_t(1) << bits) < q.pixels() * q.points + (q.center ? 1 : 0)) ++bits;
  return bits;
}

// `value_size`, `sum_size`: bytes of an element of the value, and of its gradient's sum.
inline Arguments make_arguments(const PackedProblem& q, const PackedTensors& t, const Plan& plan, int value_size,
                                int sum_size) {
  Arguments a{};
  a.q = q, a.t = t, a.lanes_log2 = plan.lanes_log2, a.chunk = plan.chunk;
  a.offset_scale = static_cast<float>(q.offset_scale);
  const int64_t center = q.kernel_h / 2 * q.kernel_h + q.kernel_h / 2;
  a.middle = static_cast<int>(q.remove_center ? center : q.kernel_h * q.kernel_w);
  a.radius_h = static_cast<int>(q.dilation_h * (q.kernel_h - 1) >> 1);
  a.radius_w = static_cast<int>(q.dilation_w * (q.kernel_w - 1) >> 1);
  a.by_groups = divisor(q.groups), a.by_out_width = divisor(q.out_width), a.by_out_height = divisor(q.out_height);
  a.by_kernel_h = divisor(q.kernel_h);
  const bool small = q.height * q.width <= (int64_t(1) << 32) / q.value_stride;
  const uint32_t stride = static_cast<uint32_t>(q.value_stride), unit = small ? 1 : stride;
  a.pixel_units = small ? stride : 1, a.value_unit = unit * value_size, a.sum_unit = unit * sum_size;
  return a;
}

// launch(arguments, blocks) for the images of a call, in as few launches as `most` pairs each allow; the first error.
// S and Sum are the types of the tensors and of the sum.
template <typename S, typename Sum, typename F>
int for_images(Arguments a, const Plan& plan, const F& launch, int64_t most = kMostPairs) {
  const PackedProblem& q = a.q;
  const int64_t image = q.pixels() * q.groups, value = q.height * q.width;
  if (image > kMostPairs) return kTooManyPairs;
  const int64_t together = image == 0 || most < image ? 1 : most / image;
  for (int64_t first = 0; first < q.batch; first += together) {
    const int64_t images = q.batch - first < together ? q.batch - first : together;
    a.pairs = static_cast<uint32_t>(images * image);
    const int64_t blocks = (a.pairs + plan.lane_groups() - 1) / plan.lane_groups();
    if (const int error = blocks > 0 ? launch(a, static_cast<unsigned>(blocks)) : 0) return error;
    auto next = [images](auto* pointer, int64_t elements) { return pointer + images * elements; };
    const int64_t row = q.pixels() * q.channels();
    a.t.value = next(static_cast<const S*>(a.t.value), value * q.value_stride);
    a.t.offset = next(static_cast<const S*>(a.t.offset), q.pixels() * q.offset_stride);
    a.t.mask = next(static_cast<const S*>(a.t.mask), q.pixels() * q.mask_stride);
    a.t.center = next(static_cast<const S*>(a.t.center), q.pixels() * q.center_stride);
    a.t.output = next(static_cast<S*>(a.t.output), row);
    a.t.grad_output = next(static_cast<const S*>(a.t.grad_output), row);
    a.t.grad_offset = next(static_cast<S*>(a.t.grad_offset), q.pixels() * q.grad_offset_stride);
    a.t.grad_mask = next(static_cast<S*>(a.t.grad_mask), q.pixels() * q.grad_mask_stride);
    a.t.grad_center = next(static_cast<S*>(a.t.grad_center), q.pixels() * q.grad_center_stride);
    a.t.grad_padding = next(static_cast<S*>(a.t.grad_padding), q.pixels() * q.grad_offset_stride);
    a.t.sum = next(static_cast<Sum*>(a.t.sum), value * q.channels());
  }
  return 0;
}

// The value's gradient by tiles (tiles.cuh): of kTileWidth by kTileHeight output pixels, one a lane of a warp, with a window
// of so many pixels of the value around them, and kSlice channels. A window's pixels times a warp's lanes are shares in
// shared memory, and three numbers a point.
constexpr int kTileWidth = 8, kTileHeight = 4, kHalo = 4, kSlice = 16;
constexpr int kWindowWidth = kTileWidth + 2 * kHalo, kWindowHeight = kTileHeight + 2 * kHalo;
constexpr int kWindow = kWindowWidth * kWindowHeight;
constexpr int kTileBytes = (kWindow + 3 * 9) * kWarp * 4;
constexpr int kMostSteps = 5;  // of a warp: more would leave multiprocessors without work, fewer flush their window more often

struct TileArguments {
  Arguments a;
  uint32_t slices, strips, segments;  // of an image: slices of its channels, strips of columns, segments of rows
  int steps;                          // of a segment, kTileHeight rows each
};

// Whether tiles are used: for the published models' shapes, where neighbouring pixels' points meet, in types whose
// arithmetic is in float and whose pairs of offsets can be loaded as one.
inline bool tiles_apply(const Problem& q, Type type, const void* offset) {
  const int64_t size = type == Type::kFloat ? 4 : 2;
  return type != Type::kDouble && q.kernel_h == 3 && q.kernel_w == 3 && !q.remove_center && q.stride_h == 1 && q.stride_w == 1 &&
         q.dilation_h == 1 && q.dilation_w == 1 && (q.group_channels == 16 || q.group_channels == 32) &&
         q.offset_stride % 2 == 0 && reinterpret_cast<uintptr_t>(offset) % (2 * size) == 0 && q.out_width >= 6 &&
         q.out_height >= 4;
}

inline TileArguments make_tile_arguments(const Arguments& a) {
  const Problem& q = a.q;
  const auto over = [](int64_t n, int64_t d) { return static_cast<uint32_t>((n + d - 1) / d); };
  const uint32_t steps = over(q.out_height, kTileHeight), segments = over(steps, kMostSteps);
  return {a, static_cast<uint32_t>(q.channels() / kSlice), over(q.out_width, kTileWidth), segments,
          static_cast<int>(over(steps, segments))};
}

// Warps for all images of `tiles.a`.
inline unsigned tile_warps(const TileArguments& tiles) {
  const Problem& q = tiles.a.q;
  const uint32_t images = static_cast<uint32_t>(tiles.a.pairs / (q.pixels() * q.groups));
  return images * tiles.segments * tiles.strips * tiles.slices;
}

// `stream` is a cudaStream_t.
Status launch_forward(Type, const PackedProblem&, const PackedTensors&, void* stream);
Status launch_backward(Type, const PackedProblem&, const PackedTensors&, bool deterministic, float* bound, void* stream);

// LayerNorm, with GELU or without (norm.cuh); backward with its sums. kTooManyPoints for more channels than shared memory holds.
Status launch_norm_forward(Type, const NormProblem&, const NormTensors&, void* stream);
Status launch_norm_backward(Type, const NormProblem&, const NormTensors&, void* stream);

const char* error_text(int error);  // CUDA's own words

// The message for an error of CUDA's.
inline std::string describe(Status status) {
  const std::string what = "CUDA error " + std::to_string(status.error) + " (" + error_text(status.error) + ")";
  const std::string remedy = "; CUDA_LAUNCH_BLOCKING=1 shows which";
  if (status.earlier) return "dcnv3: an earlier operation, not this one, failed with " + what + remedy;
  if (!comes_up_in_a_kernel(status.error)) return "dcnv3: the launch failed with " + what;
  return "dcnv3: a kernel that was launched earlier failed with " + what + remedy;
}

}  // namespace gpu
}  // namespace dcnv3
