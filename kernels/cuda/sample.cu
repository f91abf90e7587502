// Draws batches from a buffer's tables in device memory, and fills everything of them but the observations,
// whose plans it makes. The arithmetic is the CPU's own (replay/tables.h), so both draw the same rows.
#include <cuda_runtime.h>

#include "launch.h"
#include "replay/mirror.h"

namespace covr::cuda {
namespace {

constexpr int kDrawThreads = 512;
constexpr int kRowThreads = 128;
constexpr unsigned kWarp = 32;

// One block for the whole batch, so that the last thread knows when the number of the batch has been read.
__device__ void count_batch(Sequence* sequence) {
  __syncthreads();
  if (threadIdx.x == 0) sequence->drawn = sequence->next++;
}

// The streams in kDrawThreads groups of neighbours: a draw finds its group by bisection and its stream by
// counting, so any number of streams will do.
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(Tables tables, Sequence* sequence, const __grid_constant__ Recency recency, int64_t rows,
                int64_t* ids, float* weight) {
  __shared__ int64_t before[kDrawThreads + 1];  // samplable transitions of the groups before
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t group_size = (tables.num_envs + kDrawThreads - 1) / kDrawThreads;
  const int64_t begin = thread * group_size, end = smaller(begin + group_size, tables.num_envs);
  int64_t own = 0;
  for (int64_t env = begin; env < end; ++env) own += tables.ready(env);
  before[thread + 1] = own;
  if (thread == 0) before[0] = 0;
  for (int distance = 1; distance < kDrawThreads; distance *= 2) {
    __syncthreads();
    const int64_t other = thread >= distance ? before[thread + 1 - distance] : 0;
    __syncthreads();
    before[thread + 1] += other;
  }
  __syncthreads();
  const int64_t total = before[kDrawThreads];
  const uint64_t seed = sequence->seed, batch = sequence->next;
  for (int64_t i = thread; i < rows; i += kDrawThreads) {
    weight[i] = 1.0f;
    if (total == 0) {  // the host asks before it launches; a batch of nothing has no ids
      ids[i] = -1;
      continue;
    }
    const Draw draw = draw_place(seed, batch, i, total, recency);
    int group = 0;
    for (int step = kDrawThreads / 2; step > 0; step /= 2)
      if (before[group + step] <= draw.place) group += step;
    int64_t env = group * group_size, of_earlier = before[group];
    for (int64_t ready; (ready = tables.ready(env)) <= draw.place - of_earlier; ++env) of_earlier += ready;
    ids[i] = drawn_id(tables, draw, recency, env, of_earlier);
  }
  count_batch(sequence);
}

__global__ void __launch_bounds__(kDrawThreads)
    draw_prioritized_kernel(Tables tables, PriorityTables priorities,
                            const __grid_constant__ SumTreeLayout layout, Sequence* sequence, int64_t rows,
                            int64_t* ids, float* weight) {
  __shared__ float rarest[kDrawThreads];
  const double total = priorities.sums[layout.inner_nodes() - 1];
  const uint64_t seed = sequence->seed, batch = sequence->next;
  float least = INFINITY;
  for (int64_t i = threadIdx.x; i < rows; i += kDrawThreads) {
    const double target = stratum(i, rows, draw_jitter(seed, batch, i), total);
    ids[i] = descend(priorities.leaves, priorities.sums, layout, target);
    least = fminf(least, priorities.leaves[ids[i]]);
  }
  rarest[threadIdx.x] = least;
  for (int distance = kDrawThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (threadIdx.x < distance)
      rarest[threadIdx.x] = fminf(rarest[threadIdx.x], rarest[threadIdx.x + distance]);
  }
  __syncthreads();
  const double smallest = static_cast<double>(rarest[0]) / total, beta = sequence->beta;
  for (int64_t i = threadIdx.x; i < rows; i += kDrawThreads) {
    weight[i] = importance_weight(smallest, static_cast<double>(priorities.leaves[ids[i]]) / total, beta);
    ids[i] = tables.id_in_row(ids[i]);
  }
  count_batch(sequence);
}

__global__ void __launch_bounds__(kDrawThreads)
    given_kernel(Sequence* sequence, int64_t rows, float* weight) {
  for (int64_t i = threadIdx.x; i < rows; i += kDrawThreads) weight[i] = 1.0f;
  count_batch(sequence);
}

template <typename Word>
__device__ __forceinline__ void copy_words(const uint8_t* from, uint8_t* to, int64_t bytes, unsigned lane) {
  const auto words = static_cast<int64_t>(sizeof(Word));
  for (int64_t n = lane; n < bytes / words; n += kWarp)
    reinterpret_cast<Word*>(to)[n] = reinterpret_cast<const Word*>(from)[n];
}

// A warp per row: all lanes find the transition, each plans one key, and together they copy the columns.
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(Tables tables, const Sequence* sequence, RowsOut out, const __grid_constant__ Parts parts) {
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
  if (i >= out.rows) return;
  const int64_t id = out.ids[i];
  const bool found = id >= 0;
  const int64_t env = found ? id % tables.num_envs : 0, t = found ? id / tables.num_envs : 0;
  const int64_t row = tables.row(env, t);
  NStepReturn steps{};
  if (found) steps = tables.n_step_return(env, t, out.n_step);
  Offsets offsets{};
  if (out.obs_offset) offsets = draw_offsets(sequence->seed, sequence->drawn, i, out.augmentation);

  if (out.reward && lane == 0) {
    out.reward[i] = steps.reward;
    out.discount[i] = steps.discount;
    out.terminated[i] = steps.terminated;
    out.truncated[i] = steps.truncated;
    if (out.obs_offset) {
      out.obs_offset[i * 2] = offsets.of[0], out.obs_offset[i * 2 + 1] = offsets.of[1];
      out.next_obs_offset[i * 2] = offsets.of[2], out.next_obs_offset[i * 2 + 1] = offsets.of[3];
    }
  }
  if (lane < parts.keys) {
    const KeyPlans& to = parts.key[lane];
    const StackPlan nothing{0, 0, -1, 1, 0, 0};  // all frames are padding
    const int64_t stream_slot = env * to.key.frames.slots;
    StackPlan plan = found ? to.key.plan(row, stream_slot, false) : nothing;
    if (out.obs_offset) plan.shift(offsets.of[0], offsets.of[1], out.augmentation);
    to.obs[i] = plan;
    if (to.next_obs) {
      plan = found ? to.key.plan(tables.row(env, t + steps.steps - 1), stream_slot, true) : nothing;
      if (out.obs_offset) plan.shift(offsets.of[2], offsets.of[3], out.augmentation);
      to.next_obs[i] = plan;
    }
  }
  for (int c = 0; c < parts.columns; ++c) {
    const int64_t bytes = parts.column[c].column.bytes;
    const uint8_t* from = parts.column[c].column.values + row * bytes;
    uint8_t* to = parts.column[c].out + i * bytes;
    const bool words = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 3) == 0;
    if (words && bytes % 4 == 0)
      copy_words<uint32_t>(from, to, bytes, lane);
    else
      copy_words<uint8_t>(from, to, bytes, lane);
  }
}

}  // namespace

