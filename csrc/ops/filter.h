// EDDF's formulas, shared by the CPU and CUDA kernels: order-preserving keys, quantile ranks, the threshold.
#pragma once

#include <cmath>
#include <cstring>

#include "common/macros.h"
#include "common/view.h"

namespace covr {

// Bits of a float as an unsigned integer of the same order (-0 just below +0).
COVR_HD uint32_t ordered_key(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t negative = 0u - (bits >> 31);  // all ones; a branch on random signs is mispredicted
  return bits ^ (negative | 0x80000000u);
}

COVR_HD float value_of_key(uint32_t key) {
  const uint32_t bits = key ^ (((key >> 31) - 1u) | 0x80000000u);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Lower quartile, median and upper quartile, each interpolated between two ranks of the sorted values.
constexpr int kRanks = 6;

// Rank i of kRanks: the value below (i even) or above (i odd) quartile i / 2 + 1.
COVR_HD int64_t quartile_rank(int64_t n, int i) {
  const int64_t below = (n - 1) * (i / 2 + 1) / 4;
  return i % 2 == 0 || below + 1 >= n ? below : below + 1;
}

// numpy's method "linear": position (n - 1) * q between the two neighbouring ranks.
COVR_HD double interpolate_quartile(int64_t n, int quartile, double below, double above) {
  return below + (above - below) * (static_cast<double>((n - 1) * quartile % 4) / 4.0);
}

// In the order of the statistics tensor, float64 [4].
struct FilterStatistics {
  double tau, cutoff, mean, std;
};

// sum and squares are of (value - shift); the shift is one of the values, which makes both exactly zero when
// all are equal and keeps the variance from cancelling when all are huge.
COVR_HD FilterStatistics filter_statistics(int64_t n, const double* ranked, double shift, double sum,
                                           double squares, double scale) {
  const double lower = interpolate_quartile(n, 1, ranked[0], ranked[1]);
  const double median = interpolate_quartile(n, 2, ranked[2], ranked[3]);
  const double upper = interpolate_quartile(n, 3, ranked[4], ranked[5]);
  const double centre = sum / static_cast<double>(n);
  const double variance = squares / static_cast<double>(n) - centre * centre;
  FilterStatistics s;
  s.mean = shift + centre;
  s.std = variance > 0 ? sqrt(variance) : 0.0;
  s.cutoff = median + scale * (upper - lower);  // = mean + std * tau: quantiles commute with the z-score
  s.tau = s.std > 0 ? (s.cutoff - s.mean) / s.std : 0.0;
  return s;
}

// The largest float not above the cutoff: for floats, value > cutoff is value > this, in float arithmetic.
COVR_HD float float_at_or_below(double cutoff) {
  const float rounded = static_cast<float>(cutoff);
  return static_cast<double>(rounded) <= cutoff ? rounded : value_of_key(ordered_key(rounded) - 1);
}

#ifdef COVR_WITH_CUDA
namespace cuda {
// How many zeroed bytes the workspace must have for n returns.
int64_t exploration_filter_workspace(int64_t n);
// scale: the sigmoid of Eq. 5, which may be the result of earlier work on the stream. indices: [n], the first
// `kept` of them ascending and the rest -1; statistics: [4].
void exploration_filter(CudaView<const float, 1> returns, CudaView<const double, 0> scale,
                        CudaView<int64_t, 1> indices, CudaView<int64_t, 0> kept,
                        CudaView<double, 1> statistics, CudaView<uint8_t, 1> workspace, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
