// The recurrence of a discounted return, shared by the CPU and CUDA kernels.
#pragma once

#include "common/macros.h"

namespace covr {

// g[t] from g[t + 1], which may be NaN where it does not count: it is selected away before it is used.
template <typename T>
COVR_HD T return_step(T reward, uint8_t end, T gamma, T next) {
  const T following = end ? T(0) : next;
  return reward + gamma * following;
}

#ifdef COVR_WITH_CUDA
namespace cuda {
// Elements of the rewards' type to hand over as workspace.
int64_t discounted_returns_workspace(int64_t steps, int64_t columns);
void discounted_returns(uintptr_t out, uintptr_t rewards, uintptr_t ends, int64_t steps, int64_t columns,
                        double gamma, bool is_double, uintptr_t workspace, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
