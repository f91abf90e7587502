#include "output_pool.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>

namespace py = pybind11;

namespace covr {
namespace {

constexpr size_t kKept = 8;  // obs and next_obs of four batches
constexpr int64_t kHugePage = 2 << 20;

// Asks for 2 MiB pages: random 21 KB frames out of gigabytes are bound by address translation otherwise.
void prefer_huge_pages(uint8_t* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

uint8_t* allocate(int64_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t size = (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, std::max(size, alignment)));
  if (!data) throw std::bad_alloc();
  prefer_huge_pages(data, bytes);
  return data;
}

// An array whose memory returns to the pool when the last array or tensor that shares it is gone.
py::array_t<uint8_t> take_array(const std::shared_ptr<OutputPool>& pool, int64_t bytes) {
  struct Owner {
    std::shared_ptr<OutputPool> pool;
    uint8_t* data;
    int64_t bytes;
  };
  auto* owner = new Owner{pool, pool->take(bytes), bytes};
  py::capsule capsule(owner, [](void* pointer) {
    auto* owner = static_cast<Owner*>(pointer);
    owner->pool->give_back(owner->data, owner->bytes);
    delete owner;
  });
  return py::array_t<uint8_t>(bytes, owner->data, capsule);
}

}  // namespace

OutputPool::~OutputPool() {
  for (const Block& block : free_) std::free(block.data);
}

uint8_t* OutputPool::take(int64_t bytes) {
  {
    std::lock_guard guard(mutex_);
    for (size_t i = free_.size(); i-- > 0;) {
      if (free_[i].bytes != bytes) continue;
      uint8_t* data = free_[i].data;
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
      return data;
    }
  }
  return allocate(bytes);
}

void OutputPool::give_back(uint8_t* data, int64_t bytes) {
  std::lock_guard guard(mutex_);
  free_.push_back({data, bytes});
  if (free_.size() <= kKept) return;
  std::free(free_.front().data);
  free_.erase(free_.begin());
}

void bind_output_pool(py::module_& m) {
  py::class_<OutputPool, std::shared_ptr<OutputPool>>(m, "OutputPool")
      .def(py::init([] { return std::make_shared<OutputPool>(); }))
      .def("take", &take_array, py::arg("bytes"));
  m.def(
      "prefer_huge_pages",
      [](uintptr_t data, int64_t bytes) { prefer_huge_pages(reinterpret_cast<uint8_t*>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
}

}  // namespace covr
