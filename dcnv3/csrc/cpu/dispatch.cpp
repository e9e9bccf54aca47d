// Which instruction set, asked of the processor once.
#include <cstdlib>
#include <cstring>

#include "kernels_api.h"

namespace dcnv3 {
namespace {

const CpuKernels& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("DCNV3_CPU_ISA");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return kBaselineKernels;
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0 && avx2) return kAvx2Kernels;
  if (avx512) return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace dcnv3
