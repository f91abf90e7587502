// The exponential that vectorises: exp(x) for x <= 0, which is what a softmax and a sigmoid need.
#pragma once

#include "common/half.h"

namespace covr {

constexpr float kLowest = -87.33654f;  // below it exp underflows the normal floats

// exp(x) for x <= 0 to 2 ulp, without branches: 2^n * exp(r) with |r| <= ln(2) / 2. Zero below kLowest.
COVR_HD float exp_nonpositive(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.3888889e-3f;  // 1/6!, 1/5!, ...
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < kLowest ? 0.0f : p * power;
}

}  // namespace covr
