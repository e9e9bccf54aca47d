// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels_api.h"

// Everything from here on is compiled for these instructions; the standard headers above are not.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DCNV3_VECTOR_BYTES 32
#define DCNV3_F16C 1

namespace dcnv3 {
namespace avx2 {
#include "kernels.h"
}  // namespace avx2
const CpuKernels kAvx2Kernels = {"avx2", avx2::run_forward, avx2::run_backward, avx2::run_norm_forward, avx2::run_norm_backward,
                                    avx2::run_norm_sums, avx2::run_gelu};
}  // namespace dcnv3

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
