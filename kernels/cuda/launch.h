// What every CUDA file shares: launch checks, grid sizes and block-wide primitives.
//
// Kernels run on the stream and the current device that Python hands over, allocate nothing, and never make
// the host wait. Workspace comes from the caller as zeroed memory of the size that the *_workspace function
// names.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace covr::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t as_stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int multiprocessors() {
  int device, count;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Sum over the threads before this one, in a block of a whole number of warps. `scratch` is shared, 33 words;
// scratch[32] holds the sum over the block until the next call.
__device__ inline uint32_t block_exclusive_sum(uint32_t value, uint32_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t inclusive = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += before;
  }
  __syncthreads();  // the scratch of an earlier call has been read
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const uint32_t own = lane < warps ? scratch[lane] : 0;
    uint32_t sum = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += before;
    }
    scratch[lane] = sum - own;
    if (lane == 31) scratch[32] = sum;
  }
  __syncthreads();
  return scratch[warp] + inclusive - value;
}

// True in every thread of the block that arrives last; it then sees what the others wrote. `arrived` is a
// zeroed global counter. Read the others' results with __ldcg: this SM's L1 may not have them.
__device__ inline bool last_block_to_arrive(uint32_t* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace covr::cuda
