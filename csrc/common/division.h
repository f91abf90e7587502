// Division by a number that is known before a kernel starts, in three instructions instead of about twenty.
#pragma once

#include "common/macros.h"

namespace covr {

// n / divisor for n < 2^31. With s = ceil(log2 divisor), 2^32 + multiplier is 2^(32 + s) / divisor rounded up
// (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
class Division {
 public:
  explicit Division(uint32_t divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(((((uint64_t{1} << shift_) - divisor) << 32) / divisor) + 1);
  }

  COVR_HD uint32_t operator()(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((uint64_t{multiplier_} * n) >> 32);
    return (high + n) >> shift_;
  }

 private:
  uint32_t multiplier_ = 0;
  uint32_t shift_ = 0;
};

}  // namespace covr
