// Return-aware loss weights.
#include "weights.h"

#include <pybind11/pybind11.h>

#include <algorithm>

namespace py = pybind11;

namespace covr {
namespace {

COVR_CLONES void weigh(float* out, const float* values, int64_t n) {
  float low = values[0], high = values[0];
  for (int64_t i = 1; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
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
