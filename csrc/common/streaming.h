// Stores that bypass the cache: for memory that is not read again soon, they spare the read of lines that are
// about to be overwritten.
#pragma once

#include <cstring>

#include "common/macros.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace covr {

// Sixteen bytes to an address that is a multiple of 16.
COVR_HD void stream16(void* out, const void* in) {
#ifdef __SSE2__
  _mm_stream_si128(static_cast<__m128i*>(out), _mm_loadu_si128(static_cast<const __m128i*>(in)));
#else
  std::memcpy(out, in, 16);
#endif
}

// memcpy by such stores.
void copy_streaming(const uint8_t* in, uint8_t* out, int64_t bytes);

// Makes the streaming stores of this thread visible to other threads.
void finish_streaming();

}  // namespace covr
