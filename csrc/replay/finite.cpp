#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace py = pybind11;

namespace covr {
namespace {

template <typename Bits, typename T>
Bits magnitude_bits(T value, Bits mask) {
  static_assert(sizeof(T) == sizeof(Bits));
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & mask;
}

// (np.abs(array) <= limit).all() in one pass, and without the 5 us that numpy takes for a few numbers. NaN is
// within no limit, infinity within itself. Magnitudes are compared as integers, which order as the floats do.
template <typename T, typename Bits, Bits kMask>
bool all_within(const py::array_t<T, py::array::c_style>& array, double limit) {
  const Bits most = magnitude_bits<Bits>(static_cast<T>(limit), kMask);
  const T* data = array.data();
  bool within = true;
  for (py::ssize_t i = 0, n = array.size(); i < n; ++i)
    within &= magnitude_bits<Bits>(data[i], kMask) <= most;
  return within;
}

}  // namespace

void bind_finite(py::module_& m) {
  m.def("all_within", &all_within<float, int32_t, 0x7fffffff>, py::arg("array").noconvert(),
        py::arg("limit"));
  // Whatever is not float32 is copied to double.
  m.def("all_within", &all_within<double, int64_t, 0x7fffffffffffffff>, py::arg("array"), py::arg("limit"));
}

}  // namespace covr
