// Rebuilding observations from a ring of single frames: gather, stack, shift, crop or translate, normalise,
// cast, write.
#pragma once

#include "common/view.h"
#include "ops/pixels.h"
#include "replay/gather_index.h"

namespace covr {

// One observation key's frames: `slots` per stream, `frame_bytes` each, channels-first.
struct FrameLayout {
  uint8_t* data = nullptr;
  int64_t slots = 0;  // per stream
  int64_t stack = 1;
  int64_t channels = 1, height = 1, width = 1, item_bytes = 1;

  ImageSize size() const { return {static_cast<int>(height), static_cast<int>(width)}; }
  COVR_HD int64_t plane_items() const { return height * width; }
  COVR_HD int64_t frame_items() const { return channels * plane_items(); }
  COVR_HD int64_t frame_bytes() const { return frame_items() * item_bytes; }
};

// The form of the observations in a batch. uint8 frames may be cut or enlarged to (out_height, out_width) at
// the plan's shift and cast to floats in [0, 1]; frames of any other dtype are copied as they are.
struct GatherTarget {
  DType dtype = DType::kUInt8;
  bool channels_last = false;     // NHWC in memory instead of NCHW
  bool shifted = false;           // by the plans' shifts; otherwise whole frames
  Beyond beyond = Beyond::kEdge;  // the frame, where a shift shows it
  int64_t out_height = 1, out_width = 1;

  ImageSize out_size() const { return {static_cast<int>(out_height), static_cast<int>(out_width)}; }
  int64_t out_plane() const { return out_height * out_width; }
  int64_t row_bytes(const FrameLayout& frames) const {
    return frames.stack * frames.channels * out_plane() * item_bytes(dtype);
  }
};

// One observation into `out`. `streaming`: bypass the cache, for batches larger than it.
void gather_observation(const FrameLayout& frames, const StackPlan& plan, const GatherTarget& target,
                        void* out, bool streaming);

#ifdef COVR_WITH_CUDA
// In kernels/cuda/gather.cu; it does not wait for the device.
// Observations [rows] of one key. `plans` and `out` are in device memory.
void gather_cuda(const FrameLayout& frames, const StackPlan* plans, int64_t rows, const GatherTarget& target,
                 void* out, uintptr_t stream);
#endif

}  // namespace covr
