// RALW's weight, shared by the CPU and CUDA kernels.
#pragma once

#include "common.h"

namespace covr {

// max(minmax(value) to [-1, 1], 0). In double: the range of floats overflows a float.
COVR_HD float return_weight(float value, float low, float high) {
  if (!(high > low)) return low == high ? 1.0f : value - value;  // NaN for NaN: comparisons with it are false
  const double scaled = 2.0 * (static_cast<double>(value) - low) / (static_cast<double>(high) - low) - 1.0;
  return static_cast<float>(scaled < 0.0 ? 0.0 : scaled);
}

}  // namespace covr
