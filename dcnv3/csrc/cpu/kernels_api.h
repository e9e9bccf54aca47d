// The kernels of one instruction set, and the choice among them.
#pragma once

#include "../packed.h"

namespace dcnv3 {

struct CpuKernels {
  const char* name;
  // Output pixels [begin, end), counted over the batch.
  void (*forward)(Type, const PackedProblem&, const PackedTensors&, int64_t begin, int64_t end);
  // Groups [first, last) of one image.
  void (*backward)(Type, const PackedProblem&, const PackedTensors&, int64_t image, int64_t first, int64_t last);
};

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

// The best this processor runs, or the one that the environment variable DCNV3_CPU_ISA names (baseline, avx2, avx512).
const CpuKernels& cpu_kernels();

}  // namespace dcnv3
