// Return-aware loss weights.
#include "ops/weights.h"

#include <algorithm>

#include "common/border.h"

namespace covr {
namespace {

COVR_CLONES void weigh(float* out, const float* values, int64_t n) {
  constexpr int kLanes = 32;  // independent extremes, for the compiler to keep in vectors
  float lows[kLanes], highs[kLanes];
  std::fill_n(lows, kLanes, values[0]);
  std::fill_n(highs, kLanes, values[0]);
  for (int64_t i = 0; i < n; i += kLanes) {
    const float* block = values + std::max<int64_t>(std::min(i, n - kLanes), 0);  // the last one may overlap
    const int lanes = static_cast<int>(std::min<int64_t>(n, kLanes));
    for (int lane = 0; lane < lanes; ++lane) {
      lows[lane] = block[lane] < lows[lane] ? block[lane] : lows[lane];
      highs[lane] = block[lane] > highs[lane] ? block[lane] : highs[lane];
    }
  }
  const float low = *std::min_element(lows, lows + kLanes), high = *std::max_element(highs, highs + kLanes);
  for (int64_t i = 0; i < n; ++i) out[i] = return_weight(values[i], low, high);
}

void return_weights(View<float, 1> out, View<const float, 1> returns) {
  require_shape("out", out.shape, returns.shape);
  if (returns.size() > 0) weigh(out.data, returns.data, returns.size());
}

}  // namespace

void bind_weights(pybind11::module_& m) {
  define(m, "return_weights", &return_weights, "out", "returns");
#ifdef COVR_WITH_CUDA
  define(m, "return_weights_cuda", &cuda::return_weights, "out", "returns", "extremes", "stream");
#endif
}

}  // namespace covr
