#include "replay/frame_view.h"

#include <algorithm>
#include <cstring>

#include "common/streaming.h"
#include "replay/closeness.h"

namespace covr {

FrameView frame_of(const ObservationKey& key, const uint8_t* observation, int64_t position) {
  const FrameLayout& f = key.frames;
  if (!key.input_channels_last)
    return {observation + position * f.frame_bytes(), 1, f.frame_bytes(), f.frame_bytes()};
  const int64_t pixel = f.channels * f.item_bytes;
  return {observation + position * pixel, f.plane_items(), pixel, f.stack * pixel};
}

bool equal_frames(const FrameView& a, const FrameView& b) {
  for (int64_t i = 0; i < a.runs; ++i)
    if (std::memcmp(a.data + i * a.stride, b.data + i * b.stride, static_cast<size_t>(a.bytes)) != 0)
      return false;
  return true;
}

bool blank_frame(const FrameView& a) {
  for (int64_t i = 0; i < a.runs; ++i) {
    const uint8_t* run = a.data + i * a.stride;
    if (std::any_of(run, run + a.bytes, [](uint8_t byte) { return byte != 0; })) return false;
  }
  return true;
}

namespace {

bool equal_bytes(const uint8_t* a, const uint8_t* b, int64_t n, int64_t phase) {
  if (phase < 0) return std::memcmp(a, b, static_cast<size_t>(n)) == 0;
  constexpr int64_t kStride = kProbe * kProbeEvery;
  for (int64_t i = phase * kProbe; i < n; i += kStride)
    if (std::memcmp(a + i, b + i, static_cast<size_t>(std::min(kProbe, n - i))) != 0) return false;
  return true;
}

// Item i of a frame, counted as it lies in the input.
double input_number(const ObservationKey& key, const FrameView& in, int64_t i) {
  const int64_t bytes = key.frames.item_bytes, per_run = in.bytes / bytes;
  return number(in.data + i / per_run * in.stride + i % per_run * bytes, static_cast<int>(bytes));
}

// Whether frames of floats with items a(i) and b(i) are the same.
template <typename A, typename B>
bool close_frames(const ObservationKey& key, const A& a, const B& b) {
  if (!is_floating(key.dtype)) return false;
  const int64_t n = key.frames.frame_items();
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = larger_magnitude(largest, a(i), b(i));
  for (int64_t i = 0; i < n; ++i)
    if (!close_numbers(a(i), b(i), tolerance(key.frames.item_bytes), largest)) return false;
  return true;
}

bool equal_stored(const ObservationKey& key, const FrameView& in, const uint8_t* stored, int64_t phase) {
  if (!stored) return blank_frame(in);
  if (in.runs == 1) return equal_bytes(in.data, stored, in.bytes, phase);
  const FrameLayout& f = key.frames;
  const int64_t step = phase < 0 ? 1 : kProbeEvery;
  for (int64_t i = std::max<int64_t>(phase, 0); i < in.runs; i += step)
    for (int64_t c = 0; c < f.channels; ++c)
      if (std::memcmp(in.data + i * in.stride + c * f.item_bytes, stored + (c * in.runs + i) * f.item_bytes,
                      static_cast<size_t>(f.item_bytes)) != 0)
        return false;
  return true;
}

}  // namespace

bool same_frames(const ObservationKey& key, const FrameView& a, const FrameView& b) {
  const auto in_a = [&](int64_t i) { return input_number(key, a, i); };
  const auto in_b = [&](int64_t i) { return input_number(key, b, i); };
  return equal_frames(a, b) || close_frames(key, in_a, in_b);
}

bool same_as_stored(const ObservationKey& key, const FrameView& in, const uint8_t* stored, int64_t phase) {
  if (equal_stored(key, in, stored, phase)) return true;
  const int64_t bytes = key.frames.item_bytes, per_run = in.bytes / bytes;
  const auto in_input = [&](int64_t i) { return input_number(key, in, i); };
  const auto in_stored = [&](int64_t i) {
    return stored ? number(stored + (i % per_run * in.runs + i / per_run) * bytes, static_cast<int>(bytes))
                  : 0.0;
  };
  return close_frames(key, in_input, in_stored);
}

void prefetch_probes(const uint8_t* data, int64_t n, int64_t phase) {
  for (int64_t i = phase * kProbe; i < n; i += kProbe * kProbeEvery)
    for (int64_t j = i; j < std::min(i + kProbe, n); j += 64) __builtin_prefetch(data + j);
}

void store_frame(const ObservationKey& key, const FrameView& in, uint8_t* stored) {
  const FrameLayout& f = key.frames;
  if (in.runs == 1) {
    // A large frame is read again much later, if at all.
    if (in.bytes > kSmallFrame)
      copy_streaming(in.data, stored, in.bytes);
    else
      std::memcpy(stored, in.data, static_cast<size_t>(in.bytes));
  } else if (f.item_bytes == 1) {
    for (int64_t c = 0; c < f.channels; ++c)
      for (int64_t i = 0; i < in.runs; ++i) stored[c * in.runs + i] = in.data[i * in.stride + c];
  } else {
    for (int64_t c = 0; c < f.channels; ++c)
      for (int64_t i = 0; i < in.runs; ++i)
        std::memcpy(stored + (c * in.runs + i) * f.item_bytes, in.data + i * in.stride + c * f.item_bytes,
                    static_cast<size_t>(f.item_bytes));
  }
}

}  // namespace covr
