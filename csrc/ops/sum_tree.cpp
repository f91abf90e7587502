// The sum tree on the CPU: single-threaded, since a batch touches a few kilobytes.
#include "ops/sum_tree.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/border.h"

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

void sum_tree_update(View<float, 1> leaves, View<double, 1> sums, View<const int64_t, 1> indices,
                     View<const float, 1> priorities) {
  require_shape("sums", sums.shape, {inner_nodes(leaves.size())});
  require_shape("priorities", priorities.shape, indices.shape);
  check(indices.data, priorities.data, indices.size(), leaves.size());
  sum_tree_set(leaves.data, sums.data, leaves.size(), indices.data, priorities.data, indices.size());
}

void sum_tree_sample(View<const float, 1> leaves, View<const double, 1> sums, View<const double, 1> jitter,
                     View<int64_t, 1> indices, View<double, 1> probabilities) {
  require_shape("sums", sums.shape, {inner_nodes(leaves.size())});
  require_shape("indices", indices.shape, jitter.shape);
  require_shape("probabilities", probabilities.shape, jitter.shape);
  sum_tree_draw(leaves.data, sums.data, leaves.size(), jitter.data, jitter.size(), indices.data,
                probabilities.data);
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

void bind_sum_tree(pybind11::module_& m) {
  define(m, "sum_tree_inner_nodes", &inner_nodes, "capacity");
  define(m, "sum_tree_update", &sum_tree_update, "leaves", "sums", "indices", "priorities");
  define(m, "sum_tree_sample", &sum_tree_sample, "leaves", "sums", "jitter", "indices", "probabilities");
#ifdef COVR_WITH_CUDA
  define(m, "sum_tree_update_cuda", &cuda::sum_tree_update, "leaves", "sums", "claims", "indices",
         "priorities", "stream");
  define(m, "sum_tree_sample_cuda", &cuda::sum_tree_sample, "leaves", "sums", "jitter", "indices",
         "probabilities", "stream");
#endif
}

}  // namespace covr
