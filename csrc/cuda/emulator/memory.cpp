// Addresses that instructions check, and cp_async.
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

// The copy as something that another thread does, between its issue and the wait for its group.
void show_to_tsan(Thread& self, const Copy& copy) {
  if (!self.tsan_copier) self.tsan_copier = __tsan_create_fiber(0);
  unsigned char* token = &self.copy_tokens[copy.group % kCopyTokens];
  __tsan_release(token);
  __tsan_switch_to_fiber(self.tsan_copier, 1);
  __tsan_acquire(token);
  __tsan_read_range(const_cast<unsigned char*>(copy.global), static_cast<unsigned long>(copy.bytes));
  __tsan_write_range(copy.shared, static_cast<unsigned long>(copy.size));
  __tsan_release(token);
  __tsan_switch_to_fiber(self.context.tsan, 1);
}

}  // namespace

void check_aligned(const void* address, int bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0) return;
  fail("an address of " + std::to_string(bytes) + " bytes is aligned to " +
           std::to_string(reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes)),
       where);
}

void check_shared(const void* address, int bytes, const char* what, const Where& where) {
  const auto offset = reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(block->shared);
  if (offset < 0 || offset + bytes > block->shape.shared_bytes) {
    fail(std::string(what) + " at byte " + std::to_string(offset) + " of " + std::to_string(block->shape.shared_bytes) +
             " of shared memory",
         where);
  }
  check_aligned(address, bytes, where);
}

void cp_async(void* shared, const void* global, int size, int bytes, const Where& where) {
  Thread& self = *current;
  check_shared(shared, size, "cp_async", where);
  check_aligned(global, size, where);
  if (bytes < 0 || bytes > size) {
    fail("cp_async of " + std::to_string(bytes) + " bytes into " + std::to_string(size), where);
  }
  if (with_asan() && bytes > 0 && __asan_region_is_poisoned(const_cast<void*>(global), static_cast<size_t>(bytes))) {
    fail("cp_async reads beyond what was allocated", where);
  }
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), size, bytes,
                  self.committed};
  if (with_tsan()) show_to_tsan(self, copy);
  const Delivery delivery = config().delivery;
  if (delivery == Delivery::Early || (delivery == Delivery::Random && random_bits() & 1u)) return deliver(copy);
  fill_bytes(copy.shared, config().poison, size);
  const Unseen unseen;
  self.copies.push_back(copy);
}

void cp_async_commit() { ++current->committed; }

void cp_async_wait(int groups, const Where&) {
  Thread& self = *current;
  const int there = self.committed - groups;  // groups below this one
  for (; self.arrived < there; ++self.arrived) acquire(&self.copy_tokens[self.arrived % kCopyTokens]);
  size_t count = 0;
  while (count < self.copies.size() && self.copies[count].group < there) deliver(self.copies[count++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace bitfold::cuda::emulator
