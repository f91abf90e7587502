// Priorities of a buffer's transitions in device memory: they follow what is added, and take new values.
#include <cuda_runtime.h>

#include "launch.h"
#include "ops/sum_tree.h"
#include "replay/mirror.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 512;

// Calls visit(row) for each row whose leaf has changed.
template <typename Visit>
__device__ __forceinline__ void for_changed(const Tables& tables, int64_t env,
                                            const PriorityTables::Change& change, const Visit& visit) {
  for (int64_t t = change.gone; t < change.gone_end; ++t) visit(tables.row(env, t), false);
  for (int64_t t = change.fresh; t < change.fresh_end; ++t) visit(tables.row(env, t), true);
}

// One block: streams have leaves of their own, but share nodes, which are rebuilt level by level. Two streams
// under one node write the same sum.
__global__ void __launch_bounds__(kThreads)
    follow_kernel(Tables tables, PriorityTables priorities, const __grid_constant__ SumTreeLayout layout) {
  const float largest = static_cast<float>(*priorities.largest);
  for (int64_t env = threadIdx.x; env < tables.num_envs; env += kThreads)
    for_changed(tables, env, priorities.change(tables, env),
                [&](int64_t row, bool fresh) { priorities.leaves[row] = fresh ? largest : 0.0f; });
  int64_t leaves_under = kFanOut;
  for (int level = 0; level < layout.levels; ++level, leaves_under *= kFanOut) {
    __syncthreads();
    double* nodes = priorities.sums + layout.offset[level];
    for (int64_t env = threadIdx.x; env < tables.num_envs; env += kThreads) {
      int64_t latest = -1;
      for_changed(tables, env, priorities.change(tables, env), [&](int64_t row, bool) {
        const int64_t node = row / leaves_under;
        if (node == latest) return;
        latest = node;
        nodes[node] = level == 0 ? sum_children(priorities.leaves, layout.capacity, node)
                                 : sum_children(priorities.sums + layout.offset[level - 1],
                                                layout.size[level - 1], node);
      });
    }
  }
  for (int64_t env = threadIdx.x; env < tables.num_envs; env += kThreads) priorities.follow(tables, env);
}

// One block, for the largest of all leaves.
__global__ void __launch_bounds__(kThreads)
    leaves_kernel(Tables tables, PriorityTables priorities, const int64_t* ids, const float* priority,
                  int64_t n, int64_t* rows, float* leaves) {
  __shared__ float largest[kThreads];
  float own = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float leaf = priorities.leaf(static_cast<double>(priority[i]));
    const int64_t row = tables.find_ready(ids[i]);
    const bool valid = row >= 0 && priority[i] >= 0 && isfinite(priority[i]) && isfinite(leaf);
    rows[i] = valid ? row : -1;
    leaves[i] = valid ? leaf : 0.0f;
    own = fmaxf(own, leaves[i]);
  }
  largest[threadIdx.x] = own;
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (threadIdx.x < distance)
      largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + distance]);
  }
  if (threadIdx.x == 0 && static_cast<double>(largest[0]) > *priorities.largest)
    *priorities.largest = static_cast<double>(largest[0]);
}

}  // namespace

void follow_priorities(const Tables& tables, const PriorityTables& priorities, uintptr_t stream) {
  const SumTreeLayout layout(tables.rows());
  follow_kernel<<<1, kThreads, 0, as_stream(stream)>>>(tables, priorities, layout);
  check(cudaGetLastError(), "follow kernel");
}

void priority_leaves(const Tables& tables, const PriorityTables& priorities, const int64_t* ids,
                     const float* priority, int64_t n, int64_t* rows, float* leaves, uintptr_t stream) {
  leaves_kernel<<<1, kThreads, 0, as_stream(stream)>>>(tables, priorities, ids, priority, n, rows, leaves);
  check(cudaGetLastError(), "priorities kernel");
}

}  // namespace covr::cuda
