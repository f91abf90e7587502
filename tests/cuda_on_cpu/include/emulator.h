// A CUDA device on one core of the CPU: kernels run block after block, threads of a block as fibers.
//
// Both orders are random: by COVR_CUDA_ON_CPU_SEED, read when the first kernel starts. A thread runs until it
// waits for others, so what a kernel leaves to chance (a barrier that is missing) comes out differently from
// thread to thread. Shared memory holds random bytes when a block begins. What no device would do well is an
// exception out of the launch: threads that wait for each other for ever, at different barriers or
// collectives of a warp, or for lanes that have left.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "vector_types.h"

using cudaStream_t = struct CUstream_st*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

int multiprocessors();  // by the seed: 1, 2, 4 or 132

// Runs `thread` in each thread of a grid. A launch that a device would refuse sets its last error.
void run(const char* kernel, const Launch& launch, const std::function<void()>& thread);

template <typename Call>
struct Prepared {
  const char* kernel;
  Launch launch;
  Call call;

  // As in a launch, the kernel gets copies of the arguments.
  template <typename... Arguments>
  void operator()(Arguments... arguments) const {
    run(kernel, launch, [&] { call(arguments...); });
  }
};

// kernel<<<launch>>> is launch("kernel", {launch}, kernel).
template <typename Call>
Prepared<Call> launch(const char* kernel, const Launch& launch, Call call) {
  return {kernel, launch, call};
}

// ---- shared memory ----

// A variable of a block: the same memory for all its threads, filled with random bytes before the first use.
struct SharedVariable {
  SharedVariable(size_t bytes, size_t alignment);
  void* of_this_block();

  size_t bytes;
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
  char* data;
  uint64_t block = 0;  // for which it was filled
};

void* dynamic_shared();  // Launch::shared_bytes

template <typename T, size_t kAlignment = alignof(T), typename Place>
T& shared(Place) {
  // One for each place in the source and each instantiation of a template: the closure's type tells them
  // apart.
  static auto& variable = *new SharedVariable(sizeof(T), kAlignment > alignof(T) ? kAlignment : alignof(T));
  return *static_cast<T*>(variable.of_this_block());
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared());
}

// ---- waiting for other threads ----

struct Votes {
  int count, threads;  // how many had a true predicate, of how many
};
Votes block_barrier(bool predicate, const std::source_location& place);

// What a lane brings to a collective of a warp. When all lanes of `mask` are there, each gets
// combine(values of all lanes, mask, its lane, argument).
struct Collective {
  using Combine = uint64_t (*)(const uint64_t* values, uint32_t mask, int lane, int argument);
  const char* name;
  uint32_t mask;
  Combine combine;
  uint64_t value = 0;
  int argument = 0;
};
uint64_t warp_collective(const Collective& own);

int lane();
uint64_t random_bits();

}  // namespace emulator
