#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"
#include "fiber.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostSharedBytes = 227 << 10;  // of a block, since Hopper

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned number = 0;
  // While it waits at a barrier of the block:
  std::source_location place{};
  // While it waits for its warp:
  Collective collective{};
  uint64_t result = 0;
  bool in_collective = false;
};

// Stacks with a page after each that nobody may touch.
class Stacks {
 public:
  Stacks() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    each_ = kStackBytes + page;
    memory_ = mmap(nullptr, each_ * kMostThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < kMostThreads; ++i) mprotect(at(i) - page, page, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, each_ * kMostThreads); }
  char* at(unsigned i) const { return static_cast<char*>(memory_) + i * each_ + (each_ - kStackBytes); }

 private:
  size_t each_;
  void* memory_;
};

class Device {
 public:
  static Device& get() {
    static auto* device = new Device;  // kernels may run while the process ends
    return *device;
  }

  std::mutex mutex;  // one kernel at a time, whatever the streams
  uint64_t seed, random_state;
  uint64_t blocks_begun = 0;
  std::map<std::string, int64_t> launches;  // by the kernel's name

  uint64_t random() {  // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  unsigned below(unsigned n) { return static_cast<unsigned>((random() >> 32) * n >> 32); }

  void run(const char* kernel, const Launch& launch, const std::function<void()>& thread) {
    kernel_ = kernel;
    gridDim = launch.grid;
    blockDim = launch.block;
    body_ = [this, &thread] {
      try {
        thread();
      } catch (...) {
        error_ = std::current_exception();
      }
    };
    const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned other = below(i + 1);
      order[i] = order[other];
      order[other] = i;
    }
    dynamic_ = launch.shared_bytes ? std::make_unique<SharedVariable>(launch.shared_bytes, 16) : nullptr;
    for (unsigned block : order) {
      blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
      run_block();
    }
  }

  Votes block_barrier(bool predicate, const std::source_location& place) {
    Thread& self = *current_;
    self.place = place;
    at_barrier_.push_back(&self);
    next_votes_ += predicate;
    self.fiber.leave();
    return votes_;
  }

  uint64_t warp_collective(const Collective& own) {
    Thread& self = *current_;
    self.collective = own;
    self.in_collective = true;
    complete_collective(self);
    self.fiber.leave();
    return self.result;
  }

  int lane() const { return static_cast<int>(current_->number % warpSize); }
  void* dynamic_shared() {
    if (!dynamic_) fail("uses dynamic shared memory, but was launched without any");
    return dynamic_->of_this_block();
  }

 private:
  Device() {
    const char* text = std::getenv("COVR_CUDA_ON_CPU_SEED");
    seed = random_state = text ? std::strtoull(text, nullptr, 10) : 0;
  }

  void run_block() {
    ++blocks_begun;
    begin_threads();
    while (!ready_.empty()) {
      while (!ready_.empty()) {
        const unsigned chosen = below(static_cast<unsigned>(ready_.size()));
        current_ = ready_[chosen];
        ready_[chosen] = ready_.back();
        ready_.pop_back();
        threadIdx = current_->index;
        current_->fiber.resume();
        running_ -= current_->fiber.finished();
        current_ = nullptr;
        if (error_) give_up();
      }
      open_barrier();
    }
    if (running_) fail("never ends: threads wait for lanes of their warp that wait elsewhere or have left");
  }

  void begin_threads() {
    const unsigned n = blockDim.x * blockDim.y * blockDim.z;
    if (!stacks_) {
      stacks_ = std::make_unique<Stacks>();
      for (unsigned i = 0; i < kMostThreads; ++i) threads_.push_back({Fiber(stacks_->at(i), kStackBytes)});
    }
    running_ = n;
    for (unsigned i = 0; i < n; ++i) {
      Thread& thread = threads_[i];
      thread.fiber.begin(&body_);
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      thread.number = i;
      thread.in_collective = false;
      ready_.push_back(&thread);
    }
  }

  // All that have not ended must be there.
  void open_barrier() {
    if (at_barrier_.empty()) return;
    if (at_barrier_.size() != running_)
      fail("never ends: some threads of a block wait at __syncthreads, others for their warp");
    for (const Thread* thread : at_barrier_)
      if (thread->place.line() != at_barrier_[0]->place.line() ||
          std::strcmp(thread->place.file_name(), at_barrier_[0]->place.file_name()) != 0)
        fail("has threads of one block at different barriers, in " + text_of(thread->place) + " and " +
             text_of(at_barrier_[0]->place));
    votes_ = {next_votes_, static_cast<int>(running_)};
    next_votes_ = 0;
    ready_.swap(at_barrier_);
  }

