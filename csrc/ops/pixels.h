// What one pixel becomes and where it comes from: the formulas that the CPU and CUDA sides of shift, crop,
// translation and replay sampling share.
#pragma once

#include <cmath>

#include "common/half.h"
#include "common/macros.h"

namespace covr {

struct ImageSize {
  int height, width;
};

// Output pixel (y, x) is input pixel (y + shift.y, x + shift.x).
struct ImageShift {
  int y, x;
};

// What lies beyond the image: its edge pixels, repeated, or black.
enum class Beyond : uint8_t { kEdge, kBlack };

// The source coordinate of an output coordinate under a shift: edge pixels repeat beyond the image.
COVR_HD int clamp_to_image(int coordinate, int size) {
  return coordinate < 0 ? 0 : coordinate >= size ? size - 1 : coordinate;
}

COVR_HD bool is_inside(int coordinate, int size) {
  return static_cast<unsigned>(coordinate) < static_cast<unsigned>(size);
}

// offset - pad as a shift: where it moves the whole output beyond the image, the smallest that does.
COVR_HD int shift_of(int64_t offset, int pad, int size, int out_size) {
  return offset <= pad - out_size        ? -out_size
         : offset >= int64_t{pad} + size ? size
                                         : static_cast<int>(offset - pad);
}

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

// A float that rounds to the same half as pixel_to<float>, for all 256 inputs and both kinds of halves.
COVR_HD float pixel_before_rounding(uint8_t pixel) { return static_cast<float>(pixel) * (1.0f / 255); }

// from_float of half.h in fewer operations: a pixel is finite, and as a half not subnormal (1/255 > 2^-14).
template <>
COVR_HD BFloat16 pixel_to<BFloat16>(uint8_t pixel) {
  const uint32_t bits = bits_of(pixel_before_rounding(pixel));
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
COVR_HD Float16 pixel_to<Float16>(uint8_t pixel) {
  const uint32_t bits = bits_of(pixel_before_rounding(pixel)), rebased = bits - (112u << 23);
  const uint32_t rounded = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(bits == 0 ? 0 : rounded)};
}

// The same from 2^23 + pixel, a float whose last byte is the pixel: the GPU makes it of a word of pixels in
// one instruction, and each formula in one or two more. The products are exact before their sum is rounded.
COVR_HD float biased_pixel_before_rounding(float biased) {
  constexpr float kFactor = 1.0f / 255;
  return std::fma(biased, kFactor, -0x1p23f * kFactor);
}

COVR_HD float biased_pixel_to_float(float biased) {
  const float high = std::fma(biased, 0x1.01p-8f, -0x1.01p15f);  // pixel * 257 / 65536
  return std::fma(high, 1.0f / 65535, high);                     // 65536 / (255 * 257) = 1 + 1 / 65535
}

// How four neighbouring output pixels are read from a plane whose rows are whole 4-byte words: they lie in
// one word or in two neighbours, edges included, and are the same bytes of those in every plane.
struct WordPack {
  int word;         // the first word, counted from the plane's begin
  bool two;         // the next one is needed too
  uint32_t select;  // one hexadecimal digit per pixel: its byte among the eight, as __byte_perm takes it

  // Of row source_y; the first pixel comes from column source_x, which may lie outside.
  COVR_HD WordPack(int source_y, int source_x, int width) {
    const int words = width / 4, first = clamp_to_image(source_x >> 2, words);
    select = 0;
    for (int i = 0; i < 4; ++i)
      select |= static_cast<uint32_t>(clamp_to_image(source_x + i, width) - 4 * first) << 4 * i;
    word = source_y * words + first;
    two = (select & 0x4444u) != 0;
  }
};

// Which of the four pixels from (y, x) on lie in the image: a mask of bytes.
COVR_HD uint32_t bytes_inside(int y, int x, ImageSize size) {
  if (!is_inside(y, size.height)) return 0;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= is_inside(x + i, size.width) ? 0xffu << 8 * i : 0;
  return bytes;
}

// ---- the CPU's loops; see pixels.cpp ----

// The part of `plane` that the shift selects into `cut` [size of out].
void cut_plane(const uint8_t* plane, ImageSize size, ImageShift shift, Beyond beyond, ImageSize out,
               uint8_t* cut);

// pixel_to of n contiguous pixels. `streaming`: bypass the cache, for results larger than it.
void convert_pixels(const uint8_t* in, float* out, int64_t n, bool streaming);
void convert_pixels(const uint8_t* in, BFloat16* out, int64_t n, bool streaming);
void convert_pixels(const uint8_t* in, Float16* out, int64_t n, bool streaming);
void convert_pixels(const uint8_t* in, uint8_t* out, int64_t n, bool streaming);

// Memory of this thread for at least `bytes`, until it asks again.
uint8_t* pixel_scratch(int64_t bytes);

}  // namespace covr
