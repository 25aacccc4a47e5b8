// Barriers in shared memory, copies that arrive at them, and what the async proxy sees.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/emulator/async_block.hpp"
#include "cuda/emulator/sanitizers.hpp"

namespace bitfold::cuda::emulator {
namespace {

constexpr uint64_t kMark = 0x6d62617272696572u;  // what a barrier's 64 bits hold

int64_t offset(const void* shared) {
  return reinterpret_cast<intptr_t>(shared) - reinterpret_cast<intptr_t>(block->shared);
}

AsyncBarrier& find(void* address, const char* what, const Where& where) {
  check_shared(address, 8, what, where);
  const auto found = async().barriers.find(address);
  if (found == async().barriers.end()) {
    fail(std::string(what) + " before the barrier_init of the barrier at byte " + std::to_string(offset(address)) +
             " of shared memory",
         where);
  }
  if (*static_cast<const volatile uint64_t*>(address) != kMark) {
    fail("the barrier at byte " + std::to_string(offset(address)) + " of shared memory was overwritten, " + what,
         where);
  }
  return found->second;
}

// The two bytes that a phase's arrivals and waits are ordered by lie where the barrier does.
unsigned char* token(void* address, unsigned phase) { return static_cast<unsigned char*>(address) + (phase & 1u); }

void deliver(const BulkCopy& copy) {
  const Unseen unseen;
  std::memcpy(copy.shared, copy.global, copy.bytes);
  std::memcpy(&async().seen[static_cast<size_t>(offset(copy.shared))], copy.global, copy.bytes);
}

// The copy as something that another thread does, between its issue and the end of the phase.
void show_to_tsan(Thread& self, const BulkCopy& copy, unsigned char* token) {
  enter_engine(self, token);
  __tsan_read_range(const_cast<unsigned char*>(copy.global), copy.bytes);
  __tsan_write_range(copy.shared, copy.bytes);
  leave_engine(self, token);
}

// Ends the phase if nothing is missing any more, or nothing but what is late.
void advance(AsyncBarrier& barrier) {
  if (!barrier.waiting.empty() && barrier.pending == barrier.copies_arrivals.size()) {
    int64_t late = 0;
    for (const BulkCopy& copy : barrier.bulk_copies) late += copy.bytes;
    if (late == barrier.bytes) {
      for (const BulkCopy& copy : barrier.bulk_copies) deliver(copy);
      for (const CopiesArrival& arrival : barrier.copies_arrivals) deliver_copies(*arrival.thread, arrival.copies);
      barrier.bulk_copies.clear();
      barrier.copies_arrivals.clear();
      barrier.bytes = 0;
      barrier.pending = 0;
    }
  }
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (Thread* thread : barrier.waiting) {
    if (thread != current) wake(*thread);
  }
  barrier.waiting.clear();
}

void take_arrival(AsyncBarrier& barrier, void* address, const char* what, const Where& where) {
  if (barrier.pending == barrier.copies_arrivals.size()) {
    fail(std::string(what) + ": more arrivals than the " + std::to_string(barrier.arrivals) +
             " of a phase, at the barrier at byte " + std::to_string(offset(address)) + " of shared memory",
         where);
  }
}

}  // namespace

Async& async() {
  if (!block->async) {
    const Unseen unseen;
    block->async = std::make_unique<Async>();
    block->async->seen.assign(static_cast<size_t>(block->shape.shared_bytes), config().poison);
  }
  return *block->async;
}

const unsigned char* seen_by_async(const unsigned char* shared, int bytes, const char* what, const Where& where) {
  const int64_t at = offset(shared);
  const unsigned char* seen = &async().seen[static_cast<size_t>(at)];
  const Unseen unseen;
  if (std::memcmp(seen, shared, static_cast<size_t>(bytes)) != 0) {
    fail("without a fence_async since they were written, " + std::string(what) + " uses bytes " + std::to_string(at) +
             " ... " + std::to_string(at + bytes - 1) + " of shared memory",
         where);
  }
  return seen;
}

void fence_async() {
  Async& state = async();
  const Unseen unseen;
  std::memcpy(state.seen.data(), block->shared, state.seen.size());
  for (auto& [address, barrier] : state.barriers) barrier.visible |= barrier.initialised_by == current;
}

// ---- barriers ----

void barrier_init(void* address, unsigned arrivals, const Where& where) {
  check_shared(address, 8, "barrier_init", where);
  if (arrivals < 1 || arrivals > (1u << 20) - 1) {
    fail("a barrier is for 1 to 2^20 - 1 arrivals, got " + std::to_string(arrivals), where);
  }
  const Unseen unseen;
  const auto [found, added] = async().barriers.try_emplace(address);
  if (!added) {
    fail("a second barrier_init of the barrier at byte " + std::to_string(offset(address)) + " of shared memory",
         where);
  }
  found->second.arrivals = found->second.pending = arrivals;
  found->second.initialised_by = current;
  *static_cast<volatile uint64_t*>(address) = kMark;
  std::memcpy(&async().seen[static_cast<size_t>(offset(address))], &kMark, sizeof(kMark));
}

void fence_barrier_init() {
  for (auto& [address, barrier] : async().barriers) barrier.visible |= barrier.initialised_by == current;
}

void barrier_arrive(void* address, unsigned bytes, const char* name, const Where& where) {
  AsyncBarrier& barrier = find(address, name, where);
  take_arrival(barrier, address, name, where);
  release(token(address, barrier.phase));
  barrier.bytes += bytes;
  --barrier.pending;
  advance(barrier);
}

void barrier_wait(void* address, unsigned parity, const Where& where) {
  AsyncBarrier& barrier = find(address, "barrier_wait", where);
  if (parity > 1) fail("a parity is 0 or 1, got " + std::to_string(parity), where);
  // Who comes late may find the phase after next, and waits again: so would the hardware's loop.
  while ((barrier.phase & 1u) == parity) {
    {
      const Unseen unseen;
      barrier.waiting.push_back(current);
    }
    const unsigned phase = barrier.phase;
    advance(barrier);
    if (barrier.phase == phase) wait("barrier_wait", where);
  }
  acquire(token(address, parity));
}

// ---- copies ----

void cp_async_arrive(void* address, const Where& where) {
  Thread& self = *current;
  AsyncBarrier& barrier = find(address, "cp_async_arrive", where);
  take_arrival(barrier, address, "cp_async_arrive", where);
  release_after_copies(self, token(address, barrier.phase));
  if (self.copies.empty()) {
    --barrier.pending;
  } else {
    const Unseen unseen;
    barrier.copies_arrivals.push_back({&self, self.issued});
  }
  advance(barrier);
}

void copy_bulk(void* shared, const void* global, unsigned bytes, void* address, const Where& where) {
  Thread& self = *current;
  if (bytes == 0 || bytes % 16 != 0) {
    fail("copy_bulk is of a multiple of 16 bytes, got " + std::to_string(bytes), where);
  }
  check_access(shared, 16, 0, where);
  check_access(global, 16, static_cast<int>(bytes), where);
  check_shared_range(shared, static_cast<int>(bytes), "copy_bulk", where);
  AsyncBarrier& barrier = find(address, "copy_bulk", where);
  if (!barrier.visible) fail("copy_bulk to a barrier without a fence_barrier_init after its barrier_init", where);
  const BulkCopy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes};
  seen_by_async(copy.shared, static_cast<int>(bytes), "copy_bulk", where);
  if (with_tsan()) show_to_tsan(self, copy, token(address, barrier.phase));
  const Delivery delivery = config().delivery;
  if (delivery == Delivery::Early || (delivery == Delivery::Random && random_bits() & 1u)) {
    deliver(copy);
    barrier.bytes -= bytes;
    return advance(barrier);
  }
  const Unseen unseen;
  std::memset(copy.shared, config().poison, bytes);
  std::memset(&async().seen[static_cast<size_t>(offset(shared))], config().poison, bytes);
  barrier.bulk_copies.push_back(copy);
  advance(barrier);
}

// ---- the end, and deadlocks ----

void check_barriers_at_the_end() {
  for (const auto& [address, barrier] : async().barriers) {
    if (barrier.bulk_copies.empty()) continue;
    throw std::runtime_error(std::string(block->shape.name) + ": a block ends before its copy_bulk is there, at the " +
                             "barrier at byte " + std::to_string(offset(address)) + " of shared memory");
  }
}

std::string missing_at_barriers() {
  std::string text;
  if (!block->async) return text;
  for (const auto& [address, barrier] : block->async->barriers) {
    if (barrier.waiting.empty()) continue;
    text += "; the barrier at byte " + std::to_string(offset(address)) + " of shared memory lacks " +
            std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) + " bytes";
  }
  return text;
}

}  // namespace bitfold::cuda::emulator
