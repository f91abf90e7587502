// One frame of an observation that is added: compared with other frames, and stored channels-first.
#pragma once

#include "replay/replay.h"

namespace covr {

// Comparing every byte of every stack would cost more than storing the one new frame. So most steps compare
// only a part: probes of 256 bytes, one in every 8 KiB of a frame, at other places in each frame and on each
// step. A phase says where the probes lie, in [0, kProbeEvery); kCompareAll stands for the whole frame.
constexpr int64_t kProbe = 256, kProbeEvery = 32, kSmallFrame = 4096;
constexpr int64_t kCompareAll = -1;

// A frame in whatever layout it is added: `runs` pieces of `bytes`, `stride` apart.
struct FrameView {
  const uint8_t* data;
  int64_t runs, bytes, stride;
};

// Frame number `position` of an observation.
FrameView frame_of(const ObservationKey& key, const uint8_t* observation, int64_t position);

bool equal_frames(const FrameView& a, const FrameView& b);  // byte for byte
bool blank_frame(const FrameView& a);                       // all bytes are zero

// Whether frames are equal; floats may differ by rounding. A stored frame is channels-first, and nullptr is
// the blank frame.
bool same_frames(const ObservationKey& key, const FrameView& a, const FrameView& b);
bool same_as_stored(const ObservationKey& key, const FrameView& in, const uint8_t* stored, int64_t phase);
// Starts to load what same_as_stored is about to read of a frame: scattered lines, whose latencies overlap.
void prefetch_probes(const uint8_t* frame, int64_t bytes, int64_t phase);

void store_frame(const ObservationKey& key, const FrameView& in, uint8_t* stored);

}  // namespace covr
