// Index arithmetic and pixel formats of image windows, shared by the CPU and CUDA kernels of shift, crop and
// replay sampling.
#pragma once

#include <cstring>

#include "common.h"

namespace covr {

// The source coordinate of an output coordinate under a shift: edge pixels repeat beyond the image.
COVR_HD int clamp_to_image(int64_t coordinate, int size) {
  return coordinate < 0 ? 0 : coordinate >= size ? size - 1 : static_cast<int>(coordinate);
}

// Output pixel formats, in the order in which Python numbers them.
enum class PixelFormat { kFloat32, kBFloat16, kFloat16, kUInt8 };

// Halves are carried as their bits: the host compiler need not know the types.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

COVR_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// pixel / 255 in the asked format, rounded to nearest even.
template <typename T>
COVR_HD T pixel_to(uint8_t pixel);

template <>
COVR_HD uint8_t pixel_to<uint8_t>(uint8_t pixel) {
  return pixel;
}

template <>
COVR_HD float pixel_to<float>(uint8_t pixel) {
  return static_cast<float>(pixel) / 255.0f;
}

template <>
COVR_HD BFloat16 pixel_to<BFloat16>(uint8_t pixel) {
  const uint32_t bits = bits_of(pixel_to<float>(pixel));
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
COVR_HD Float16 pixel_to<Float16>(uint8_t pixel) {
  // Values are 0 or in [1/255, 1]: all normal in half precision, so only the exponent is rebased.
  const uint32_t bits = bits_of(pixel_to<float>(pixel));
  const uint32_t rebased = bits - ((127u - 15u) << 23);
  const uint16_t half = static_cast<uint16_t>((rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
  return {static_cast<uint16_t>(pixel ? half : 0)};
}

}  // namespace covr
