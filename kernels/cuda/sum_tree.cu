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
};

// One entry of an update, read once.
struct Entry {
  int64_t number, index;
  float priority;
  bool valid;  // entries that the CPU would raise for are skipped

  __device__ Entry(const Update& update, const SumTreeLayout& layout, int64_t i)
      : number(i), index(0), priority(0), valid(i < update.n) {
    if (!valid) return;
    index = update.indices[i];
    priority = update.priorities[i];
    valid = index >= 0 && index < layout.capacity && priority >= 0 && isfinite(priority);
  }
  __device__ void claim(const Update& update) const {
    if (valid) atomicMax(&update.claims[index], static_cast<int32_t>(number + 1));
  }
  __device__ void write(const Update& update) const {
    if (!valid || __ldcg(&update.claims[index]) != static_cast<int32_t>(number + 1)) return;
    update.leaves[index] = priority;
    update.claims[index] = 0;  // no other entry equals 0 or this claim
  }
  // Entries under the same node write the same sum.
  __device__ void rebuild(const Update& update, const SumTreeLayout& layout, int level) const {
    if (!valid) return;
    int64_t node = index;
    for (int up = 0; up <= level; ++up) node /= kFanOut;
    update.sums[layout.offset[level] + node] =
        level == 0 ? sum_children(update.leaves, layout.capacity, node)
                   : sum_children(update.sums + layout.offset[level - 1], layout.size[level - 1], node);
  }
};

__global__ void __launch_bounds__(kBlockBatch) update_kernel(Update update, SumTreeLayout layout) {
  const Entry entry(update, layout, threadIdx.x);
  entry.claim(update);
  __syncthreads();
  entry.write(update);
  for (int level = 0; level < layout.levels; ++level) {
    __syncthreads();
    entry.rebuild(update, layout, level);
  }
}

// step 0 claims, step 1 writes leaves, step 2 + l rebuilds level l.
__global__ void __launch_bounds__(kThreads) step_kernel(Update update, SumTreeLayout layout, int step) {
  const Entry entry(update, layout, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (step == 0)
    entry.claim(update);
  else if (step == 1)
    entry.write(update);
  else
    entry.rebuild(update, layout, step - 2);
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* __restrict__ leaves, const double* __restrict__ sums, SumTreeLayout layout,
                  const double* __restrict__ jitter, int64_t n, int64_t* indices, double* probabilities) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const double total = sums[layout.inner_nodes() - 1];
  const int64_t leaf = descend(leaves, sums, layout, stratum(i, n, jitter[i], total));
  indices[i] = leaf;
  probabilities[i] = total > 0 ? leaves[leaf] / total : 0.0;
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
