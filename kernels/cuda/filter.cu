// EDDF on the GPU: moments and ranks from three histogram passes, a counting pass and a compacting pass.
//
// Ranks are selected by radix: a histogram of the top 12 bits of all keys, then of the next 10 and the last
// 10 of the keys that share their prefix with a wanted rank. The block that finishes a pass last reads the
// histogram and narrows the prefixes. A few thousand values take one block, one launch and shared memory
// only. Sums are taken in a fixed order, so results repeat.
#include <algorithm>

#include "launch.h"
#include "ops/filter.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kFew = 8192;    // values that fit into the shared memory of one block
constexpr int kMaxBlocks = 1024;  // whose counts one block can scan
constexpr int kFirstBits = 12, kBits = 10;
constexpr int kFirstBins = 1 << kFirstBits, kBins = 1 << kBits;
constexpr int kFewBits = 8, kFewBins = 1 << kFewBits;

// What is known of each wanted rank: the leading bits of its key, and its rank among keys that share them.
struct Selection {
  uint32_t prefix[kRanks];
  int64_t rank[kRanks];

  // Neighbouring ranks mostly share a prefix; the first of them owns the histogram.
  __device__ int owner(int i) const {
    int first = 0;
    while (prefix[first] != prefix[i]) ++first;
    return first;
  }
};

struct Workspace {
  uint32_t first[kFirstBins];
  uint32_t next[2][kRanks][kBins];
  uint32_t arrived[4];
  Selection selection;
  double sum[kMaxBlocks], squares[kMaxBlocks];
  uint32_t count[kMaxBlocks];
  float threshold;
  bool finite;
};

// Finds each rank's bin in the histogram of its owner and moves on to the ranks inside it. All threads call;
// selection and histogram may be shared or global; the histogram is read past L1.
template <int kLevelBits>
__device__ void narrow(const uint32_t* histogram, Selection* selection) {
  constexpr int kLevelBins = 1 << kLevelBits;
  constexpr int kEach = (kLevelBins + kThreads - 1) / kThreads;
  __shared__ uint32_t scratch[33], digit[kRanks];
  __shared__ int64_t rest[kRanks];
  const int begin = threadIdx.x * kEach;
  for (int owner = 0; owner < kRanks; ++owner) {
    if (selection->owner(owner) != owner) continue;
    uint32_t bins[kEach], total = 0;
    for (int i = 0; i < kEach; ++i) {
      bins[i] =
          begin + i < kLevelBins ? *(volatile const uint32_t*)&histogram[owner * kLevelBins + begin + i] : 0;
      total += bins[i];
    }
    const int64_t before = block_exclusive_sum(total, scratch);
    for (int i = owner; i < kRanks; ++i) {
      int64_t rank = selection->rank[i] - before;
      if (selection->owner(i) != owner || rank < 0 || rank >= total) continue;
      int bin = 0;
      while (rank >= bins[bin]) rank -= bins[bin++];
      digit[i] = begin + bin;
      rest[i] = rank;
    }
  }
  __syncthreads();
  if (threadIdx.x < kRanks) {
    selection->prefix[threadIdx.x] = selection->prefix[threadIdx.x] << kLevelBits | digit[threadIdx.x];
    selection->rank[threadIdx.x] = rest[threadIdx.x];
  }
  __syncthreads();
}

__device__ double block_sum(double value) {
  __shared__ double warp_sums[32];
  for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) value += warp_sums[warp];
  return value;  // in thread 0
}

// Thread 0: statistics, and the threshold that the values are compared with. Returns whether all numbers were
// finite.
__device__ bool finish(int64_t n, const Selection& selection, double shift, double sum, double squares,
                       double scale, FilterStatistics* statistics, float* threshold) {
  double ranked[kRanks];
  for (int i = 0; i < kRanks; ++i) ranked[i] = value_of_key(selection.prefix[i]);
  FilterStatistics s = filter_statistics(n, ranked, shift, sum, squares, scale);
  const bool finite = isfinite(squares) && isfinite(scale);
  if (!finite) s = {nan(""), nan(""), nan(""), nan("")};
  *statistics = s;
  *threshold = s.std > 0 ? float_at_or_below(s.cutoff) : INFINITY;  // no finite value is above infinity
  return finite;
}

// Appends the indices of values above the threshold, in order, to out + base. All threads call.
__device__ uint32_t compact(int64_t* out, uint32_t base, const float* values, int64_t begin, int64_t end,
                            float threshold, uint32_t* scratch) {
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    const int64_t i = tile + threadIdx.x;
    const bool kept = i < end && values[i] > threshold;
    const uint32_t position = base + block_exclusive_sum(kept, scratch);
    if (kept) out[position] = i;
    base += scratch[32];
  }
  return base;
}

