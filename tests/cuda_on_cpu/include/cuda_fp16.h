// float16 as bits, by the conversions of csrc/common/half.h, which are tested against torch's.
#pragma once

#include "common/half.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float value) { return {covr::from_float<covr::Float16>(value).bits}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline float __half2float(__half value) { return covr::to_float(covr::Float16{value.bits}); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
