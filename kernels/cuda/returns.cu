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
constexpr int kSteps = 17;               // of a sub-chunk; odd, so that threads hit different banks
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
  int width, parts;  // columns of a tile, sub-chunks of a chunk
  int64_t steps;     // of a chunk
  int64_t chunks;

  Tiling(int64_t total_steps, int64_t columns)
      : width(static_cast<int>(std::clamp<int64_t>(columns, 1, kWidest))),
        parts(kThreads / width),
        steps(static_cast<int64_t>(parts) * kSteps),
        chunks(ceil_div(total_steps, steps)) {}
};

// One chunk of `width` columns. With kWrite it knows the return after the chunk and writes all of them,
// else it only writes the chunk's map.
template <typename T, bool kWrite>
__global__ void __launch_bounds__(kThreads)
    chunk_kernel(T* __restrict__ out, const T* __restrict__ rewards, const uint8_t* __restrict__ ends,
                 int64_t total_steps, int64_t columns, Tiling tiling, T gamma, Affine<T>* summaries,
                 const T* after) {
  __shared__ T tile[kThreads * kSteps];
  __shared__ uint8_t ended[kThreads * kSteps];
  __shared__ Affine<T> maps[kThreads];
  const int64_t chunk = blockIdx.x, first_step = chunk * tiling.steps;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * tiling.width;
  const int width = static_cast<int>(min(static_cast<int64_t>(tiling.width), columns - first_column));
  const int steps = static_cast<int>(min(tiling.steps, total_steps - first_step));

  // The last tile may be narrower: threads beyond its columns carry identity maps of a column that is not
  // there.
  const int part = threadIdx.x / tiling.width, column = threadIdx.x % tiling.width;
  const bool active = part < tiling.parts && column < width;

  // Rows are read and written one after the other, each by threads that lie side by side.
  const int64_t origin = first_step * columns + first_column + column;
  for (int t = part; t < steps && active; t += tiling.parts) {
    tile[t * width + column] = rewards[origin + t * columns];
    ended[t * width + column] = ends[origin + t * columns];
  }
  __syncthreads();

  const int begin = part * kSteps, end = active ? min(begin + kSteps, steps) : 0;
  Affine<T> map;
  for (int t = end - 1; t >= begin; --t) {
    const int i = t * width + column;
    map.b = return_step(tile[i], ended[i], gamma, map.b);
    map.a = ended[i] ? T(0) : map.a * gamma;
  }
  maps[threadIdx.x] = map;
  suffix_scan(maps, tiling.parts, tiling.width);

  const int64_t summary = chunk * columns + first_column + column;
  if constexpr (!kWrite) {
    if (active && part == 0) summaries[summary] = maps[threadIdx.x];
    return;
  }
  if (active) {
    T next = after ? after[summary] : T(0);
    if (part + 1 < tiling.parts) next = maps[threadIdx.x + tiling.width](next);
    for (int t = end - 1; t >= begin; --t) {
      const int i = t * width + column;
      tile[i] = next = return_step(tile[i], ended[i], gamma, next);
    }
  }
  __syncthreads();
  for (int t = part; t < steps && active; t += tiling.parts)
    out[origin + t * columns] = tile[t * width + column];
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

template <typename T>
void scan(T* out, const T* rewards, const uint8_t* ends, int64_t steps, int64_t columns, T gamma,
          T* workspace, cudaStream_t stream) {
  if (columns >= kManyColumns) {
    column_kernel<<<static_cast<unsigned>(ceil_div(columns, kThreads)), kThreads, 0, stream>>>(
        out, rewards, ends, steps, columns, gamma);
    return check(cudaGetLastError(), "discounted_returns");
  }
  const Tiling tiling(steps, columns);
  const dim3 grid(static_cast<unsigned>(tiling.chunks),
                  static_cast<unsigned>(ceil_div(columns, tiling.width)));
  T* after = nullptr;
  if (tiling.chunks > 1) {
    auto* summaries = reinterpret_cast<Affine<T>*>(workspace);
    after = reinterpret_cast<T*>(summaries + tiling.chunks * columns);
    chunk_kernel<T, false><<<grid, kThreads, 0, stream>>>(out, rewards, ends, steps, columns, tiling, gamma,
                                                          summaries, nullptr);
    carry_kernel<<<static_cast<unsigned>(columns), kThreads, 0, stream>>>(after, summaries, tiling.chunks,
                                                                          columns);
  }
  chunk_kernel<T, true>
      <<<grid, kThreads, 0, stream>>>(out, rewards, ends, steps, columns, tiling, gamma, nullptr, after);
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
