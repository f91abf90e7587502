// Return-aware loss weights on the GPU: extremes, then the map.
#include <algorithm>

#include "launch.h"
#include "ops/filter.h"
#include "ops/weights.h"

namespace covr::cuda {
namespace {

constexpr int kThreads = 256;

// extremes: zeroed, [0] the complement of the smallest key and [1] the largest key.
__global__ void extremes_kernel(const float* __restrict__ values, int64_t n, uint32_t* extremes) {
  uint32_t low = 0, high = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t key = ordered_key(values[i]);
    low = max(low, ~key);
    high = max(high, key);
  }
  low = __reduce_max_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&extremes[0], low);
    atomicMax(&extremes[1], high);
  }
}

__global__ void weight_kernel(float* __restrict__ out, const float* __restrict__ values, int64_t n,
                              const uint32_t* extremes) {
  const float low = value_of_key(~extremes[0]), high = value_of_key(extremes[1]);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    out[i] = return_weight(values[i], low, high);
}

}  // namespace

void return_weights(CudaView<float, 1> out, CudaView<const float, 1> returns, CudaView<int32_t, 1> extremes,
                    uintptr_t stream) {
  const int64_t n = returns.size();
  require_shape("out", out.shape, returns.shape);
  require_shape("extremes", extremes.shape, {2});
  if (n == 0) return;
  auto* keys = reinterpret_cast<uint32_t*>(extremes.data);  // torch has few operations for unsigned integers
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(n, kThreads), 4 * multiprocessors()));
  extremes_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(returns.data, n, keys);
  weight_kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(out.data, returns.data, n, keys);
  check(cudaGetLastError(), "return_weights");
}

}  // namespace covr::cuda
