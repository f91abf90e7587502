// Memory of the host that a GPU reads and writes in place.
#pragma once

#ifdef COVR_WITH_CUDA

#include <cstdint>

namespace covr::cuda {

// The pages that `bytes` take and no more: torch's pinned blocks are rounded up to powers of two.
struct PinnedPages {
  uint8_t* data;
  int64_t bytes;
  int device;  // that was current
};

// Throws std::bad_alloc where the system has no memory, and std::runtime_error where the driver cannot pin
// it.
PinnedPages pin_pages(int64_t bytes);
// Waits for the device, which may still use them.
void free_pages(const PinnedPages& pages);

}  // namespace covr::cuda

#endif
