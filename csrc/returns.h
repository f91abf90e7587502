// The recurrence of a discounted return, shared by the CPU and CUDA kernels.
#pragma once

#include "common.h"

namespace covr {

// g[t] from g[t + 1]. A selection, not a product with zero: what follows an end may be NaN.
template <typename T>
COVR_HD T return_step(T reward, uint8_t end, T gamma, T next) {
  return end ? reward : reward + gamma * next;
}

}  // namespace covr
