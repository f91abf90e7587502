// Discounted returns within episodes on the GPU.
//
// A chunk of steps maps the return after it, x, to the return at its first step: b + a * x, with a = 0 once
// an episode ends inside. Such maps compose, so a column is cut into chunks: summaries of all chunks, a scan
// over the summaries, and a second pass over the chunks that knows what follows each. Inside a chunk the
// threads of a block do the same with sub-chunks in shared memory. The order of operations is fixed: results
// repeat.
#include <algorithm>

#include "launch.h"
#include "ops/returns.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidest = 32;              // columns of a tile: a row of floats is one 128-byte line
constexpr int kSteps = 17;               // of a sub-chunk in shared memory; odd: threads hit different banks
constexpr int kWideSteps = 32;           // of a sub-chunk in registers; its ends are the bits of a word
constexpr int64_t kManyColumns = 65536;  // one thread per column fills the device

template <typename T>
struct Affine {
  T a = 1, b = 0;

  // A factor of zero means that an episode ended: what follows must not count, not even a NaN.
  __device__ T operator()(T x) const { return a == 0 ? b : b + a * x; }
  // First this map's steps, then those of `later`.
  __device__ Affine followed_by(const Affine& later) const { return {a * later.a, (*this)(later.b)}; }
};

// Suffix scan over the `parts` maps of each of `width` columns, thread = part * width + column: on return,
// maps[thread] covers its own part and all later ones.
template <typename T>
__device__ void suffix_scan(Affine<T>* maps, int parts, int width) {
  const int part = threadIdx.x / width;
  for (int offset = 1; offset < parts; offset *= 2) {
    __syncthreads();
    const bool joins = part + offset < parts;
    Affine<T> joined;
    if (joins) joined = maps[threadIdx.x].followed_by(maps[threadIdx.x + offset * width]);
    __syncthreads();
    if (joins) maps[threadIdx.x] = joined;
  }
  __syncthreads();
}

struct Tiling {
  bool wide;
  int width, parts;  // columns of a tile, sub-chunks of a chunk
  int64_t steps;     // of a chunk
  int64_t chunks, column_tiles;

  Tiling(int64_t total_steps, int64_t columns)
      : wide(columns >= kWidest),
        width(static_cast<int>(std::clamp<int64_t>(columns, 1, kWidest))),
        parts(kThreads / width),
        steps(static_cast<int64_t>(parts) * (wide ? kWideSteps : kSteps)),
        chunks(ceil_div(total_steps, steps)),
        column_tiles(ceil_div(columns, width)) {}
};

// The sub-chunk of a thread in a tile of kWidest columns. A warp reads and writes a row at once.
template <typename T>
struct WideSteps {
  T value[kWideSteps];
  uint32_t ended = 0;
  int count;
  int64_t first, stride;  // elements

  __device__ WideSteps(const T* __restrict__ rewards, const uint8_t* __restrict__ ends, int64_t total_steps,
                       int64_t columns, const Tiling& tiling) {
    const int64_t column = blockIdx.x % tiling.column_tiles * kWidest + threadIdx.x % kWidest;
    const int64_t begin =
        blockIdx.x / tiling.column_tiles * tiling.steps + threadIdx.x / kWidest * kWideSteps;
    count = column < columns
                ? static_cast<int>(max(int64_t{0}, min(int64_t{kWideSteps}, total_steps - begin)))
                : 0;
    first = begin * columns + column;
    stride = columns;
#pragma unroll
    for (int t = 0; t < kWideSteps; ++t) {
      if (t >= count) continue;
      value[t] = rewards[first + t * stride];
      ended |= static_cast<uint32_t>(ends[first + t * stride]) << t;
    }
  }
  // step(value, ended) for every step, latest first.
  template <typename Step>
  __device__ void backward(const Step& step) {
#pragma unroll
    for (int t = kWideSteps - 1; t >= 0; --t)
      if (t < count) step(value[t], (ended >> t & 1) != 0);
  }
  __device__ void write(T* __restrict__ out) const {
#pragma unroll
    for (int t = 0; t < kWideSteps; ++t)
      if (t < count) out[first + t * stride] = value[t];
  }
};

// The same in a tile of all the columns, which are fewer: rows are read one after the other into shared
// memory.
template <typename T>
struct NarrowSteps {
  T* tile;  // [steps, width]
  uint8_t* ended;
  int begin, end;  // of this thread, in steps of the tile
  int width, column, row, rows, steps;
  int64_t first;

