#include "backward.cuh"
#include "dispatch.cuh"
#include "tiles.cuh"

#include <cstdlib>

namespace dcnv3 {
namespace gpu {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 4096 ? (blocks > 0 ? blocks : 1) : 4096);
}

// Whether the device's tensor cores have TF32, and tiles are not left out to be measured (DCNV3_CUDA_TILES=0, read once).
bool tiles_wanted() {
  static const char* const text = std::getenv("DCNV3_CUDA_TILES");
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8 && (text == nullptr || text[0] != '0');
}

// `Sum` is float or double (t.sum may be the gradient itself), or Fixed.
template <typename S, int N, typename Sum>
int run(Type type, const PackedProblem& q, const PackedTensors& t, const float* bound, cudaStream_t stream) {
  const Plan plan = make_plan(q, sizeof(Compute<S>), N, true);
  if (plan.shared > kSharedBytes) return kTooManyPoints;
  const int64_t elements = q.batch * q.height * q.width * q.channels();
  int error = cudaMemsetAsync(t.sum, 0, elements * sizeof(Sum), stream);
  if (error != 0 || elements == 0) return error;
  Arguments arguments = make_arguments(q, t, plan, sizeof(S), sizeof(Sum));
  arguments.bound = bound;
  arguments.room_log2 = room_log2(q);
  const bool tiled = tiles_wanted() && tiles_apply(q, type, t.offset);
  error = with_lanes<N>(q, plan, [&](auto lanes) {
    return for_images<S, Sum>(arguments, plan, [&](const Arguments& a, unsigned blocks) {
      if constexpr (lanes.value != kAny) {
        if (tiled) {
          backward_kernel<S, N, lanes.value, Elsewhere><<<blocks, plan.warps * kWarp, plan.shared, stream>>>(a);
          const TileArguments tiles = make_tile_arguments(a);
          // As many warps as shared memory holds, rather than a larger cache.
          cudaFuncSetAttribute(tile_kernel<S, Sum>, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
          tile_kernel<S, Sum><<<tile_warps(tiles), kWarp, kTileBytes, stream>>>(tiles);
          return static_cast<int>(cudaGetLastError());
        }
      }
      backward_kernel<S, N, lanes.value, Sum><<<blocks, plan.warps * kWarp, plan.shared, stream>>>(a);
      return static_cast<int>(cudaGetLastError());
    });
  });
  if (error != 0 || t.sum == t.grad_value) return error;
  finish_kernel<S, Sum><<<blocks_for(elements), kThreads, 0, stream>>>(arguments, elements);
  return cudaGetLastError();
}

}  // namespace

Status launch_backward(Type type, const PackedProblem& q, const PackedTensors& t, bool deterministic, float* bound,
                       void* opaque) {
  const auto stream = static_cast<cudaStream_t>(opaque);
  return checked([&] {
    return with_type(type, q, t.value, t.grad_output, [&](auto s, auto width) -> int {
      using S = decltype(s);
      if (!deterministic) return run<S, width.value, Compute<S>>(type, q, t, nullptr, stream);
      const int64_t pixels = q.batch * q.pixels(), points = q.groups * q.points;
      const cudaError_t error = cudaMemsetAsync(bound, 0, 2 * sizeof(float), stream);
      if (error != cudaSuccess) return static_cast<int>(error);
      bound_kernel<S><<<blocks_for(pixels * q.channels()), kThreads, 0, stream>>>(
          static_cast<const S*>(t.grad_output), pixels, q.channels(), q.channels(), bound);
      bound_kernel<S><<<blocks_for(pixels * points), kThreads, 0, stream>>>(static_cast<const S*>(t.mask), pixels, points,
                                                                           q.mask_stride, bound + 1);
      return run<S, width.value, Fixed>(type, q, t, bound, stream);
    });
  });
}

}  // namespace gpu
}  // namespace dcnv3
