// The CUDA kernels as one C function over host memory (emulation.h). -DDCNV3_EMULATION=900 adds up as sm_90 does.
#include "cuda/backward.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/forward.cuh"
#include "cuda/norm.cuh"
#include "cuda/tiles.cuh"

namespace dcnv3 {
namespace gpu {

alignas(64) unsigned char shared_memory[kSharedBytes];

namespace {

constexpr int64_t kMostPairsHere = DCNV3_EMULATION >= 900 ? 1 : kMostPairs;  // 1: a launch for each image

template <typename S, int N, typename Sum>
void add_up(const PackedProblem& q, PackedTensors t, const Plan& plan, int64_t elements, const float* bound, bool tiled) {
  std::vector<Sum> sum(elements, Sum(0));
  t.sum = sum.data();
  Arguments a = make_arguments(q, t, plan, sizeof(S), sizeof(Sum));
  a.bound = bound;
  a.room_log2 = room_log2(q);
  with_lanes<N>(q, plan, [&](auto lanes) {
    constexpr int L = decltype(lanes)::value;
    const auto launch = [&](const Arguments& some, unsigned blocks) {
      if constexpr (L != kAny) {
        if (tiled) {
          emulation::launch(blocks, plan.warps, [=] { backward_kernel<S, N, L, Elsewhere>(some); });
          std::fill(shared_memory, shared_memory + kSharedBytes, 0xff);
          const TileArguments tiles = make_tile_arguments(some);
          emulation::launch(tile_warps(tiles), 1, [=] { tile_kernel<S, Sum>(tiles); });
          return 0;
        }
      }
      emulation::launch(blocks, plan.warps, [=] { backward_kernel<S, N, L, Sum>(some); });
      return 0;
    };
    return for_images<S, Sum>(a, plan, launch, kMostPairsHere);
  });
  emulation::launch(3, 2, [=] { finish_kernel<S, Sum>(a, elements); });
}

template <typename S, int N>
int run(const PackedProblem& q, const PackedTensors& t, bool backward, bool deterministic, bool tiled) {
  const Plan plan = make_plan(q, sizeof(Compute<S>), N, backward);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  // what a kernel reads before it writes must not pass for zeros
  std::fill(shared_memory, shared_memory + kSharedBytes, 0xff);
  if (!backward) {
    const Arguments a = make_arguments(q, t, plan, sizeof(S), 0);
    with_lanes<N>(q, plan, [&](auto lanes) {
      const auto launch = [&](const Arguments& some, unsigned blocks) {
        emulation::launch(blocks, plan.warps, [=] { forward_kernel<S, N, decltype(lanes)::value>(some); });
        return 0;
      };
      return for_images<S, S>(a, plan, launch, kMostPairsHere);
    });
    return N;
  }
  const int64_t elements = q.batch * q.height * q.width * q.channels();
  if (!deterministic) {
    add_up<S, N, Compute<S>>(q, t, plan, elements, nullptr, tiled);
    return N;
  }
  float bound[2] = {0, 0};
  const int64_t pixels = q.batch * q.pixels(), points = q.groups * q.points;
  emulation::launch(2, 2, [&] {
    bound_kernel<S>(static_cast<const S*>(t.grad_output), pixels, q.channels(), q.channels(), bound);
  });
  emulation::launch(2, 2, [&] {
    bound_kernel<S>(static_cast<const S*>(t.mask), pixels, points, q.mask_stride, bound + 1);
  });
  add_up<S, N, Fixed>(q, t, plan, elements, bound, tiled);
  return N;
}

// Types and widths as norm.cu chooses them.
template <typename S, int N, bool kGelu>
int run_norm(const NormProblem& q, NormTensors t, bool backward) {
  NormPlan plan = norm_plan(q, sizeof(Compute<S>), N, backward);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  std::fill(shared_memory, shared_memory + kSharedBytes, 0xff);
  if (!backward) {
    const NormArguments a{q, t, plan.lanes_log2, 0, 0};
    emulation::launch(plan.blocks, plan.warps, [=] { norm_forward_kernel<S, N, kGelu>(a); });
    return N;
  }
  const size_t room = plan.shares * sums_stride(q) * sizeof(Compute<S>);
  std::vector<Pack<double, 2>> sums(room / 16 + 1, {{NAN, NAN}});
  t.sums = sums.data();
  plan = within(plan, q, 2);
  const NormArguments a{q, t, plan.lanes_log2, plan.share, plan.shares};
  // norm.cu's kernel, whose blocks wait for each other in between
  emulation::launch(plan.blocks, plan.warps, [=] { norm_shares<S, N, kGelu>(a); });
  emulation::launch(plan.blocks, plan.warps, [=] { norm_sums<S>(a); });
  return N;
}
template <typename S>
int run_norm(const NormProblem& q, const NormTensors& t, bool backward) {
  constexpr int n = 16 / int(sizeof(S));
  if (norm_aligned(q, t, n)) return q.gelu ? run_norm<S, n, true>(q, t, backward) : run_norm<S, n, false>(q, t, backward);
  return q.gelu ? run_norm<S, 1, true>(q, t, backward) : run_norm<S, 1, false>(q, t, backward);
}

}  // namespace

const char* error_text(int) { return "its text"; }

}  // namespace gpu
}  // namespace dcnv3