  __device__ NarrowSteps(const T* __restrict__ rewards, const uint8_t* __restrict__ ends, int64_t total_steps,
                         int64_t columns, const Tiling& tiling) {
    __shared__ T shared_tile[kThreads * kSteps];
    __shared__ uint8_t shared_ended[kThreads * kSteps];
    tile = shared_tile;
    ended = shared_ended;
    width = tiling.width;
    row = threadIdx.x / width;
    column = threadIdx.x % width;
    rows = tiling.parts;
    const int64_t first_step = blockIdx.x * tiling.steps;
    steps = static_cast<int>(min(tiling.steps, total_steps - first_step));
    first = first_step * columns;
    for (int t = row; t < steps && row < rows; t += rows) {
      tile[t * width + column] = rewards[first + t * width + column];
      ended[t * width + column] = ends[first + t * width + column];
    }
    __syncthreads();
    begin = row * kSteps;
    end = row < rows ? min(begin + kSteps, steps) : 0;
  }
  template <typename Step>
  __device__ void backward(const Step& step) {
    for (int t = end - 1; t >= begin; --t) step(tile[t * width + column], ended[t * width + column] != 0);
  }
  __device__ void write(T* __restrict__ out) const {
    __syncthreads();
    for (int t = row; t < steps && row < rows; t += rows)
      out[first + t * width + column] = tile[t * width + column];
  }
};

// One chunk of a tile's columns. With kWrite it knows the return after the chunk and writes all of them,
// else it only writes the chunk's map.
template <typename T, typename Steps, bool kWrite>
__global__ void __launch_bounds__(kThreads)
    chunk_kernel(T* __restrict__ out, const T* __restrict__ rewards, const uint8_t* __restrict__ ends,
                 int64_t total_steps, int64_t columns, Tiling tiling, T gamma, Affine<T>* summaries,
                 const T* after) {
  __shared__ Affine<T> maps[kThreads];
  Steps steps(rewards, ends, total_steps, columns, tiling);
  Affine<T> map;
  steps.backward([&](T reward, bool end) {
    map.b = return_step(reward, end, gamma, map.b);
    map.a = end ? T(0) : map.a * gamma;
  });
  maps[threadIdx.x] = map;
  suffix_scan(maps, tiling.parts, tiling.width);

  const int part = threadIdx.x / tiling.width;
  const int64_t column = blockIdx.x % tiling.column_tiles * tiling.width + threadIdx.x % tiling.width;
  const int64_t summary = blockIdx.x / tiling.column_tiles * columns + column;
  if constexpr (!kWrite) {
    if (part == 0 && column < columns) summaries[summary] = maps[threadIdx.x];
  } else {
    T next = after && column < columns ? after[summary] : T(0);
    if (part + 1 < tiling.parts) next = maps[threadIdx.x + tiling.width](next);
    steps.backward([&](T& value, bool end) { value = next = return_step(value, end, gamma, next); });
    steps.write(out);
  }
}

// One block per column: from the chunks' maps to the return that follows each chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    carry_kernel(T* after, const Affine<T>* summaries, int64_t chunks, int64_t columns) {
  __shared__ Affine<T> maps[kThreads];
  const int64_t column = blockIdx.x;
  const int64_t begin = chunks * threadIdx.x / kThreads, end = chunks * (threadIdx.x + 1) / kThreads;
  Affine<T> map;
  for (int64_t chunk = end - 1; chunk >= begin; --chunk)
    map = summaries[chunk * columns + column].followed_by(map);
  maps[threadIdx.x] = map;
  suffix_scan(maps, kThreads, 1);
  T next = threadIdx.x + 1 < kThreads ? maps[threadIdx.x + 1](T(0)) : T(0);
  for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
    after[chunk * columns + column] = next;
    next = summaries[chunk * columns + column](next);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    column_kernel(T* __restrict__ out, const T* __restrict__ rewards, const uint8_t* __restrict__ ends,
                  int64_t steps, int64_t columns, T gamma) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  T next = 0;
#pragma unroll 8
  for (int64_t t = steps - 1; t >= 0; --t) {
    const int64_t i = t * columns + column;
    out[i] = next = return_step(rewards[i], ends[i], gamma, next);
  }
}

// Over a horizon each thread adds up its own steps. Threads lie along columns, so a row is read at once, and
// its repeated reads by the threads of earlier steps are hits in L1.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    horizon_kernel(T* __restrict__ out, const T* __restrict__ rewards, const uint8_t* __restrict__ ends,
                   int64_t steps, int64_t columns, int width, int64_t column_tiles, double gamma,
                   int64_t horizon) {
  const int part = threadIdx.x / width, parts = kThreads / width;
  const int64_t first = blockIdx.x / column_tiles * parts + part;
  const int64_t column = blockIdx.x % column_tiles * width + threadIdx.x % width;
  if (part >= parts || first >= steps || column >= columns) return;
  const int64_t stop = min(first + horizon, steps);
  double sum = 0, power = 1;
  for (int64_t t = first; t < stop; ++t, power *= gamma) {
    sum += horizon_term(rewards[t * columns + column], power);
    if (ends[t * columns + column]) break;
  }
  out[first * columns + column] = static_cast<T>(sum);
}

