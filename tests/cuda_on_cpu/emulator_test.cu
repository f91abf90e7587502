// The emulator itself: small kernels whose results, or refusals, are known. A program; it fails by its exit
// code.
#include <cuda_runtime.h>

#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  ++failures;
  std::printf("wrong: %s\n", what);
}

template <typename Launch>
void expect_refusal(const char* part, Launch launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    std::printf("refused by: %s\n", error.what());
  }
  expect(false, part);
}

// ---- threads and blocks ----

__global__ void count_kernel(int* visits, dim3 grid, dim3 block) {
  const unsigned b = (blockIdx.z * grid.y + blockIdx.y) * grid.x + blockIdx.x;
  const unsigned t = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
  if (gridDim.y == grid.y && blockDim.z == block.z)
    atomicAdd(&visits[b * block.x * block.y * block.z + t], 1);
}

__global__ void order_kernel(unsigned* order, unsigned* next) { order[(*next)++] = threadIdx.x; }

void every_thread_runs_once_and_in_another_order() {
  const dim3 grid(3, 2, 2), block(4, 3, 5);
  std::vector<int> visits(12 * 60, 0);
  count_kernel<<<grid, block>>>(visits.data(), grid, block);
  expect(visits == std::vector<int>(12 * 60, 1), "every thread of every block runs once");
  std::vector<unsigned> order(256), sorted(256);
  unsigned next = 0;
  order_kernel<<<1, 256>>>(order.data(), &next);
  std::iota(sorted.begin(), sorted.end(), 0u);
  expect(order != sorted, "threads run in random order");
}

__global__ void nothing_kernel() {}

void impossible_launches_set_the_error() {
  nothing_kernel<<<0, 32>>>();
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "no blocks");
  nothing_kernel<<<1, 1025>>>();
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "too many threads");
  nothing_kernel<<<1, 32, 300 << 10>>>();
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "too much shared memory");
  nothing_kernel<<<1, 32>>>();
  expect(cudaGetLastError() == cudaSuccess, "a launch that can be, and the error is forgotten");
}

// ---- shared memory and barriers ----

template <bool kBarrier>
__global__ void reverse_kernel(int* values) {
  __shared__ int tile[64], unused;
  extern __shared__ int copy[];
  tile[threadIdx.x] = copy[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) __syncthreads();
  const int other = tile[63 - threadIdx.x];
  values[threadIdx.x] = other == copy[63 - threadIdx.x] ? other : -1;
  if (threadIdx.x == 99) unused = 0;
}

__global__ void remember_kernel(int* before) {
  __shared__ int kept;
  if (threadIdx.x == 0) *before = kept, kept = 12345;
}

__global__ void votes_kernel(int* results) {
  if (threadIdx.x >= 40) return;  // barriers do not wait for threads that have left
  const int odd = threadIdx.x % 2;
  const int count = __syncthreads_count(odd), any = __syncthreads_or(odd), all = __syncthreads_and(odd);
  if (threadIdx.x == 0) results[0] = count, results[1] = any, results[2] = all;
}

void barriers_order_what_shared_memory_holds() {
  std::vector<int> forward(64), backward(64), values;
  std::iota(forward.begin(), forward.end(), 0);
  std::iota(backward.rbegin(), backward.rend(), 0);
  reverse_kernel<true><<<1, 64, 64 * sizeof(int)>>>((values = forward).data());
  expect(values == backward, "a barrier");
  reverse_kernel<false><<<1, 64, 64 * sizeof(int)>>>((values = forward).data());
  expect(values != backward, "a missing barrier shows");
  int before = 0;
  for (int i = 0; i < 2; ++i) remember_kernel<<<1, 32>>>(&before);
  expect(before != 12345, "shared memory does not outlive its block");
  std::vector<int> results(3, -1);
  votes_kernel<<<1, 64>>>(results.data());
  expect(results == std::vector<int>{20, 1, 0}, "votes of a block");
}

// ---- warps ----

