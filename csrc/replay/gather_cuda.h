// What kernels/cuda/gather.cu offers; nothing of it waits for the device.
#pragma once

#include "replay/gather.h"

namespace covr {

// Observations [rows] of one key. `plans` and `out` are in device memory.
void gather_cuda(const FrameLayout& frames, const StackPlan* plans, int64_t rows, const GatherTarget& target,
                 void* out, uintptr_t stream);

void upload_frame(const uint8_t* host, uint8_t* device, int64_t bytes, uintptr_t stream);

}  // namespace covr