__global__ void __launch_bounds__(kThreads)
    few_kernel(const float* __restrict__ values, int n, const double* scale, int64_t* indices, int64_t* kept,
               FilterStatistics* statistics) {
  __shared__ uint32_t keys[kFew];
  __shared__ uint32_t histogram[kRanks * kFewBins];
  __shared__ uint32_t scratch[33];
  __shared__ Selection selection;
  __shared__ float threshold;
  __shared__ bool finite;
  const double shift = values[0];
  double sum = 0, squares = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float value = values[i];
    const double centred = value - shift;
    sum += centred;
    squares += centred * centred;
    keys[i] = ordered_key(value);
  }
  sum = block_sum(sum);
  squares = block_sum(squares);
  if (threadIdx.x < kRanks) {
    selection.prefix[threadIdx.x] = 0;
    selection.rank[threadIdx.x] = quartile_rank(n, threadIdx.x);
  }
  for (int shift_bits = 32 - kFewBits; shift_bits >= 0; shift_bits -= kFewBits) {
    for (int i = threadIdx.x; i < kRanks * kFewBins; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      // A shift by 32 is undefined: the first pass has no prefix to compare.
      const uint32_t prefix = shift_bits == 32 - kFewBits ? 0 : keys[i] >> (shift_bits + kFewBits);
      for (int rank = 0; rank < kRanks; ++rank)
        if (prefix == selection.prefix[rank]) {
          atomicAdd(&histogram[rank * kFewBins + (keys[i] >> shift_bits & (kFewBins - 1))], 1u);
          break;  // the first with this prefix is the owner
        }
    }
    __syncthreads();
    narrow<kFewBits>(histogram, &selection);
  }
  if (threadIdx.x == 0) finite = finish(n, selection, shift, sum, squares, *scale, statistics, &threshold);
  __syncthreads();
  const uint32_t count = compact(indices, 0, values, 0, n, threshold, scratch);
  for (int i = count + threadIdx.x; i < n; i += kThreads) indices[i] = -1;
  if (threadIdx.x == 0) *kept = finite ? int64_t{count} : -1;
}

__device__ void add_to_global(uint32_t* global, const uint32_t* shared, int bins) {
  for (int i = threadIdx.x; i < bins; i += kThreads)
    if (shared[i]) atomicAdd(&global[i], shared[i]);
}

__global__ void __launch_bounds__(kThreads)
    first_kernel(const float* __restrict__ values, int64_t n, Workspace* w) {
  __shared__ uint32_t histogram[kFirstBins];
  for (int i = threadIdx.x; i < kFirstBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const double shift = values[0];
  double sum = 0, squares = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const float value = values[i];
    const double centred = value - shift;
    sum += centred;
    squares += centred * centred;
    atomicAdd(&histogram[ordered_key(value) >> (32 - kFirstBits)], 1u);
  }
  sum = block_sum(sum);
  squares = block_sum(squares);
  if (threadIdx.x == 0) {
    w->sum[blockIdx.x] = sum;
    w->squares[blockIdx.x] = squares;
  }
  __syncthreads();
  add_to_global(w->first, histogram, kFirstBins);
  if (!last_block_to_arrive(&w->arrived[0])) return;
  if (threadIdx.x < kRanks) {
    w->selection.prefix[threadIdx.x] = 0;
    w->selection.rank[threadIdx.x] = quartile_rank(n, threadIdx.x);
  }
  __syncthreads();
  narrow<kFirstBits>(w->first, &w->selection);
}

// kLevel 0: the middle bits; kLevel 1: the last bits, after which the ranks are known.
template <int kLevel>
__global__ void __launch_bounds__(kThreads)
    next_kernel(const float* __restrict__ values, int64_t n, const double* scale,
                FilterStatistics* statistics, Workspace* w) {
  constexpr int kShift = kLevel == 0 ? kBits : 0;
  __shared__ uint32_t histogram[kRanks * kBins];
  __shared__ uint32_t prefix[kRanks];
  for (int i = threadIdx.x; i < kRanks * kBins; i += kThreads) histogram[i] = 0;
  if (threadIdx.x < kRanks) prefix[threadIdx.x] = w->selection.prefix[threadIdx.x];
  __syncthreads();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t key = ordered_key(values[i]);
    for (int rank = 0; rank < kRanks; ++rank)
      if (key >> (kShift + kBits) == prefix[rank]) {
        atomicAdd(&histogram[rank * kBins + (key >> kShift & (kBins - 1))], 1u);
        break;  // the first with this prefix is the owner
      }
  }
  __syncthreads();
  add_to_global(&w->next[kLevel][0][0], histogram, kRanks * kBins);
  if (!last_block_to_arrive(&w->arrived[1 + kLevel])) return;
  narrow<kBits>(&w->next[kLevel][0][0], &w->selection);
  if (kLevel == 1 && threadIdx.x == 0) {
    double sum = 0, squares = 0;
    for (int block = 0; block < gridDim.x; ++block) {
      sum += w->sum[block];
      squares += w->squares[block];
    }
    w->finite = finish(n, w->selection, values[0], sum, squares, *scale, statistics, &w->threshold);
  }
}

