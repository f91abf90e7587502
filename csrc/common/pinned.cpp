#include "common/pinned.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace covr {

#ifdef COVR_WITH_CUDA
namespace {

// An array whose pages are freed when the last array or tensor that shares them is gone.
py::array_t<uint8_t> pinned_array(int64_t bytes) {
  auto* pages = [&] {
    py::gil_scoped_release release;  // gigabytes take seconds
    return new cuda::PinnedPages(cuda::pin_pages(bytes));
  }();
  py::capsule owner(pages, [](void* pointer) {
    auto* pages = static_cast<cuda::PinnedPages*>(pointer);
    cuda::free_pages(*pages);
    delete pages;
  });
  return py::array_t<uint8_t>(bytes, pages->data, owner);
}

}  // namespace

void bind_pinned(py::module_& m) { m.def("pinned_array_cuda", &pinned_array, py::arg("bytes")); }
#else
void bind_pinned(py::module_&) {}
#endif

}  // namespace covr
