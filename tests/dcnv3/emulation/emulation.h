// The few CUDA names that dcnv3/csrc/cuda uses, for a CPU, so that the kernels' own code can be run and tested without a
// GPU. A warp is 32 fibers that take turns: a fiber runs to its next __syncwarp or shuffle, then the next lane runs. That
// is enough because warps never wait for each other, but between the halves of norm.cu's backward kernel, which are launches
// here. Races between warps do not show here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __align__(n)
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Place {
  unsigned x;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool done = false;
};

inline Fiber fibers[kLanes];
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;
inline uint64_t exchanged[kLanes];

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void enter() {
  body();
  fibers[current].done = true;
  yield();
}

inline void run_warp(unsigned first_thread) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (current = 0; current < kLanes; ++current) {
      if (fibers[current].done) continue;
      threadIdx.x = first_thread + current;
      swapcontext(&scheduler, &fibers[current].context);
      left = left || !fibers[current].done;
    }
  }
}

inline void launch(int64_t blocks, int warps, const std::function<void()>& kernel) {
  body = kernel;
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = warps * kLanes;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (int warp = 0; warp < warps; ++warp) run_warp(warp * kLanes);
  }
}

}  // namespace emulation

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
namespace emulation {
inline cudaError_t pending;
}
inline cudaError_t cudaPeekAtLastError() { return emulation::pending; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::pending, cudaSuccess); }

inline void __syncwarp() { emulation::yield(); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int step) {
  const int lane = emulation::current;
  std::memcpy(&emulation::exchanged[lane], &x, sizeof(T));
  emulation::yield();
  std::memcpy(&x, &emulation::exchanged[lane ^ step], sizeof(T));
  emulation::yield();
  return x;
}

inline bool __any_sync(unsigned, bool x) {
  for (int step = 1; step < emulation::kLanes; step *= 2) x = __shfl_xor_sync(0u, x, step) || x;
  return x;
}

// The product of tensor cores that tiles.cuh uses, in TF32: the lower 13 bits of a factor do not count.
inline void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  static float all_a[emulation::kLanes][4], all_b[emulation::kLanes][2];
  const auto tf32 = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits &= 0xffffe000u;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  const int lane = emulation::current, row = lane / 4, quad = lane % 4;
  for (int i = 0; i < 4; ++i) all_a[lane][i] = tf32(a[i]);
  for (int i = 0; i < 2; ++i) all_b[lane][i] = tf32(b[i]);
  emulation::yield();
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, column = 2 * quad + i % 2;
    for (int k = 0; k < 8; ++k) {
      c[i] += all_a[4 * row + k % 4][half + 2 * (k / 4)] * all_b[4 * column + k % 4][k / 4];
    }
  }
  emulation::yield();
}

template <typename T>
void atomicAdd(T* to, T x) {
  *to += x;
}
inline void atomicMax(unsigned* to, unsigned x) { *to = std::max(*to, x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
// The 16-bit types, by their bits; rounded to the nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                    : std::ldexp(float(exponent == 0 ? fraction : fraction + 1024), std::max(exponent, 1) - 25);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinite = 31 << 10;
  if (std::isnan(x)) return {0x7fff};
  if (std::fabs(x) >= 65536) return {static_cast<uint16_t>(sign | infinite)};
  if (x == 0) return {sign};
  int exponent = 0;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place, as a power of two
  const int count = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), -unit)));
  return {static_cast<uint16_t>(sign | (count + ((unit + 24) << 10)))};  // the leading bit, and a carry, are the exponent's
}
using std::isfinite;
using std::max;
using std::min;
using std::signbit;