__device__ int64_t part_begin(int64_t n, unsigned block) { return n * block / gridDim.x; }

__global__ void __launch_bounds__(kThreads)
    count_kernel(const float* __restrict__ values, int64_t n, int64_t* kept, Workspace* w) {
  __shared__ uint32_t scratch[33];
  uint32_t count = 0;
  for (int64_t i = part_begin(n, blockIdx.x) + threadIdx.x; i < part_begin(n, blockIdx.x + 1); i += kThreads)
    count += values[i] > w->threshold;
  block_exclusive_sum(count, scratch);
  if (threadIdx.x == 0) w->count[blockIdx.x] = scratch[32];
  if (!last_block_to_arrive(&w->arrived[3])) return;
  const uint32_t own = threadIdx.x < gridDim.x ? __ldcg(&w->count[threadIdx.x]) : 0;
  const uint32_t before = block_exclusive_sum(own, scratch);
  if (threadIdx.x < gridDim.x) w->count[threadIdx.x] = before;  // from counts to where each block writes
  if (threadIdx.x == 0) *kept = w->finite ? int64_t{scratch[32]} : -1;
}

__global__ void __launch_bounds__(kThreads)
    compact_kernel(const float* __restrict__ values, int64_t n, int64_t* indices, const int64_t* kept,
                   const Workspace* w) {
  __shared__ uint32_t scratch[33];
  const int64_t begin = part_begin(n, blockIdx.x), end = part_begin(n, blockIdx.x + 1);
  compact(indices, w->count[blockIdx.x], values, begin, end, w->threshold, scratch);
  // Positions from `kept` on belong to no index; each block clears those in its own part of the output.
  for (int64_t i = max(begin, max(*kept, int64_t{0})) + threadIdx.x; i < end; i += kThreads) indices[i] = -1;
}

}  // namespace

int64_t exploration_filter_workspace(int64_t n) { return n <= kFew ? 0 : sizeof(Workspace); }

void exploration_filter(CudaView<const float, 1> returns, CudaView<const double, 0> scale,
                        CudaView<int64_t, 1> indices, CudaView<int64_t, 0> kept,
                        CudaView<double, 1> statistics_, CudaView<uint8_t, 1> workspace, uintptr_t stream_) {
  const int64_t n = returns.size();
  require_shape("indices", indices.shape, {n});
  require_shape("statistics", statistics_.shape, {4});
  require_shape("workspace", workspace.shape, {exploration_filter_workspace(n)});
  if (n == 0) throw std::invalid_argument("returns are empty");
  auto* statistics = reinterpret_cast<FilterStatistics*>(statistics_.data);
  const cudaStream_t stream = as_stream(stream_);
  if (n <= kFew) {
    few_kernel<<<1, kThreads, 0, stream>>>(returns.data, static_cast<int>(n), scale.data, indices.data,
                                           kept.data, statistics);
  } else {
    auto* w = reinterpret_cast<Workspace*>(workspace.data);
    const auto blocks = static_cast<unsigned>(
        std::min<int64_t>({ceil_div(n, 4 * kThreads), 2 * multiprocessors(), kMaxBlocks}));
    first_kernel<<<blocks, kThreads, 0, stream>>>(returns.data, n, w);
    next_kernel<0><<<blocks, kThreads, 0, stream>>>(returns.data, n, scale.data, statistics, w);
    next_kernel<1><<<blocks, kThreads, 0, stream>>>(returns.data, n, scale.data, statistics, w);
    count_kernel<<<blocks, kThreads, 0, stream>>>(returns.data, n, kept.data, w);
    compact_kernel<<<blocks, kThreads, 0, stream>>>(returns.data, n, indices.data, kept.data, w);
  }
  check(cudaGetLastError(), "exploration_filter");
}

}  // namespace covr::cuda
