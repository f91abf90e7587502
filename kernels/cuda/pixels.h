// The one kernel behind replay sampling, random shift, crop and translation on the GPU: stacks of uint8
// frames, moved, cut or laid on black, converted and written as a batch of images.
#pragma once

#include "common/view.h"
#include "launch.h"
#include "ops/pixels.h"
#include "replay/gather_index.h"

namespace covr::cuda {

// Row r of the batch is a stack of frames [channels, height, width]. It is rebuilt from a ring by plans[r],
// or, if there are no plans, it is frame r, moved by offsets[r] - pad.
struct PixelSource {
  const uint8_t* frames;
  int stack, channels;
  ImageSize size;
  const StackPlan* plans = nullptr;
  int64_t slots = 0;  // of a ring
  const int64_t* offsets = nullptr;
  int pad = 0;
};

// Images [rows, stack * channels, height, width]; channels_last: [rows, height, width, stack * channels].
struct PixelTarget {
  void* data;
  DType dtype;  // uint8, float32, bfloat16 or float16
  bool channels_last;
  bool shifted;  // otherwise whole frames, and the plans' shifts do not count
  Beyond beyond;
  ImageSize size;
};

// Throws std::invalid_argument for images of more than 2^31 bytes or of more channels than a block can
// interleave.
void write_pixels(PixelSource source, int64_t rows, PixelTarget target, cudaStream_t stream);

}  // namespace covr::cuda