void draw_uniform(const Tables& tables, Sequence* sequence, const Recency& recency, int64_t rows,
                  int64_t* ids, float* weight, uintptr_t stream) {
  draw_kernel<<<1, kDrawThreads, 0, as_stream(stream)>>>(tables, sequence, recency, rows, ids, weight);
  check(cudaGetLastError(), "draw kernel");
}

void draw_prioritized(const Tables& tables, const PriorityTables& priorities, Sequence* sequence,
                      int64_t rows, int64_t* ids, float* weight, uintptr_t stream) {
  const SumTreeLayout layout(tables.rows());
  draw_prioritized_kernel<<<1, kDrawThreads, 0, as_stream(stream)>>>(tables, priorities, layout, sequence,
                                                                     rows, ids, weight);
  check(cudaGetLastError(), "prioritized draw kernel");
}

void draw_given(Sequence* sequence, int64_t rows, float* weight, uintptr_t stream) {
  given_kernel<<<1, kDrawThreads, 0, as_stream(stream)>>>(sequence, rows, weight);
  check(cudaGetLastError(), "given rows kernel");
}

void fill_rows(const Tables& tables, const Sequence* sequence, const RowsOut& out, const Parts& parts,
               uintptr_t stream) {
  if (out.rows == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(out.rows * kWarp, kRowThreads));
  rows_kernel<<<blocks, kRowThreads, 0, as_stream(stream)>>>(tables, sequence, out, parts);
  check(cudaGetLastError(), "rows kernel");
}

}  // namespace covr::cuda
