// Index arithmetic and pixel formats of image windows, shared by the CPU and CUDA kernels of shift, crop and
// replay sampling.
#pragma once

#include "common/macros.h"
#include "common/half.h"

namespace covr {

// The source coordinate of an output coordinate under a shift: edge pixels repeat beyond the image.
COVR_HD int clamp_to_image(int64_t coordinate, int size) {
  return coordinate < 0 ? 0 : coordinate >= size ? size - 1 : static_cast<int>(coordinate);
}

// Output pixel formats, in the order in which Python numbers them.
enum class PixelFormat { kFloat32, kBFloat16, kFloat16, kUInt8 };

// pixel / 255 in the asked format; bytes stay as they are.
template <typename T>
COVR_HD T pixel_to(uint8_t pixel) {
  return from_float<T>(static_cast<float>(pixel) / 255.0f);
}

template <>
COVR_HD uint8_t pixel_to<uint8_t>(uint8_t pixel) {
  return pixel;
}

#ifdef COVR_WITH_CUDA
namespace cuda {
void window(uintptr_t out, uintptr_t frames, uintptr_t offsets, int64_t batch, int64_t channels, int height,
            int width, int out_height, int out_width, int pad, int format, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