__global__ void warp_kernel(int* wrong) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x % 32), own = static_cast<int>(threadIdx.x) * 3;
  const int first = own - lane * 3;
  const auto check = [&](bool right) { *wrong += !right; };
  check(__shfl_sync(kAll, own, 5) == first + 15);
  check(__shfl_sync(kAll, own, 5, 8) == first + (lane / 8 * 8 + 5) * 3);
  check(__shfl_up_sync(kAll, own, 3) == (lane < 3 ? own : own - 9));
  check(__shfl_down_sync(kAll, own, 16) == (lane < 16 ? own + 48 : own));
  check(__shfl_down_sync(kAll, own, 2, 4) == (lane % 4 < 2 ? own + 6 : own));
  check(__shfl_xor_sync(kAll, 1.5 * own, 7) == 1.5 * (first + (lane ^ 7) * 3));
  check(__ballot_sync(kAll, lane < 4) == 15u);
  check(__any_sync(kAll, lane == 31) && !__all_sync(kAll, lane != 31));
  check(__reduce_max_sync(kAll, static_cast<unsigned>(own)) == static_cast<unsigned>(first + 93));
  check(__reduce_add_sync(kAll, -1) == -32 && __reduce_min_sync(kAll, -own) == -(first + 93));
  check(__match_any_sync(kAll, lane / 2) == 3u << (lane / 2 * 2));
  if (lane < 8) check(__shfl_sync(0xffu, own, 7) == first + 21);  // a part of a warp
  __syncwarp();
}

void warps_exchange_values() {
  int wrong = 0;
  warp_kernel<<<2, 96>>>(&wrong);
  expect(wrong == 0, "collectives of a warp");
}

// ---- what never ends on a device, or has no meaning ----

__global__ void two_barriers_kernel(int* sink) {
  if (threadIdx.x < 16) {
    __syncthreads();
    *sink = 1;
  } else {
    __syncthreads();
    *sink = 2;
  }
}
__global__ void lost_lane_kernel() {
  if (threadIdx.x == 7) return;
  __syncwarp();
}
__global__ void half_warp_kernel() {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncthreads();
}
__global__ void unlike_kernel() {
  if (threadIdx.x < 16)
    __ballot_sync(0xffffffffu, 1);
  else
    __syncwarp();
}
__global__ void outside_kernel() { __syncwarp(1u); }

void mistakes_are_refused() {
  int sink = 0;
  expect_refusal("different barriers", [&] { two_barriers_kernel<<<1, 32>>>(&sink); });
  expect_refusal("have left the kernel", [] { lost_lane_kernel<<<1, 32>>>(); });
  expect_refusal("never ends", [] { half_warp_kernel<<<1, 32>>>(); });
  expect_refusal("different collectives", [] { unlike_kernel<<<1, 32>>>(); });
  expect_refusal("leaves out the caller", [] { outside_kernel<<<1, 32>>>(); });
  expect_refusal("beyond the block", [&] { warp_kernel<<<1, 40>>>(&sink); });
  expect_refusal("without any", [] { reverse_kernel<true><<<1, 64>>>(nullptr); });
  warps_exchange_values();  // the next launch knows nothing of it
}

// ---- bits ----

void bits_are_those_of_the_guide() {
  expect(__byte_perm(0x33221100u, 0x77665544u, 0x7521u) == 0x77552211u, "__byte_perm");
  expect(__byte_perm(0x000000f0u, 0, 0x0008u) == 0xf0f0f0ffu, "__byte_perm with signs");
  expect(__funnelshift_l(0x80000000u, 1u, 1) == 3u && __funnelshift_r(1u, 3u, 1) == 0x80000000u,
         "funnel shift");
  expect(__brev(1u) == 0x80000000u && __ffs(8) == 4 && __clz(1) == 31 && __popc(7) == 3, "bits");
  expect(__umulhi(0x80000000u, 6u) == 3u && __umul64hi(uint64_t{1} << 63, 6) == 3u, "high words");
  unsigned counter = 2;
  expect(atomicInc(&counter, 2) == 2 && counter == 0, "atomicInc");
  expect(atomicCAS(&counter, 0u, 9u) == 0 && counter == 9, "atomicCAS");
}

__global__ void beyond_kernel(int* sink) {
  __shared__ int tile[8];
  tile[threadIdx.x] = 1;
  *sink = tile[0];
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {  // for a sanitizer: writes behind shared memory
    int sink;
    beyond_kernel<<<1, 9>>>(&sink);
    return 0;
  }
  every_thread_runs_once_and_in_another_order();
  impossible_launches_set_the_error();
  barriers_order_what_shared_memory_holds();
  warps_exchange_values();
  mistakes_are_refused();
  bits_are_those_of_the_guide();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
