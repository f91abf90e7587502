// Switching stacks takes some nanoseconds: a test of a kernel does it a million times, and swapcontext()
// would ask the system each time.
#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define COVR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define COVR_ASAN 1
#endif
#endif
#ifdef COVR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "fiber.cpp knows x86-64 only: write switch_stack for this processor"
#endif

// Saves what a called function must keep, stores the stack pointer in *from and continues at `to`.
extern "C" void covr_switch_stack(void** from, void* to);
asm(R"(
.text
.globl covr_switch_stack
.hidden covr_switch_stack
.type covr_switch_stack, @function
covr_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size covr_switch_stack, .-covr_switch_stack
)");

namespace emulator {
namespace {

Fiber* g_current = nullptr;
void* g_caller = nullptr;  // the stack pointer of resume()
#ifdef COVR_ASAN
void* g_caller_fake_stack = nullptr;
const void* g_caller_stack = nullptr;
size_t g_caller_bytes = 0;
#endif

}  // namespace

Fiber::Fiber(char* stack, size_t bytes) : stack_(stack), bytes_(bytes) {
#ifdef COVR_ASAN
  __asan_unpoison_memory_region(stack, bytes);  // what a function left there that was given up
#endif
}

void Fiber::begin(const std::function<void()>* body) {
  body_ = body;
  finished_ = false;
  fake_stack_ = nullptr;
  // As covr_switch_stack leaves a stack: six registers and an address to return to. A function is entered
  // with its stack pointer 8 below a multiple of 16.
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_) + bytes_) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  saved_ = top;
}

void Fiber::resume() {
  g_current = this;
#ifdef COVR_ASAN
  __sanitizer_start_switch_fiber(&g_caller_fake_stack, stack_, bytes_);
#endif
  covr_switch_stack(&g_caller, saved_);
#ifdef COVR_ASAN
  __sanitizer_finish_switch_fiber(g_caller_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#ifdef COVR_ASAN
  // Without a place for its fake stack, that of a finished fiber is freed.
  __sanitizer_start_switch_fiber(finished_ ? nullptr : &fake_stack_, g_caller_stack, g_caller_bytes);
#endif
  covr_switch_stack(&saved_, g_caller);
#ifdef COVR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &g_caller_stack, &g_caller_bytes);
#endif
}

void Fiber::enter() {
#ifdef COVR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &g_caller_stack, &g_caller_bytes);
#endif
  Fiber* self = g_current;
  (*self->body_)();
  self->finished_ = true;
  self->leave();
  __builtin_unreachable();
}

}  // namespace emulator
