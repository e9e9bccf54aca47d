// The stream that torch works on.
#pragma once

#include "../binding.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace dcnv3 {

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "dcnv3: no CUDA stream");
  return stream;
}

}  // namespace dcnv3
