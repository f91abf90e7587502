#include "common/streaming.h"

#include <algorithm>

namespace covr {

// The machine's own prefetcher stops at page ends, and a frame is a few pages.
void copy_streaming(const uint8_t* in, uint8_t* out, int64_t n) {
  constexpr int64_t kAhead = 1024, kLine = 64;
  int64_t i = std::min<int64_t>(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 15));
  std::memcpy(out, in, static_cast<size_t>(i));
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(in + i + kAhead);
    for (int64_t j = 0; j < kLine; j += 16) stream16(out + i + j, in + i + j);
  }
  for (; i + 16 <= n; i += 16) stream16(out + i, in + i);
  std::memcpy(out + i, in + i, static_cast<size_t>(n - i));
}

void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace covr
