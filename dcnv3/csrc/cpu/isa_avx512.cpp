// AVX-512 F, BW, DQ, VL: Intel since Skylake-SP, AMD since Zen 4.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DCNV3_VECTOR_BYTES 64
#define DCNV3_F16C 1
#define DCNV3_AVX512 1

namespace dcnv3 {
namespace avx512 {
#include "kernels.h"
}  // namespace avx512
const CpuKernels kAvx512Kernels = {"avx512", avx512::run_forward, avx512::run_backward, avx512::run_norm_forward, avx512::run_norm_backward,
                                    avx512::run_norm_sums, avx512::run_gelu};
}  // namespace dcnv3

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
