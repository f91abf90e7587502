// The sum tree on the GPU. Sums and descent are the CPU's own functions, so both give the same numbers.
//
// Of duplicate indices the last counts: every entry claims its leaf with its position, the highest claim
// writes. A batch of up to a block's threads takes one launch; a larger one a launch per step.
#include <algorithm>

#include "launch.h"
#include "ops/sum_tree.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockBatch = 1024;

struct Update {
  float* leaves;
  double* sums;
  int32_t* claims;  // one per leaf, zero between updates
  const int64_t* indices;
  const float* priorities;
  int64_t n;

  // Entries that the CPU would raise for are skipped.
  __device__ bool valid(const SumTreeLayout& layout, int64_t i) const {
    return indices[i] >= 0 && indices[i] < layout.capacity && priorities[i] >= 0 && isfinite(priorities[i]);
  }
  __device__ void claim(const SumTreeLayout& layout, int64_t i) const {
    if (valid(layout, i)) atomicMax(&claims[indices[i]], static_cast<int32_t>(i + 1));
  }
  __device__ void write(const SumTreeLayout& layout, int64_t i) const {
    if (!valid(layout, i) || __ldcg(&claims[indices[i]]) != static_cast<int32_t>(i + 1)) return;
    leaves[indices[i]] = priorities[i];
    claims[indices[i]] = 0;  // no other entry equals 0 or this claim
  }
  // Entries under the same node write the same sum.
  __device__ void rebuild(const SumTreeLayout& layout, int level, int64_t i) const {
    if (!valid(layout, i)) return;
    int64_t node = indices[i];
    for (int up = 0; up <= level; ++up) node /= kFanOut;
    sums[layout.offset[level] + node] =
        level == 0 ? sum_children(leaves, layout.capacity, node)
                   : sum_children(sums + layout.offset[level - 1], layout.size[level - 1], node);
  }
};

__global__ void __launch_bounds__(kBlockBatch) update_kernel(Update update, SumTreeLayout layout) {
  const int64_t i = threadIdx.x;
  const bool active = i < update.n;
  if (active) update.claim(layout, i);
  __syncthreads();
  if (active) update.write(layout, i);
  for (int level = 0; level < layout.levels; ++level) {
    __syncthreads();
    if (active) update.rebuild(layout, level, i);
  }
}

// step 0 claims, step 1 writes leaves, step 2 + l rebuilds level l.
__global__ void __launch_bounds__(kThreads) step_kernel(Update update, SumTreeLayout layout, int step) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= update.n) return;
  if (step == 0)
    update.claim(layout, i);
  else if (step == 1)
    update.write(layout, i);
  else
    update.rebuild(layout, step - 2, i);
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* __restrict__ leaves, const double* __restrict__ sums, SumTreeLayout layout,
                  const double* __restrict__ jitter, int64_t n, int64_t* indices, double* probabilities) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const double total = sums[layout.inner_nodes() - 1];
  indices[i] = descend(leaves, sums, layout, stratum(i, n, jitter[i], total));
  probabilities[i] = total > 0 ? leaves[indices[i]] / total : 0.0;
}

}  // namespace

void sum_tree_update(CudaView<float, 1> leaves, CudaView<double, 1> sums, CudaView<int32_t, 1> claims,
                     CudaView<const int64_t, 1> indices, CudaView<const float, 1> priorities,
                     uintptr_t stream_) {
  const int64_t n = indices.size();
  const SumTreeLayout layout(leaves.size());
  require_shape("sums", sums.shape, {layout.inner_nodes()});
  require_shape("claims", claims.shape, leaves.shape);
  require_shape("priorities", priorities.shape, indices.shape);
  if (n == 0) return;
  const Update update{leaves.data, sums.data, claims.data, indices.data, priorities.data, n};
  const cudaStream_t stream = as_stream(stream_);
  if (n <= kBlockBatch) {
    update_kernel<<<1, static_cast<unsigned>(ceil_div(n, 32) * 32), 0, stream>>>(update, layout);
  } else {
    for (int step = 0; step < layout.levels + 2; ++step)
      step_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(update, layout,
                                                                                         step);
  }
  check(cudaGetLastError(), "sum_tree_update");
}

void sum_tree_sample(CudaView<const float, 1> leaves, CudaView<const double, 1> sums,
                     CudaView<const double, 1> jitter, CudaView<int64_t, 1> indices,
                     CudaView<double, 1> probabilities, uintptr_t stream) {
  const int64_t n = jitter.size();
  const SumTreeLayout layout(leaves.size());
  require_shape("sums", sums.shape, {layout.inner_nodes()});
  require_shape("indices", indices.shape, jitter.shape);
  require_shape("probabilities", probabilities.shape, jitter.shape);
  if (n == 0) return;
  sample_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, as_stream(stream)>>>(
      leaves.data, sums.data, layout, jitter.data, n, indices.data, probabilities.data);
  check(cudaGetLastError(), "sum_tree_sample");
}

}  // namespace covr::cuda
