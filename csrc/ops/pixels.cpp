// The expensive part, converting and writing, always runs over long contiguous spans: windows are first cut
// out as bytes into a scratch area that stays in the cache.
#include "ops/pixels.h"

#include <algorithm>
#include <vector>

#include "common/streaming.h"

namespace covr {
namespace {

constexpr int64_t kBlockBytes = 128;

template <typename Out>
COVR_HD void convert_body(const uint8_t* in, Out* out, int64_t n, bool streaming) {
  constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(Out));
  int64_t i = 0;
  if (streaming) {
    for (; i < n && (reinterpret_cast<uintptr_t>(out + i) & 15) != 0; ++i) out[i] = pixel_to<Out>(in[i]);
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) Out block[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) block[j] = pixel_to<Out>(in[i + j]);
      for (int64_t j = 0; j < kBlockBytes; j += 16)
        stream16(reinterpret_cast<uint8_t*>(out + i) + j, reinterpret_cast<const uint8_t*>(block) + j);
    }
  }
  for (; i < n; ++i) out[i] = pixel_to<Out>(in[i]);
}

// memcpy without the call: rows are short.
COVR_HD void copy_row(const uint8_t* in, uint8_t* out, int64_t n) {
  if (n < 16) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
    return;
  }
  for (int64_t i = 0; i + 16 < n; i += 16) __builtin_memcpy(out + i, in + i, 16);
  __builtin_memcpy(out + n - 16, in + n - 16, 16);
}

}  // namespace

// Clones cannot be templates.
COVR_CLONES void convert_pixels(const uint8_t* in, float* out, int64_t n, bool streaming) {
  convert_body(in, out, n, streaming);
}
COVR_CLONES void convert_pixels(const uint8_t* in, BFloat16* out, int64_t n, bool streaming) {
  convert_body(in, out, n, streaming);
}
COVR_CLONES void convert_pixels(const uint8_t* in, Float16* out, int64_t n, bool streaming) {
  convert_body(in, out, n, streaming);
}
void convert_pixels(const uint8_t* in, uint8_t* out, int64_t n, bool streaming) {
  if (streaming) return copy_streaming(in, out, n);
  std::memcpy(out, in, static_cast<size_t>(n));
}

void cut_plane(const uint8_t* plane, ImageSize size, ImageShift shift, Beyond beyond, ImageSize out,
               uint8_t* cut) {
  const bool black = beyond == Beyond::kBlack;
  const int left = std::clamp(-shift.x, 0, out.width);
  const int stop = std::clamp(size.width - shift.x, left, out.width);
  for (int y = 0; y < out.height; ++y, cut += out.width) {
    if (black && !is_inside(y + shift.y, size.height)) {
      std::memset(cut, 0, static_cast<size_t>(out.width));
      continue;
    }
    const uint8_t* row = plane + int64_t{clamp_to_image(y + shift.y, size.height)} * size.width;
    const uint8_t before = black ? 0 : row[0], after = black ? 0 : row[size.width - 1];
    for (int x = 0; x < left; ++x) cut[x] = before;
    copy_row(row + left + shift.x, cut + left, stop - left);
    for (int x = stop; x < out.width; ++x) cut[x] = after;
  }
}

uint8_t* pixel_scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> area;
  if (static_cast<int64_t>(area.size()) < bytes) area.resize(static_cast<size_t>(bytes));
  return area.data();
}

}  // namespace covr
