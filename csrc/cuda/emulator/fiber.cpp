#include "cuda/emulator/fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cuda/emulator/sanitizers.hpp"

#ifndef BITFOLD_EMULATOR_UCONTEXT
// void bitfold_emulator_switch(void** from, void* to): the registers that a function has to keep go to the stack, its
// pointer to *from, and all of that comes back from `to`. swapcontext would do the same with a call of the kernel for
// the signal mask: 170 ns instead of 10.
extern "C" void bitfold_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl bitfold_emulator_switch
.hidden bitfold_emulator_switch
.type bitfold_emulator_switch, @function
bitfold_emulator_switch:
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
.size bitfold_emulator_switch, . - bitfold_emulator_switch
)");
#endif

namespace bitfold::cuda::emulator {
namespace {

constexpr size_t kPage = 4096;
size_t stack_bytes() { return (with_asan() || with_tsan() ? 256 : 64) * 1024; }

Context* came_from;  // the context that was left last

void jump(Context& from, Context& to) {
  came_from = &from;
  if (with_tsan()) __tsan_switch_to_fiber(to.tsan, 1);  // 1: without an order between the two
#ifdef BITFOLD_EMULATOR_UCONTEXT
  swapcontext(&from.machine, &to.machine);
#else
  bitfold_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace

void prepare(Context& context, Stack stack, void (*entry)()) {
  context.stack = stack;
  context.fake_stack = nullptr;
  if (with_asan()) __asan_unpoison_memory_region(stack.bottom, stack.size);
#ifdef BITFOLD_EMULATOR_UCONTEXT
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = const_cast<void*>(stack.bottom);
  context.machine.uc_stack.ss_size = stack.size;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#else
  // As after a call of entry from nowhere: a null return address at 8 modulo 16, below it what the switch pops.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.bottom) + stack.size) - 1;
  *top-- = nullptr;
  *top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

void arrive(Context& self) {
  if (!with_asan()) return;
  __sanitizer_finish_switch_fiber(self.fake_stack, &came_from->stack.bottom, &came_from->stack.size);
}

void go(Context& from, Context& to) {
  if (with_asan()) __sanitizer_start_switch_fiber(&from.fake_stack, to.stack.bottom, to.stack.size);
  jump(from, to);
  arrive(from);
}

void leave_for_good(Context& from, Context& to) {
  if (with_asan()) __sanitizer_start_switch_fiber(nullptr, to.stack.bottom, to.stack.size);
  jump(from, to);
  std::abort();
}

Stack Stacks::at(size_t index) {
  while (slabs_.size() <= index) {
    void* slab = mmap(nullptr, kPage + stack_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    mprotect(slab, kPage, PROT_NONE);
    slabs_.push_back(slab);
  }
  // Tops that lie a few cache lines apart don't all fall into the same sets of the cache.
  return {static_cast<const char*>(slabs_[index]) + kPage, stack_bytes() - index % 16 * 256};
}

void Stacks::renew() {
  for (void* slab : slabs_) {
    mmap(static_cast<char*>(slab) + kPage, stack_bytes(), PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
}

}  // namespace bitfold::cuda::emulator
