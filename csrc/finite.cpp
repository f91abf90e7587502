#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace py = pybind11;

namespace covr {
namespace {

// np.isfinite(array).all() in one pass, and without the 5 us that numpy takes for a few numbers.
template <typename T, typename Bits, Bits kExponent>
bool all_finite(const py::array_t<T, py::array::c_style>& array) {
  static_assert(sizeof(T) == sizeof(Bits));
  const T* data = array.data();
  bool finite = true;
  for (py::ssize_t i = 0, n = array.size(); i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i, sizeof bits);
    finite &= (bits & kExponent) != kExponent;
  }
  return finite;
}

}  // namespace

void bind_finite(py::module_& m) {
  m.def("all_finite", &all_finite<float, uint32_t, 0x7f800000u>, py::arg("array").noconvert());
  // Whatever is not float32 is copied to double.
  m.def("all_finite", &all_finite<double, uint64_t, 0x7ff0000000000000u>, py::arg("array"));
}

}  // namespace covr
