// Addresses that instructions check, and cp_async.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/emulator/block.hpp"
#include "cuda/emulator/runtime.hpp"
#include "cuda/emulator/sanitizers.hpp"

namespace bitfold::cuda::emulator {
namespace {

// Not memcpy, nor what the compiler would make one of: sanitizers intercept it, and they are told of these bytes in
// another way.
void copy_bytes(volatile unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = 0; i < bytes; ++i) to[i] = from[i];
}
void fill_bytes(volatile unsigned char* to, unsigned char value, int bytes) {
  for (int i = 0; i < bytes; ++i) to[i] = value;
}

void deliver(const Copy& copy) {
  copy_bytes(copy.shared, copy.global, copy.bytes);
  fill_bytes(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
}

template <class Due>
void deliver_oldest(Thread& thread, Due due) {
  size_t count = 0;
  while (count < thread.copies.size() && due(thread.copies[count])) deliver(thread.copies[count++]);
  const Unseen unseen;
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

// The copy as something that another thread does, between its issue and the wait for its group.
void show_to_tsan(Thread& self, const Copy& copy) {
  if (!self.watched.copier) self.watched.copier = __tsan_create_fiber(0);
  unsigned char* token = &self.copy_tokens[copy.group % kCopyTokens];
  __tsan_release(token);
  __tsan_switch_to_fiber(self.watched.copier, 1);
  __tsan_acquire(token);
  __tsan_read_range(const_cast<unsigned char*>(copy.global), static_cast<unsigned long>(copy.bytes));
  __tsan_write_range(copy.shared, static_cast<unsigned long>(copy.size));
  __tsan_release(token);
  __tsan_switch_to_fiber(self.context.tsan, 1);
}

std::string misaligned(uintptr_t alignment, uintptr_t beyond) {
  return "an address of " + std::to_string(alignment) + " bytes is aligned to " + std::to_string(beyond);
}

}  // namespace

void check_access(const void* address, int alignment, int bytes, const Where& where) {
  const uintptr_t beyond = reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment);
  if (beyond != 0) fail(misaligned(static_cast<uintptr_t>(alignment), beyond), where);
  // The compiler may load less than the kernel asked for, and AddressSanitizer sees what the compiler loads.
  if (with_asan() && bytes > 0 && __asan_region_is_poisoned(const_cast<void*>(address), static_cast<size_t>(bytes))) {
    fail(std::to_string(bytes) + " bytes that aren't all allocated", where);
  }
}

void check_shared_range(const void* address, int bytes, const char* what, const Where& where) {
  const auto offset = reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(block->shared);
  if (offset < 0 || offset + bytes > block->shape.shared_bytes) {
    fail(std::string(what) + " at byte " + std::to_string(offset) + " of " + std::to_string(block->shape.shared_bytes) +
             " of shared memory",
         where);
  }
}

void check_shared(const void* address, int bytes, const char* what, const Where& where) {
  check_shared_range(address, bytes, what, where);
  check_access(address, bytes, bytes, where);
}

void cp_async(void* shared, const void* global, int size, int bytes, const Where& where) {
  Thread& self = *current;
  check_shared(shared, size, "cp_async", where);
  if (bytes < 0 || bytes > size) {
    fail("cp_async of " + std::to_string(bytes) + " bytes into " + std::to_string(size), where);
  }
  check_access(global, size, bytes, where);
  const Copy copy{static_cast<unsigned char*>(shared),
                  static_cast<const unsigned char*>(global),
                  size,
                  bytes,
                  self.committed,
                  self.issued++};
  if (with_tsan()) show_to_tsan(self, copy);
  const Delivery delivery = config().delivery;
  if (delivery == Delivery::Early || (delivery == Delivery::Random && random_bits() & 1u)) return deliver(copy);
  fill_bytes(copy.shared, config().poison, size);
  const Unseen unseen;
  self.copies.push_back(copy);
}

void cp_async_commit() { ++current->committed; }

void cp_async_wait(int groups) {
  Thread& self = *current;
  const int there = self.committed - groups;  // groups below this one
  for (; self.arrived < there; ++self.arrived) acquire(&self.copy_tokens[self.arrived % kCopyTokens]);
  deliver_oldest(self, [=](const Copy& copy) { return copy.group < there; });
}

void deliver_copies(Thread& thread, int64_t count) {
  deliver_oldest(thread, [=](const Copy& copy) { return copy.number < count; });
}

void enter_engine(Thread& self, unsigned char* token) {
  if (!self.watched.engine) self.watched.engine = __tsan_create_fiber(0);
  __tsan_release(token);
  __tsan_switch_to_fiber(self.watched.engine, 1);
  __tsan_acquire(token);
}
void leave_engine(Thread& self, unsigned char* token) {
  __tsan_release(token);
  __tsan_switch_to_fiber(self.context.tsan, 1);
}
void release_after_copies(Thread& self, unsigned char* token) {
  if (!self.watched.copier) return;
  __tsan_switch_to_fiber(self.watched.copier, 1);
  __tsan_release(token);
  __tsan_switch_to_fiber(self.context.tsan, 1);
}

void finish_copies(Thread& thread) {
  for (; thread.arrived <= thread.committed; ++thread.arrived) {
    acquire(&thread.copy_tokens[thread.arrived % kCopyTokens]);
  }
}

}  // namespace bitfold::cuda::emulator

// What code compiled with -fsanitize=alignment calls before an access that a GPU would refuse; its own library would
// end the process. The layout is that of GCC's and Clang's calls.
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" [[gnu::weak]] void __ubsan_handle_type_mismatch_v1_abort(const Misaligned* access, uintptr_t address) {
  using namespace bitfold::cuda::emulator;
  const uintptr_t alignment = uintptr_t{1} << access->log_alignment;
  const std::string what = misaligned(alignment, address % alignment);
  if (current) fail_here(what, access->file, access->line);
  std::fprintf(stderr, "%s at %s:%u\n", what.c_str(), access->file, access->line);
  std::abort();
}
