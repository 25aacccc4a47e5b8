// Fibers: stacks of their own on one OS thread, which go on with each other.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(BITFOLD_EMULATOR_UCONTEXT)
#define BITFOLD_EMULATOR_UCONTEXT
#endif
#ifdef BITFOLD_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace bitfold::cuda::emulator {

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};

// A flow of control that isn't running: a fiber, or the one that started them.
struct Context {
#ifdef BITFOLD_EMULATOR_UCONTEXT
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
  Stack stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
};

// The first go() to the context calls entry, which never returns and whose first act is arrive().
void prepare(Context& context, Stack stack, void (*entry)());
// Leaves `from`, the running one, for `to`; returns when something goes to `from`.
void go(Context& from, Context& to);
void arrive(Context& self);
[[noreturn]] void leave_for_good(Context& from, Context& to);

// Stacks that are kept from launch to launch, each above a page that may not be touched.
class Stacks {
 public:
  Stack at(size_t index);
  void renew();  // for ThreadSanitizer, which would take the next block's use for a race with the last one's

 private:
  std::vector<void*> slabs_;  // of one stack each
};

}  // namespace bitfold::cuda::emulator
