// Half-precision numbers as bits, converted by integer arithmetic that vectorises on any machine and that the
// CPU and CUDA kernels share. Rounding is to nearest even; infinities and subnormals are kept.
#pragma once

#include <cstring>

#include "common/macros.h"

namespace covr {

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

COVR_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

COVR_HD float to_float(float value) { return value; }

COVR_HD float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

COVR_HD float to_float(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity or NaN
  // The product moves the exponent's bias from 15 to 127, and makes subnormal halves normal floats.
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | ((value.bits & 0x8000u) << 16));
}

template <typename T>
COVR_HD T from_float(float value);

template <>
COVR_HD float from_float<float>(float value) {
  return value;
}

template <>
COVR_HD BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded)};
}

template <>
COVR_HD Float16 from_float<Float16>(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves the multiple of 2^-24, the smallest half, in the low bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude < 0x38800000u ? subnormal : magnitude < 0x477ff000u ? normal : special;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

}  // namespace covr
