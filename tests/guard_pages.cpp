// Aligned memory that ends where a page begins that nobody may touch: preloaded into a process of the tests
// (guard_pages.py), it turns a read or a write past the end of a tensor, or of a driver's scratch memory, into a fault
// at that instruction. Ends are rounded up to the alignment asked for. Memory comes filled with NaNs, so that what is
// read before it is written shows as well; memory that was given back is gone from the address space.
//
// Only functions that ask for an alignment are replaced: torch's and ours do, Python and the C library do not.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct Mapping {
  void* begin;
  size_t bytes;
};

// Addresses that are in use, in an open table: 0 was never used, kLeft is free again, kTaken is being written.
constexpr size_t kSlots = size_t{1} << 20;
constexpr uintptr_t kLeft = 1, kTaken = 2;
std::atomic<uintptr_t> addresses[kSlots];
Mapping mappings[kSlots];

size_t first_slot(uintptr_t address) { return (address >> 5) * 0x9e3779b97f4a7c15u >> 44; }
static_assert(kSlots == size_t{1} << (64 - 44));

void remember(void* memory, const Mapping& mapping) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  for (size_t tries = 0, i = first_slot(address); tries < kSlots; ++tries, i = (i + 1) % kSlots) {
    uintptr_t found = addresses[i];
    if (found > kLeft || !addresses[i].compare_exchange_strong(found, kTaken)) continue;
    mappings[i] = mapping;
    addresses[i] = address;
    return;
  }
  std::abort();
}

// What lies behind an address that `remember` was given, which is forgotten; nothing behind any other.
Mapping recall(void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  for (size_t tries = 0, i = first_slot(address); tries < kSlots; ++tries, i = (i + 1) % kSlots) {
    const uintptr_t found = addresses[i];
    if (found == 0) break;
    if (found != address) continue;
    const Mapping mapping = mappings[i];
    addresses[i] = kLeft;
    return mapping;
  }
  return {nullptr, 0};
}

void* allocate(size_t alignment, size_t size) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto round_up = [](size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; };
  const size_t bytes = round_up(size > 0 ? size : 1, alignment), used = round_up(bytes, page);
  // An alignment of more than a page is found within a mapping that is larger by as much.
  const size_t room = alignment > page ? alignment : 0;
  void* const begin =
      mmap(nullptr, room + used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  const auto from = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t end = room > 0 ? round_up(from, alignment) + used : from + used;
  mprotect(reinterpret_cast<void*>(end), from + room + used + page - end, PROT_NONE);
  void* const memory = reinterpret_cast<void*>(end - bytes);
  std::memset(memory, 0xff, bytes);
  remember(memory, {begin, room + used + page});
  return memory;
}

void (*others_free)(void*) = nullptr;
[[gnu::constructor]] void find_others() { others_free = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free")); }

}  // namespace

extern "C" {

int posix_memalign(void** memory, size_t alignment, size_t size) {
  void* const found = allocate(alignment, size);
  if (found == nullptr) return ENOMEM;
  *memory = found;
  return 0;
}

void* aligned_alloc(size_t alignment, size_t size) { return allocate(alignment, size); }
void* memalign(size_t alignment, size_t size) { return allocate(alignment, size); }

void free(void* memory) {
  if (memory == nullptr) return;
  const Mapping mapping = recall(memory);
  if (mapping.begin != nullptr) munmap(mapping.begin, mapping.bytes);
  else if (others_free != nullptr) others_free(memory);  // null while the process starts
}

}  // extern "C"
