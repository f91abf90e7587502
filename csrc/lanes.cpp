#include "lanes.h"

#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace covr {
namespace {

int lanes_of_this_machine() {
#ifdef COVR_X86_64
  if (__builtin_cpu_supports("x86-64-v4")) return 16;
  if (__builtin_cpu_supports("x86-64-v3")) return 8;
#endif
  return 4;
}

std::atomic<int> g_lanes{lanes_of_this_machine()};

}  // namespace

int lanes_in_use() { return g_lanes.load(std::memory_order_relaxed); }

void use_lanes(int lanes) {
  if ((lanes != 4 && lanes != 8 && lanes != 16) || lanes > lanes_of_this_machine())
    throw std::invalid_argument("lanes must be 4, 8 or 16 and at most " +
                                std::to_string(lanes_of_this_machine()) + " on this machine, not " +
                                std::to_string(lanes));
  g_lanes = lanes;
}

void bind_lanes(py::module_& m) {
  m.def("lanes_in_use", &lanes_in_use);
  m.def("use_lanes", &use_lanes);
}

}  // namespace covr
