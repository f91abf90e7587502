// The Python module covr_fast._C: one bind_* function per operation, each in the file of its stem.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace covr {
void bind_filter(py::module_& m);
void bind_finite(py::module_& m);
void bind_frames(py::module_& m);
void bind_loss(py::module_& m);
void bind_output_pool(py::module_& m);
void bind_replay(py::module_& m);
void bind_returns(py::module_& m);
void bind_sum_tree(py::module_& m);
void bind_weights(py::module_& m);
}  // namespace covr

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of covr_fast; call them through covr_fast.ops and covr_fast.ReplayBuffer.";
#ifdef COVR_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_architectures") = COVR_CUDA_ARCHITECTURES;
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_architectures") = "";
#endif
  covr::bind_filter(m);
  covr::bind_finite(m);
  covr::bind_frames(m);
  covr::bind_loss(m);
  covr::bind_output_pool(m);
  covr::bind_replay(m);
  covr::bind_returns(m);
  covr::bind_sum_tree(m);
  covr::bind_weights(m);
}
