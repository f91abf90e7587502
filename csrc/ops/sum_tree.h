// Layout and descent of the sum tree, shared by the CPU and CUDA kernels.
//
// Leaves are floats. Each level above holds one double per 32 entries below, up to a single root; all inner
// levels lie one after the other in one array, lowest first, the root last.
#pragma once

#include "common/macros.h"
#include "common/view.h"

namespace covr {

constexpr int64_t kFanOut = 32;
constexpr int kMaxLevels = 13;  // 32^13 > 2^63

struct SumTreeLayout {
  int levels = 0;  // inner levels, at least one
  int64_t capacity;
  int64_t size[kMaxLevels];    // nodes of each inner level
  int64_t offset[kMaxLevels];  // where it begins

  COVR_HD explicit SumTreeLayout(int64_t leaves) : capacity(leaves) {
    int64_t nodes = leaves, begin = 0;
    do {
      nodes = (nodes + kFanOut - 1) / kFanOut;
      size[levels] = nodes;
      offset[levels++] = begin;
      begin += nodes;
    } while (nodes > 1);
  }

  COVR_HD int64_t inner_nodes() const { return offset[levels - 1] + 1; }
};

// The 32 entries under a node in four groups: their sums are independent of each other, and finding a target
// takes three comparisons of sums and seven of entries instead of up to 32 in a row.
constexpr int kGroups = 4, kGroup = kFanOut / kGroups;

template <typename T>
COVR_HD double sum_group(const T* entries) {
  double sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += static_cast<double>(entries[i]);
  return sum;
}

template <typename T>
COVR_HD double sum_children(const T* entries, int64_t n, int64_t parent) {
  const int64_t begin = parent * kFanOut;
  double sum = 0;
  if (begin + kFanOut <= n) {
    for (int group = 0; group < kGroups; ++group) sum += sum_group(entries + begin + group * kGroup);
  } else {
    for (int64_t i = begin; i < n; ++i) sum += static_cast<double>(entries[i]);
  }
  return sum;
}

// The child of `parent` that `target`, a point in [0, sum of children), falls into; target becomes relative
// to it. Rounding may carry the target past the end: then the last child that is not zero takes it.
template <typename T>
COVR_HD int64_t choose_child_in_order(const T* entries, int64_t n, int64_t parent, double& target) {
  const int64_t begin = parent * kFanOut;
  const int64_t end = begin + kFanOut < n ? begin + kFanOut : n;
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    const double entry = static_cast<double>(entries[i]);
    if (target < entry) return i;
    if (entry > 0) last = i;
    target -= entry;
  }
  target = static_cast<double>(entries[last]);
  return last;
}

// The same without branches that depend on the target, for nodes with all their children.
template <typename T>
COVR_HD int64_t choose_child(const T* entries, int64_t n, int64_t parent, double& target) {
  const int64_t begin = parent * kFanOut;
  if (begin + kFanOut > n) return choose_child_in_order(entries, n, parent, target);
  double before = 0, next = 0;
  int64_t child = begin;
  for (int group = 0; group + 1 < kGroups; ++group) {
    next += sum_group(entries + begin + group * kGroup);
    const bool beyond = target >= next;
    before = beyond ? next : before;
    child += beyond ? kGroup : 0;
  }
  const double in_group = target - before;
  const T* group = entries + child;
  before = next = 0;
  for (int i = 0; i + 1 < kGroup; ++i) {
    next += static_cast<double>(group[i]);
    const bool beyond = in_group >= next;
    before = beyond ? next : before;
    child += beyond ? 1 : 0;
  }
  const double rest = in_group - before, entry = static_cast<double>(entries[child]);
  if (!(rest < entry)) return choose_child_in_order(entries, n, parent, target);
  target = rest;
  return child;
}

COVR_HD int64_t descend(const float* leaves, const double* sums, const SumTreeLayout& layout, double target) {
  int64_t node = 0;
  for (int level = layout.levels - 2; level >= 0; --level)
    node = choose_child(sums + layout.offset[level], layout.size[level], node, target);
  return choose_child(leaves, layout.capacity, node, target);
}

// Draw i of n: the point of the total that its jitter in [0, 1) picks within the i-th of n equal slices.
COVR_HD double stratum(int64_t i, int64_t n, double jitter, double total) {
  return (static_cast<double>(i) + jitter) / static_cast<double>(n) * total;
}

// The CPU's side, for Python and for the replay buffer. Indices in range, priorities finite and not negative.
void sum_tree_set(float* leaves, double* sums, int64_t capacity, const int64_t* indices,
                  const float* priorities, int64_t n);
void sum_tree_draw(const float* leaves, const double* sums, int64_t capacity, const double* jitter, int64_t n,
                   int64_t* indices, double* probabilities);

#ifdef COVR_WITH_CUDA
namespace cuda {
// claims: an int32 per leaf, zero before and after.
void sum_tree_update(CudaView<float, 1> leaves, CudaView<double, 1> sums, CudaView<int32_t, 1> claims,
                     CudaView<const int64_t, 1> indices, CudaView<const float, 1> priorities,
                     uintptr_t stream);
void sum_tree_sample(CudaView<const float, 1> leaves, CudaView<const double, 1> sums,
                     CudaView<const double, 1> jitter, CudaView<int64_t, 1> indices,
                     CudaView<double, 1> probabilities, uintptr_t stream);
}  // namespace cuda
#endif

}  // namespace covr
