// The sum tree on the CPU: single-threaded, since a batch touches a few kilobytes.
#include "ops/sum_tree.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace covr {
namespace {

int64_t inner_nodes(int64_t capacity) { return SumTreeLayout(capacity).inner_nodes(); }

void check(const int64_t* indices, const float* priorities, int64_t n, int64_t capacity) {
  for (int64_t i = 0; i < n; ++i) {
    if (indices[i] < 0 || indices[i] >= capacity)
      throw std::invalid_argument("SumTree: index " + std::to_string(indices[i]) + " is not in [0, " +
                                  std::to_string(capacity) + ")");
    if (!(priorities[i] >= 0 && std::isfinite(priorities[i])))
      throw std::invalid_argument("SumTree: priorities must be finite and not negative, found " +
                                  std::to_string(priorities[i]));
  }
}

// Replaces node numbers by those of their parents, dropping repeats of the one before: neighbouring nodes,
// as a replay buffer writes them, collapse into one.
void to_parents(std::vector<int64_t>& nodes) {
  size_t kept = 0;
  for (int64_t node : nodes)
    if (const int64_t parent = node / kFanOut; kept == 0 || nodes[kept - 1] != parent) nodes[kept++] = parent;
  nodes.resize(kept);
}

void sum_tree_update(uintptr_t leaves, uintptr_t sums, int64_t capacity, uintptr_t indices_,
                     uintptr_t priorities_, int64_t n) {
  const auto* indices = reinterpret_cast<const int64_t*>(indices_);
  const auto* priorities = reinterpret_cast<const float*>(priorities_);
  check(indices, priorities, n, capacity);
  sum_tree_set(reinterpret_cast<float*>(leaves), reinterpret_cast<double*>(sums), capacity, indices,
               priorities, n);
}

void sum_tree_sample(uintptr_t leaves_, uintptr_t sums_, int64_t capacity, uintptr_t jitter_, int64_t n,
                     uintptr_t indices_, uintptr_t probabilities_) {
  sum_tree_draw(reinterpret_cast<const float*>(leaves_), reinterpret_cast<const double*>(sums_), capacity,
                reinterpret_cast<const double*>(jitter_), n, reinterpret_cast<int64_t*>(indices_),
                reinterpret_cast<double*>(probabilities_));
}

template <typename T>
void prefetch_children(const T* entries, int64_t parent) {
  for (int64_t i = 0; i < kFanOut; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(entries + parent * kFanOut + i);
}

}  // namespace

COVR_CLONES void sum_tree_set(float* leaves, double* sums, int64_t capacity, const int64_t* indices,
                              const float* priorities, int64_t n) {
  const SumTreeLayout layout(capacity);
  std::vector<int64_t> touched(indices, indices + n);
  for (int64_t i = 0; i < n; ++i) leaves[indices[i]] = priorities[i];
  to_parents(touched);
  for (int64_t node : touched) sums[node] = sum_children(leaves, capacity, node);
  for (int level = 1; level < layout.levels; ++level) {
    to_parents(touched);
    for (int64_t node : touched)
      sums[layout.offset[level] + node] =
          sum_children(sums + layout.offset[level - 1], layout.size[level - 1], node);
  }
}

// Level by level for the whole batch: the cache misses of one level's nodes overlap.
COVR_CLONES void sum_tree_draw(const float* leaves, const double* sums, int64_t capacity,
                               const double* jitter, int64_t n, int64_t* indices, double* probabilities) {
  const SumTreeLayout layout(capacity);
  const double total = sums[layout.inner_nodes() - 1];
  double* target = probabilities;  // what is left of each draw's point until its leaf is known
  for (int64_t i = 0; i < n; ++i) {
    indices[i] = 0;
    target[i] = stratum(i, n, jitter[i], total);
  }
  for (int level = layout.levels - 2; level >= 0; --level) {
    const double* entries = sums + layout.offset[level];
    for (int64_t i = 0; i < n; ++i) {
      indices[i] = choose_child(entries, layout.size[level], indices[i], target[i]);
      if (level > 0)
        prefetch_children(sums + layout.offset[level - 1], indices[i]);
      else
        prefetch_children(leaves, indices[i]);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    indices[i] = choose_child(leaves, capacity, indices[i], target[i]);
    probabilities[i] = total > 0 ? leaves[indices[i]] / total : 0.0;
  }
}

void bind_sum_tree(py::module_& m) {
  m.def("sum_tree_inner_nodes", &inner_nodes);
  m.def("sum_tree_update", &sum_tree_update, py::call_guard<py::gil_scoped_release>());
  m.def("sum_tree_sample", &sum_tree_sample, py::call_guard<py::gil_scoped_release>());
#ifdef COVR_WITH_CUDA
  m.def("sum_tree_update_cuda", &cuda::sum_tree_update, py::call_guard<py::gil_scoped_release>());
  m.def("sum_tree_sample_cuda", &cuda::sum_tree_sample, py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace covr