template <typename T, typename Steps>
void scan_tiles(T* out, const T* rewards, const uint8_t* ends, int64_t steps, int64_t columns,
                const Tiling& tiling, T gamma, T* workspace, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_tiles);
  T* after = nullptr;
  if (tiling.chunks > 1) {
    auto* summaries = reinterpret_cast<Affine<T>*>(workspace);
    after = reinterpret_cast<T*>(summaries + tiling.chunks * columns);
    chunk_kernel<T, Steps, false><<<blocks, kThreads, 0, stream>>>(out, rewards, ends, steps, columns, tiling,
                                                                   gamma, summaries, nullptr);
    carry_kernel<<<static_cast<unsigned>(columns), kThreads, 0, stream>>>(after, summaries, tiling.chunks,
                                                                          columns);
  }
  chunk_kernel<T, Steps, true>
      <<<blocks, kThreads, 0, stream>>>(out, rewards, ends, steps, columns, tiling, gamma, nullptr, after);
}

template <typename T>
void scan(T* out, const T* rewards, const uint8_t* ends, int64_t steps, int64_t columns, T gamma,
          T* workspace, cudaStream_t stream) {
  if (columns >= kManyColumns) {
    column_kernel<<<static_cast<unsigned>(ceil_div(columns, kThreads)), kThreads, 0, stream>>>(
        out, rewards, ends, steps, columns, gamma);
    return check(cudaGetLastError(), "discounted_returns");
  }
  const Tiling tiling(steps, columns);
  if (tiling.wide)
    scan_tiles<T, WideSteps<T>>(out, rewards, ends, steps, columns, tiling, gamma, workspace, stream);
  else
    scan_tiles<T, NarrowSteps<T>>(out, rewards, ends, steps, columns, tiling, gamma, workspace, stream);
  check(cudaGetLastError(), "discounted_returns");
}

}  // namespace

int64_t discounted_returns_workspace(int64_t steps, int64_t columns) {
  if (columns >= kManyColumns || steps == 0) return 0;
  return Tiling(steps, columns).chunks * columns *
         3;  // per chunk a map's two numbers and the return after it
}

template <typename T>
void discounted_returns(CudaView<T, 2> out, CudaView<const T, 2> rewards, CudaView<const bool, 2> ends,
                        T gamma, CudaView<T, 1> workspace, uintptr_t stream) {
  if (rewards.size() == 0) return;
  scan(out.data, rewards.data, bytes(ends.data), rewards.shape[0], rewards.shape[1], gamma, workspace.data,
       as_stream(stream));
}

template <typename T>
void horizon_returns(CudaView<T, 2> out, CudaView<const T, 2> rewards, CudaView<const bool, 2> ends,
                     double gamma, int64_t horizon, uintptr_t stream) {
  const int64_t steps = rewards.shape[0], columns = rewards.shape[1];
  if (rewards.size() == 0) return;
  const int width = static_cast<int>(std::min<int64_t>(columns, kWidest));
  const int64_t column_tiles = ceil_div(columns, width), step_tiles = ceil_div(steps, kThreads / width);
  horizon_kernel<<<static_cast<unsigned>(column_tiles * step_tiles), kThreads, 0, as_stream(stream)>>>(
      out.data, rewards.data, bytes(ends.data), steps, columns, width, column_tiles, gamma,
      std::clamp<int64_t>(horizon, 1, steps));
  check(cudaGetLastError(), "discounted_returns over a horizon");
}

template void discounted_returns(CudaView<float, 2>, CudaView<const float, 2>, CudaView<const bool, 2>, float,
                                 CudaView<float, 1>, uintptr_t);
template void discounted_returns(CudaView<double, 2>, CudaView<const double, 2>, CudaView<const bool, 2>,
                                 double, CudaView<double, 1>, uintptr_t);
template void horizon_returns(CudaView<float, 2>, CudaView<const float, 2>, CudaView<const bool, 2>, double,
                              int64_t, uintptr_t);
template void horizon_returns(CudaView<double, 2>, CudaView<const double, 2>, CudaView<const bool, 2>, double,
                              int64_t, uintptr_t);

}  // namespace covr::cuda
