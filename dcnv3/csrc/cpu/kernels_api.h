// The kernels of one instruction set, and the choice among them.
#pragma once

#include "../norm.h"
#include "../packed.h"

namespace dcnv3 {

struct CpuKernels {
  const char* name;
  // Output pixels [begin, end), counted over the batch.
  void (*forward)(Type, const PackedProblem&, const PackedTensors&, int64_t begin, int64_t end);
  // Groups [first, last) of one image.
  void (*backward)(Type, const PackedProblem&, const PackedTensors&, int64_t image, int64_t first, int64_t last);
  // Rows [begin, end), in backward a share of them, and what the shares' sums come to (norm.h).
  void (*norm_forward)(Type, const NormProblem&, const NormTensors&, int64_t begin, int64_t end);
  void (*norm_backward)(Type, const NormProblem&, const NormTensors&, int64_t share, int64_t begin, int64_t end);
  void (*norm_sums)(Type, const NormProblem&, const NormTensors&, int64_t shares);
  // Elements [begin, end) of GELU, or with `grad` of its gradient.
  void (*gelu)(Type, const void* x, const void* grad, void* to, int64_t begin, int64_t end);
};

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

// The best this processor runs, or the one that the environment variable DCNV3_CPU_ISA names (baseline, avx2, avx512).
const CpuKernels& cpu_kernels();

}  // namespace dcnv3
