// RALW's weight, shared by the CPU and CUDA kernels.
#pragma once

#include "common/macros.h"
#include "common/view.h"

namespace covr {

// max(minmax(value) to [-1, 1], 0). In double: the range of floats overflows a float. A quotient, not a
// product with the range's inverse: the middle of the range must weigh exactly 0.
COVR_HD float return_weight(float value, float low, float high) {
  if (!(high > low)) return 1.0f;
  const double scaled = 2.0 * (static_cast<double>(value) - low) / (static_cast<double>(high) - low) - 1.0;
  return static_cast<float>(scaled < 0.0 ? 0.0 : scaled);
}

#ifdef COVR_WITH_CUDA
namespace cuda {
// extremes: [2], zeroed.
void return_weights(CudaView<float, 1> out, CudaView<const float, 1> returns, CudaView<int32_t, 1> extremes,
                    uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
