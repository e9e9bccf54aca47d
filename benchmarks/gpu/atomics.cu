// How many reductions to global memory a second: rows of a buffer, in pieces of one reduction each, as the operator's
// backward pass adds to the value's gradient. Compiled by ceilings.py; needs sm_90 for the wide pieces.
#include <cuda_runtime.h>

namespace {

enum Kind { kFloat, kFloat2, kFloat4, kPair, kPair4 };  // pairs are of bfloat16

template <int KIND>
__device__ __forceinline__ void add(char* to, float x) {
  const size_t at = __cvta_generic_to_global(to);
  const unsigned pair = 0x3f803f80u;  // 1, 1
  if constexpr (KIND == kFloat) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory");
  } else if constexpr (KIND == kFloat2) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %1};" ::"l"(at), "f"(x) : "memory");
  } else if constexpr (KIND == kFloat4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(at), "f"(x) : "memory");
  } else if constexpr (KIND == kPair) {
    asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(at), "r"(pair) : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};" ::"l"(at), "r"(pair) : "memory");
  }
}

template <int KIND>
constexpr int kBytes = KIND == kFloat || KIND == kPair ? 4 : KIND == kFloat2 ? 8 : 16;

// Piece i of all goes to piece i % pieces of row rows[i / pieces].
template <int KIND>
__global__ void reduce(char* to, const int* rows, long long count, int pieces_log2) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count << pieces_log2) return;
  const long long row = rows[i >> pieces_log2], piece = i & ((1 << pieces_log2) - 1);
  add<KIND>(to + ((row << pieces_log2) + piece) * kBytes<KIND>, 1.0f);
}

template <int KIND>
void launch(char* to, const int* rows, long long count, int pieces_log2, cudaStream_t stream) {
  const long long blocks = ((count << pieces_log2) + 255) / 256;
  reduce<KIND><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(to, rows, count, pieces_log2);
}

}  // namespace

extern "C" int reductions(int kind, void* to, const void* rows, long long count, int pieces_log2, void* stream) {
  char* target = static_cast<char*>(to);
  const int* index = static_cast<const int*>(rows);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (kind) {
    case kFloat: launch<kFloat>(target, index, count, pieces_log2, on); break;
    case kFloat2: launch<kFloat2>(target, index, count, pieces_log2, on); break;
    case kFloat4: launch<kFloat4>(target, index, count, pieces_log2, on); break;
    case kPair: launch<kPair>(target, index, count, pieces_log2, on); break;
    default: launch<kPair4>(target, index, count, pieces_log2, on); break;
  }
  return static_cast<int>(cudaGetLastError());
}
