// Barriers in shared memory, copies that arrive at them, and what the async proxy sees.
#include <algorithm>
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

// read(global, bytes, shared) for each piece that a copy reads, and where in shared memory it is to lie.
template <class Read>
void each_piece(const BulkCopy& copy, const Read& read) {
  if (copy.global != nullptr) return read(copy.global, static_cast<int64_t>(copy.bytes), copy.shared);
  const ByteMatrix& matrix = copy.matrix;
  for (int64_t i = 0; i < matrix.box_lines; ++i) {
    if (copy.line + i < 0 || copy.line + i >= matrix.lines) continue;
    for (int64_t c = 0; c < kBoxBytes; c += 16) {
      const int64_t left = matrix.bytes - copy.byte - c;
      if (copy.byte + c < 0 || left <= 0) continue;
      read(static_cast<const unsigned char*>(matrix.data) + (copy.line + i) * matrix.line_bytes + copy.byte + c,
           std::min<int64_t>(left, 16), copy.shared + i * kBoxBytes + (c ^ i % 8 * 16));
    }
  }
}

void deliver(const BulkCopy& copy) {
  const Unseen unseen;
  unsigned char* seen = &async().seen[static_cast<size_t>(offset(copy.shared))];
  std::memset(copy.shared, 0, copy.bytes);
  each_piece(copy, [](const unsigned char* from, int64_t bytes, unsigned char* to) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  });
  std::memcpy(seen, copy.shared, copy.bytes);
}

// The copy as something that another thread does, between its issue and the end of the phase.
void show_to_tsan(Thread& self, const BulkCopy& copy, unsigned char* token) {
  enter_engine(self, token);
  each_piece(copy, [](const unsigned char* from, int64_t bytes, unsigned char*) {
    __tsan_read_range(const_cast<unsigned char*>(from), static_cast<unsigned long>(bytes));
  });
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

namespace {

// One that goes to the barrier at the address, now or later.
void begin(const BulkCopy& copy, void* address, const char* what, const Where& where) {
  const auto bytes = static_cast<int>(copy.bytes);
  check_shared_range(copy.shared, bytes, what, where);
  AsyncBarrier& barrier = find(address, what, where);
  if (!barrier.visible)
    fail(std::string(what) + " to a barrier without a fence_barrier_init after its barrier_init", where);
  seen_by_async(copy.shared, bytes, what, where);
  if (with_tsan()) show_to_tsan(*current, copy, token(address, barrier.phase));
  const Delivery delivery = config().delivery;
  if (delivery == Delivery::Early || (delivery == Delivery::Random && random_bits() & 1u)) {
    deliver(copy);
    barrier.bytes -= copy.bytes;
    return advance(barrier);
  }
  const Unseen unseen;
  std::memset(copy.shared, config().poison, copy.bytes);
  std::memset(&async().seen[static_cast<size_t>(offset(copy.shared))], config().poison, copy.bytes);
  barrier.bulk_copies.push_back(copy);
  advance(barrier);
}

}  // namespace

void copy_bulk(void* shared, const void* global, unsigned bytes, void* address, const Where& where) {
  if (bytes == 0 || bytes % 16 != 0) {
    fail("copy_bulk is of a multiple of 16 bytes, got " + std::to_string(bytes), where);
  }
  check_access(shared, 16, 0, where);
  check_access(global, 16, static_cast<int>(bytes), where);
  begin({static_cast<unsigned char*>(shared), bytes, static_cast<const unsigned char*>(global)}, address, "copy_bulk",
        where);
}

// ---- boxes of matrices ----

void check_matrix(const ByteMatrix& matrix) {
  const auto wrong = [](const std::string& what, int64_t value, const char* must) {
    throw std::runtime_error("cuTensorMapEncodeTiled: " + what + " is " + std::to_string(value) + ", and must be " +
                             must);
  };
  constexpr int64_t kMost = int64_t{1} << 32;
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0) wrong("the data's address", 0, "a multiple of 16");
  if (matrix.line_bytes % 16 != 0 || matrix.line_bytes <= 0 || matrix.line_bytes >= kMost << 8)
    wrong("line_bytes", matrix.line_bytes, "a multiple of 16, from 16 up and below 2^40");
  if (matrix.lines < 1 || matrix.lines > kMost) wrong("lines", matrix.lines, "1 to 2^32");
  if (matrix.bytes < 1 || matrix.bytes > kMost) wrong("bytes", matrix.bytes, "1 to 2^32");
  if (matrix.box_lines < 1 || matrix.box_lines > 256) wrong("box_lines", matrix.box_lines, "1 to 256");
}

void copy_box(void* shared, const TensorMap& map, int byte, int line, void* address, const Where& where) {
  if (offset(shared) % 1024 != 0) {
    fail("copy_box goes to a multiple of 1024 of shared memory, got byte " + std::to_string(offset(shared)), where);
  }
  const BulkCopy copy{static_cast<unsigned char*>(shared),
                      static_cast<unsigned>(map.matrix.box_lines * kBoxBytes),
                      nullptr,
                      map.matrix,
                      byte,
                      line};
  each_piece(copy, [&](const unsigned char* from, int64_t bytes, unsigned char*) {
    check_access(from, 1, static_cast<int>(bytes), where);
  });
  begin(copy, address, "copy_box", where);
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