  void complete_collective(const Thread& last) {
    const Collective& own = last.collective;
    const unsigned first = last.number - last.number % warpSize;
    if (!(own.mask >> (last.number - first) & 1))
      fail(std::string(own.name) + ": the mask leaves out the caller");
    std::array<uint64_t, warpSize> values;
    for (int lane = 0; lane < warpSize; ++lane) {
      values[lane] = random();  // what a lane outside the mask brings
      if (!(own.mask >> lane & 1)) continue;
      if (first + lane >= blockDim.x * blockDim.y * blockDim.z)
        fail(std::string(own.name) + ": the mask has lanes beyond the block");
      const Thread& other = threads_[first + lane];
      if (other.fiber.finished())
        fail(std::string(own.name) + ": the mask has lanes that have left the kernel");
      // Those of a smaller mask come here when they are done there.
      if (!other.in_collective || !(other.collective.mask >> (last.number - first) & 1)) return;
      if (other.collective.mask != own.mask || other.collective.combine != own.combine)
        fail(std::string("has lanes of one warp at different collectives or with different masks: ") +
             own.name + " and " + other.collective.name);
      values[lane] = other.collective.value;
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      if (!(own.mask >> lane & 1)) continue;
      Thread& thread = threads_[first + lane];
      thread.result = own.combine(values.data(), own.mask, lane, thread.collective.argument);
      thread.in_collective = false;
      ready_.push_back(&thread);
    }
  }

  static std::string text_of(const std::source_location& place) {
    return std::string(place.file_name()) + ":" + std::to_string(place.line());
  }

  [[noreturn]] void fail(const std::string& what) {
    const std::runtime_error error("kernel " + std::string(kernel_) + " " + what);
    if (current_) throw error;  // run_block() gives up when the thread has ended
    error_ = std::make_exception_ptr(error);
    give_up();
  }

  // The other threads stay where they are: their stacks are dropped.
  [[noreturn]] void give_up() {
    threads_.clear();
    ready_.clear();
    at_barrier_.clear();
    stacks_.reset();
    next_votes_ = 0;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  const char* kernel_ = "";
  std::function<void()> body_;
  std::unique_ptr<Stacks> stacks_;
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_, at_barrier_;
  Thread* current_ = nullptr;  // the one that runs
  unsigned running_ = 0;
  int next_votes_ = 0;
  Votes votes_{};
  std::unique_ptr<SharedVariable> dynamic_;
  std::exception_ptr error_;
};

bool possible(const Launch& launch) {
  const auto& [grid, block, shared_bytes, stream] = launch;
  return grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 0x7fffffffu &&
         grid.y <= 65535 && grid.z <= 65535 && block.z <= 64 &&
         uint64_t{block.x} * block.y * block.z <= kMostThreads && shared_bytes <= kMostSharedBytes;
}

}  // namespace

int multiprocessors() {
  constexpr std::array kCounts{4, 132, 1, 2};
  return kCounts[Device::get().seed % kCounts.size()];
}

void run(const char* kernel, const Launch& launch, const std::function<void()>& thread) {
  if (!possible(launch)) {
    set_last_error(cudaErrorInvalidConfiguration);
    return;
  }
  Device& device = Device::get();
  std::lock_guard guard(device.mutex);
  const std::string name(kernel);
  ++device.launches[name.substr(0, name.find('<'))];
  device.run(kernel, launch, thread);
}

// Memory whose alignment is what was asked for and no more, so that a sanitizer sees wider accesses, and
// whose end is that of an allocation.
SharedVariable::SharedVariable(size_t bytes, size_t alignment) : bytes(bytes) {
  const size_t offset = alignment < 128 ? alignment : 0;
  void* allocated;
  if (posix_memalign(&allocated, 128, offset + bytes) != 0) throw std::bad_alloc();
  memory.reset(allocated);
  data = static_cast<char*>(allocated) + offset;
}

void* SharedVariable::of_this_block() {
  Device& device = Device::get();
  if (block != device.blocks_begun) {
    block = device.blocks_begun;
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
      const uint64_t bits = device.random();
      std::memcpy(data + i, &bits, std::min(sizeof bits, bytes - i));
    }
  }
  return data;
}

void* dynamic_shared() { return Device::get().dynamic_shared(); }
Votes block_barrier(bool predicate, const std::source_location& place) {
  return Device::get().block_barrier(predicate, place);
}
uint64_t warp_collective(const Collective& own) { return Device::get().warp_collective(own); }
int lane() { return Device::get().lane(); }
uint64_t random_bits() { return Device::get().random(); }

}  // namespace emulator

// How many launches of this process were written `kernel<<<...>>>` or `kernel<T><<<...>>>` so far. For
// ctypes.
extern "C" __attribute__((visibility("default"))) int64_t emulator_launches(const char* kernel) {
  emulator::Device& device = emulator::Device::get();
  std::lock_guard guard(device.mutex);
  const auto found = device.launches.find(kernel);
  return found == device.launches.end() ? 0 : found->second;
}
