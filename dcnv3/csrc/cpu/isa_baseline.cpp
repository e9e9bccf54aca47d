// What every processor of the architecture runs.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels_api.h"

#define DCNV3_VECTOR_BYTES 16

namespace dcnv3 {
namespace baseline {
#include "kernels.h"
}  // namespace baseline
const CpuKernels kBaselineKernels = {"baseline", baseline::run_forward, baseline::run_backward, baseline::run_norm_forward, baseline::run_norm_backward,
                                    baseline::run_norm_sums, baseline::run_gelu};
}  // namespace dcnv3
