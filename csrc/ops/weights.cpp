// Return-aware loss weights.
#include "ops/weights.h"

#include <pybind11/pybind11.h>

#include <algorithm>

namespace py = pybind11;

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

void return_weights(uintptr_t out, uintptr_t values, int64_t n) {
  if (n) weigh(reinterpret_cast<float*>(out), reinterpret_cast<const float*>(values), n);
}

}  // namespace

void bind_weights(py::module_& m) {
  m.def("return_weights", &return_weights, py::call_guard<py::gil_scoped_release>());
#ifdef COVR_WITH_CUDA
  m.def("return_weights_cuda", &cuda::return_weights, py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace covr