// n / by for every n, as a kernel divides.
extern "C" void divide_all(uint32_t* numbers, int64_t count, int64_t by) {
  const dcnv3::gpu::Divisor divisor = dcnv3::gpu::divisor(by);
  for (int64_t i = 0; i < count; ++i) numbers[i] = dcnv3::gpu::divide(numbers[i], divisor);
}

// pointers: x, weight, bias, output, mean, rstd, grad_output, grad_x, grad_weight, grad_bias, and four that may be null: grad_residual,
// residual, factor (one for two rows where their number is even, else one for each), grad_again. Returns the elements that a lane moves at once, or the
// launcher's error.
extern "C" int run_norm(int64_t rows, int64_t channels, double eps, int gelu, void* const* pointers, int type, int backward) {
  const dcnv3::NormProblem q{rows, channels, eps, gelu != 0, rows % 2 == 0 ? 2 : 1};
  dcnv3::NormTensors t{};
  t.x = pointers[0], t.weight = pointers[1], t.bias = pointers[2], t.output = pointers[3];
  t.mean = pointers[4], t.rstd = pointers[5], t.grad_output = pointers[6], t.grad_x = pointers[7];
  t.grad_weight = pointers[8], t.grad_bias = pointers[9], t.grad_residual = pointers[10];
  t.residual = pointers[11], t.factor = pointers[12], t.grad_again = pointers[13];
  switch (static_cast<dcnv3::Type>(type)) {
    case dcnv3::Type::kDouble: return dcnv3::gpu::run_norm<double>(q, t, backward != 0);
    case dcnv3::Type::kFloat: return dcnv3::gpu::run_norm<float>(q, t, backward != 0);
    case dcnv3::Type::kBFloat16: return dcnv3::gpu::run_norm<__nv_bfloat16>(q, t, backward != 0);
    case dcnv3::Type::kHalf: return dcnv3::gpu::run_norm<__half>(q, t, backward != 0);
  }
  return 0;
}

// The message where CUDA has an error `before` and a launch would come to `own`.
extern "C" const char* message(int before, int own) {
  static std::string text;
  emulation::pending = before;
  const dcnv3::gpu::Status status = dcnv3::gpu::checked([&] { return own; });
  text = status.error == 0 ? "" : dcnv3::gpu::describe(status);
  return text.c_str();
}

// sizes: batch, height, width, out_height, out_width, groups, group_channels, then kernel, stride, padding, dilation (h, w),
// then the elements from one pixel to the next of value, offset, mask and center, and of the gradients of the last three;
// whether there is a center, and the elements of padding after a pixel's gradients.
// pointers: value, offset, mask, center, output, grad_output, grad_value, grad_offset, grad_mask, grad_center, grad_padding;
// output, grad_output and grad_value have no gaps between their pixels.
// tiles: 1 to use them where they apply. Returns the elements that a lane moves at once, or the launcher's error.
extern "C" int run(const int64_t* sizes, double offset_scale, int remove_center, int activation, void* const* pointers,
                   int type, int backward, int deterministic, int tiles) {
  dcnv3::PackedProblem q{};
  q.batch = sizes[0], q.height = sizes[1], q.width = sizes[2], q.out_height = sizes[3], q.out_width = sizes[4];
  q.groups = sizes[5], q.group_channels = sizes[6];
  q.kernel_h = sizes[7], q.kernel_w = sizes[8], q.stride_h = sizes[9], q.stride_w = sizes[10];
  q.padding_h = sizes[11], q.padding_w = sizes[12], q.dilation_h = sizes[13], q.dilation_w = sizes[14];
  q.value_stride = sizes[15], q.offset_stride = sizes[16], q.mask_stride = sizes[17], q.center_stride = sizes[18];
  q.grad_offset_stride = sizes[19], q.grad_mask_stride = sizes[20], q.grad_center_stride = sizes[21];
  q.center = sizes[22] != 0, q.padding = sizes[23];
  q.points = q.kernel_h * q.kernel_w - (remove_center ? 1 : 0);
  q.offset_scale = offset_scale, q.remove_center = remove_center != 0, q.activation = activation;
  dcnv3::PackedTensors t{};
  t.value = pointers[0], t.offset = pointers[1], t.mask = pointers[2], t.center = pointers[3], t.output = pointers[4];
  t.grad_output = pointers[5], t.grad_value = pointers[6], t.grad_offset = pointers[7], t.grad_mask = pointers[8];
  t.grad_center = pointers[9], t.grad_padding = pointers[10];
  const bool tiled = tiles != 0 && dcnv3::gpu::tiles_apply(q, static_cast<dcnv3::Type>(type), t.offset);
  return dcnv3::gpu::with_type(static_cast<dcnv3::Type>(type), q, t.value, backward ? t.grad_output : t.output,
                               [&](auto s, auto width) -> int {
                                 return dcnv3::gpu::run<decltype(s), width.value>(q, t, backward != 0, deterministic != 0, tiled);
                               });
}
