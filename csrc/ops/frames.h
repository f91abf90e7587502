// Index arithmetic and pixel formats of image windows, shared by the CPU and CUDA kernels of shift, crop and
// replay sampling.
#pragma once

#include <array>
#include <variant>

#include "common/half.h"
#include "common/macros.h"
#include "common/view.h"

namespace covr {

// The source coordinate of an output coordinate under a shift: edge pixels repeat beyond the image.
template <typename Size>
COVR_HD Size clamp_to_image(int64_t coordinate, Size size) {
  return coordinate < 0 ? 0 : coordinate >= size ? size - 1 : static_cast<Size>(coordinate);
}

// A batch of images and the windows that are cut from them.
struct WindowShape {
  int64_t batch, channels;
  int height, width;          // of an image
  int out_height, out_width;  // of a window
};

// Checks that the shapes of a window's arguments agree.
inline WindowShape window_shape(const std::array<int64_t, 4>& out, const std::array<int64_t, 4>& frames,
                                const std::array<int64_t, 2>& offsets) {
  require_shape("out", out, {frames[0], frames[1], out[2], out[3]});
  require_shape("offsets", offsets, {frames[0], 2});
  return {frames[0],
          frames[1],
          static_cast<int>(frames[2]),
          static_cast<int>(frames[3]),
          static_cast<int>(out[2]),
          static_cast<int>(out[3])};
}

// Windows as float32, bfloat16, float16 or uint8 [B, C, height, width].
template <Device kOn>
using Windows =
    std::variant<View<float, 4, kOn>, View<BFloat16, 4, kOn>, View<Float16, 4, kOn>, View<uint8_t, 4, kOn>>;

// pixel / 255 for floating T; bytes stay as they are.
template <typename T>
COVR_HD T pixel_to(uint8_t pixel);

template <>
COVR_HD uint8_t pixel_to<uint8_t>(uint8_t pixel) {
  return pixel;
}

// Rounded as the division is for all 256 inputs, without its cost: 1/255 = 0x0.010101...p0, so the product
// with its first two digits is exact, and one addition rounds.
template <>
COVR_HD float pixel_to<float>(uint8_t pixel) {
  constexpr float kHigh = 0x1.01p-8f, kLow = static_cast<float>(1.0 / 255 - 0x1.01p-8);
  const float value = static_cast<float>(pixel);
  return value * kHigh + value * kLow;
}

// from_float of half.h in fewer operations: a pixel is finite, and as a half not subnormal (1/255 > 2^-14).
template <>
COVR_HD BFloat16 pixel_to<BFloat16>(uint8_t pixel) {
  const uint32_t bits = bits_of(pixel_to<float>(pixel));
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
COVR_HD Float16 pixel_to<Float16>(uint8_t pixel) {
  const uint32_t bits = bits_of(pixel_to<float>(pixel)), rebased = bits - (112u << 23);
  const uint32_t rounded = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(bits == 0 ? 0 : rounded)};
}

#ifdef COVR_WITH_CUDA
namespace cuda {
void window(Windows<Device::kCuda> out, CudaView<const uint8_t, 4> frames, CudaView<const int64_t, 2> offsets,
            int pad, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
