// The CPU side of gather.h. A shifted plane is first cut out into a scratch area that stays in the cache, so
// that the expensive part, casting and writing, always runs over long contiguous spans.
#include "replay/gather.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace covr {
namespace {

#ifdef __SSE2__
COVR_HD void stream16(void* out, const void* in) {
  _mm_stream_si128(static_cast<__m128i*>(out), _mm_loadu_si128(static_cast<const __m128i*>(in)));
}
#else
COVR_HD void stream16(void* out, const void* in) { std::memcpy(out, in, 16); }
#endif

constexpr int64_t kBlockBytes = 128;

// Casts n contiguous items. Non-temporal stores spare the read of lines that are about to be overwritten.
template <typename Out>
COVR_HD void cast_span_body(const uint8_t* in, Out* out, int64_t n, bool streaming) {
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

COVR_CLONES void cast_span(const uint8_t* in, float* out, int64_t n, bool streaming) {
  cast_span_body(in, out, n, streaming);
}
COVR_CLONES void cast_span(const uint8_t* in, BFloat16* out, int64_t n, bool streaming) {
  cast_span_body(in, out, n, streaming);
}
COVR_CLONES void cast_span(const uint8_t* in, Float16* out, int64_t n, bool streaming) {
  cast_span_body(in, out, n, streaming);
}
void cast_span(const uint8_t* in, uint8_t* out, int64_t n, bool streaming) {
  if (streaming) return copy_streaming(in, out, n);
  std::memcpy(out, in, static_cast<size_t>(n));
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

// The part of `plane` that the shift selects, edges repeated, into `cut` [out_height, out_width].
void cut_plane(const uint8_t* plane, int64_t height, int64_t width, const StackPlan& plan,
               const GatherTarget& target, uint8_t* cut) {
  const int64_t out_width = target.out_width;
  const int64_t left = std::clamp<int64_t>(-plan.shift_x, 0, out_width);
  const int64_t stop = std::clamp<int64_t>(width - plan.shift_x, left, out_width);
  for (int64_t y = 0; y < target.out_height; ++y, cut += out_width) {
    const uint8_t* row = plane + clamp_to_image(y + plan.shift_y, height) * width;
    for (int64_t x = 0; x < left; ++x) cut[x] = row[0];
    copy_row(row + left + plan.shift_x, cut + left, stop - left);
    for (int64_t x = stop; x < out_width; ++x) cut[x] = row[width - 1];
  }
}

uint8_t* scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> area;
  if (static_cast<int64_t>(area.size()) < bytes) area.resize(static_cast<size_t>(bytes));
  return area.data();
}

template <typename Out>
void gather_pixels(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target, Out* out,
                   bool streaming) {
  const int64_t in_plane = frames.plane_items();
  const int64_t out_plane = target.out_height * target.out_width;
  const int64_t out_channels = frames.stack * frames.channels;
  uint8_t* cut = target.shifted ? scratch(frames.channels * out_plane) : nullptr;
  for (int64_t j = 0; j < frames.stack; ++j) {
    const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
    Out* frame_out = out + (target.channels_last ? j * frames.channels : j * frames.channels * out_plane);
    if (slot == kBlankFrame) {
      if (!target.channels_last) {
        std::memset(frame_out, 0, static_cast<size_t>(frames.channels * out_plane) * sizeof(Out));
      } else {
        for (int64_t i = 0; i < out_plane; ++i)
          std::memset(frame_out + i * out_channels, 0, static_cast<size_t>(frames.channels) * sizeof(Out));
      }
      continue;
    }
    const uint8_t* pixels = frames.data + slot * frames.frame_bytes();
    if (target.shifted) {
      for (int64_t c = 0; c < frames.channels; ++c)
        cut_plane(pixels + c * in_plane, frames.height, frames.width, plan, target, cut + c * out_plane);
      pixels = cut;
    }
    if (!target.channels_last) {
      cast_span(pixels, frame_out, frames.channels * out_plane, streaming);
    } else {
      for (int64_t i = 0; i < out_plane; ++i)
        for (int64_t c = 0; c < frames.channels; ++c)
          out[target.position(frames, j, c, i)] = pixel_to<Out>(pixels[c * out_plane + i]);
    }
  }
}

// Frames of other types (vectors, float images): copied, never shifted or cast.
void gather_items(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                  uint8_t* out) {
  const int64_t bytes = frames.frame_bytes(), item = frames.item_bytes, plane = frames.plane_items();
  for (int64_t j = 0; j < frames.stack; ++j) {
    const int64_t slot = stack_slot(plan, frames.slots, frames.stack - 1 - j);
    const uint8_t* source = slot == kBlankFrame ? nullptr : frames.data + slot * bytes;
    if (!target.channels_last || plane == 1) {
      uint8_t* to = out + j * bytes;
      source ? std::memcpy(to, source, static_cast<size_t>(bytes))
             : std::memset(to, 0, static_cast<size_t>(bytes));
      continue;
    }
    for (int64_t i = 0; i < plane; ++i)
      for (int64_t c = 0; c < frames.channels; ++c) {
        uint8_t* to = out + target.position(frames, j, c, i) * item;
        source ? std::memcpy(to, source + (c * plane + i) * item, static_cast<size_t>(item))
               : std::memset(to, 0, static_cast<size_t>(item));
      }
  }
}

}  // namespace

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

void gather_observation(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                        void* out, bool streaming) {
  if (frames.item_bytes != 1) return gather_items(frames, plan, target, static_cast<uint8_t*>(out));
  switch (target.dtype) {
    case DType::kFloat32:
      return gather_pixels(frames, plan, target, static_cast<float*>(out), streaming);
    case DType::kBFloat16:
      return gather_pixels(frames, plan, target, static_cast<BFloat16*>(out), streaming);
    case DType::kFloat16:
      return gather_pixels(frames, plan, target, static_cast<Float16*>(out), streaming);
    default:
      return gather_pixels(frames, plan, target, static_cast<uint8_t*>(out), streaming);
  }
}

void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace covr
