// A function that is left and entered again: a thread of the emulated device.
#pragma once

#include <cstddef>
#include <functional>

namespace emulator {

class Fiber {
 public:
  // Stacks are the caller's, `bytes` each, and stay valid.
  Fiber(char* stack, size_t bytes);

  // The next resume() begins `body`, which must not throw. What ran before is forgotten.
  void begin(const std::function<void()>* body);
  // Runs until the function leaves or returns. Called outside of fibers.
  void resume();
  // Called by the function: back to resume().
  void leave();

  bool finished() const { return finished_; }

 private:
  [[noreturn]] static void enter();

  char* stack_;
  size_t bytes_;
  void* saved_ = nullptr;       // its stack pointer, while others run
  void* fake_stack_ = nullptr;  // of the address sanitizer
  const std::function<void()>* body_ = nullptr;
  bool finished_ = true;
};

}  // namespace emulator
