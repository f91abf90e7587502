// When frames of floats count as the same: what is computed twice, or rounded on the way, differs in its last
// bits. Numbers a and b of two frames may differ by r (max(|a|, |b|) + 0.1 min(1, m)), where r = 1e-5
// (float16: 2e-3) and m is the largest magnitude in the frames.
#pragma once

#include "common/half.h"
#include "replay/tables.h"

namespace covr {

// A float of so many bytes.
COVR_HD double number(const uint8_t* item, int bytes) {
  double wide;
  float narrow;
  Float16 half;
  switch (bytes) {
    case 8:
      return memcpy(&wide, item, sizeof wide), wide;
    case 4:
      return memcpy(&narrow, item, sizeof narrow), static_cast<double>(narrow);
    default:
      return memcpy(&half, item, sizeof half), static_cast<double>(to_float(half));
  }
}

COVR_HD double magnitude(double value) { return value < 0 ? -value : value; }

// The largest of `largest`, |a| and |b|, of which NaN is none.
COVR_HD double larger_magnitude(double largest, double a, double b) {
  if (magnitude(a) > largest) largest = magnitude(a);
  if (magnitude(b) > largest) largest = magnitude(b);
  return largest;
}

COVR_HD double tolerance(int64_t item_bytes) { return item_bytes == 2 ? 2e-3 : 1e-5; }

COVR_HD bool close_numbers(double a, double b, double tolerance, double largest) {
  const double spread = larger_magnitude(0, a, b) + product(0.1, largest < 1.0 ? largest : 1.0);
  return magnitude(a - b) <= product(tolerance, spread);  // false for NaN
}

}  // namespace covr
