// The recurrence of a discounted return, shared by the CPU and CUDA kernels.
#pragma once

#include "common/macros.h"
#include "common/view.h"

namespace covr {

// g[t] from g[t + 1], which may be NaN where it does not count: it is selected away before it is used.
template <typename T>
COVR_HD T return_step(T reward, uint8_t end, T gamma, T next) {
  const T following = end ? T(0) : next;
  return reward + gamma * following;
}

// What a reward `power` = gamma^k adds to a return over a horizon. The product is rounded to T and the sum is
// of doubles: in float32 no order of fusing changes a bit, so CPU and GPU agree exactly.
template <typename T>
COVR_HD double horizon_term(T reward, double power) {
  return static_cast<T>(power) * reward;
}

// Flags as bytes: GCC does not vectorise a loop that selects by bool.
inline const uint8_t* bytes(const bool* flags) { return reinterpret_cast<const uint8_t*>(flags); }

#ifdef COVR_WITH_CUDA
namespace cuda {
// How many elements of the rewards' type the workspace must have.
int64_t discounted_returns_workspace(int64_t steps, int64_t columns);
// T is float or double; out, rewards and ends have the same shape [steps, columns].
template <typename T>
void discounted_returns(CudaView<T, 2> out, CudaView<const T, 2> rewards, CudaView<const bool, 2> ends,
                        T gamma, CudaView<T, 1> workspace, uintptr_t stream);
// The same over at most `horizon` steps, at least 1.
template <typename T>
void horizon_returns(CudaView<T, 2> out, CudaView<const T, 2> rewards, CudaView<const bool, 2> ends,
                     double gamma, int64_t horizon, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
