// Memory for large results that is used again once nobody looks at it: touching fresh pages for a 65 MB batch
// costs more than filling it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "common/border.h"

namespace py = pybind11;

namespace covr {
namespace {

constexpr size_t kKept = 8;    // obs and next_obs of four batches
constexpr int64_t kSlack = 4;  // a block may be larger than what it is used for by a quarter of that
constexpr int64_t kHugePage = 2 << 20;

// Asks for 2 MiB pages: random 21 KB frames out of gigabytes are bound by address translation otherwise.
void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  auto space = static_cast<size_t>(bytes);
  if (std::align(kHugePage, kHugePage, data, space))
    madvise(data, space / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void prefer_huge_pages_for(AnyView tensor) {
  if (tensor.device == Device::kCpu) prefer_huge_pages(tensor.data, tensor.bytes());
}

uint8_t* allocate(int64_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t size = (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment;
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, std::max(size, alignment)));
  if (!data) throw std::bad_alloc();
  prefer_huge_pages(data, bytes);
  return data;
}

class OutputPool {
 public:
  // Unused memory beyond `idle_bytes` goes back to the system.
  explicit OutputPool(int64_t idle_bytes) : idle_bytes_(idle_bytes) {}
  OutputPool(const OutputPool&) = delete;
  OutputPool& operator=(const OutputPool&) = delete;
  ~OutputPool() { release(); }

  struct Block {
    uint8_t* data;  // 64-byte aligned
    int64_t bytes;
  };

  // A block of at least `bytes`.
  Block take(int64_t bytes) {
    {
      std::lock_guard guard(mutex_);
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (block->bytes >= bytes && block->bytes - bytes <= bytes / kSlack &&
            (best == free_.end() || block->bytes <= best->bytes))
          best = block;
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        return block;
      }
    }
    return {allocate(bytes), bytes};
  }

  // Keeps the most recently used few, frees the rest.
  void give_back(Block block) {
    std::lock_guard guard(mutex_);
    free_.push_back(block);
    int64_t idle = 0;
    size_t kept = 0;
    while (kept < std::min(free_.size(), kKept) && idle + free_[free_.size() - 1 - kept].bytes <= idle_bytes_)
      idle += free_[free_.size() - 1 - kept++].bytes;
    const auto first_kept = free_.end() - static_cast<std::ptrdiff_t>(kept);
    for (auto old = free_.begin(); old != first_kept; ++old) std::free(old->data);
    free_.erase(free_.begin(), first_kept);
  }

  // Frees what nobody uses.
  void release() {
    std::lock_guard guard(mutex_);
    for (const Block& block : free_) std::free(block.data);
    free_.clear();
  }

  // Bytes that nobody uses.
  int64_t idle() const {
    std::lock_guard guard(mutex_);
    int64_t total = 0;
    for (const Block& block : free_) total += block.bytes;
    return total;
  }

 private:
  const int64_t idle_bytes_;
  mutable std::mutex mutex_;
  std::vector<Block> free_;  // the one given back last is last
};

// An array whose memory returns to the pool when the last array or tensor that shares it is gone.
py::array_t<uint8_t> take_array(const std::shared_ptr<OutputPool>& pool, int64_t bytes) {
  struct Owner {
    std::shared_ptr<OutputPool> pool;
    OutputPool::Block block;
  };
  auto* owner = new Owner{pool, pool->take(bytes)};
  py::capsule capsule(owner, [](void* pointer) {
    auto* owner = static_cast<Owner*>(pointer);
    owner->pool->give_back(owner->block);
    delete owner;
  });
  return py::array_t<uint8_t>(bytes, owner->block.data, capsule);
}

}  // namespace

void bind_output_pool(py::module_& m) {
  py::class_<OutputPool, std::shared_ptr<OutputPool>>(m, "OutputPool")
      .def(py::init([](int64_t idle_bytes) { return std::make_shared<OutputPool>(idle_bytes); }),
           py::arg("idle_bytes") = std::numeric_limits<int64_t>::max())
      .def("take", &take_array, py::arg("bytes"))
      .def("release", &OutputPool::release)
      .def_property_readonly("idle", &OutputPool::idle);
  define(m, "prefer_huge_pages", &prefer_huge_pages_for, "tensor");
}

}  // namespace covr
