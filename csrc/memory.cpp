// Huge pages for large results. A fresh allocation of tens of megabytes is returned to the system on release,
// so every call pays for its page faults again: with 4 KiB pages more than the kernel that fills them.
#include <pybind11/pybind11.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace covr {
namespace {

// A hint, for memory that nobody has touched yet; a kernel that cannot follow it ignores it.
void advise_huge_pages(uintptr_t begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace

void bind_memory(py::module_& m) { m.def("advise_huge_pages", &advise_huge_pages); }

}  // namespace covr
