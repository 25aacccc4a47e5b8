#include "cpu/pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bitfold::cpu {

#if defined(__linux__)

namespace {
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14; older headers lack the name
}

bool fetch_pages(void* begin, int64_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  unsigned char there = 1;  // of the last page
  if (from >= to || mincore(reinterpret_cast<void*>(to - page), page, &there) != 0 || (there & 1) != 0) return false;
  // An older system refuses; each page then comes by its own fault.
  madvise(reinterpret_cast<void*>(from), to - from, kPopulateWrite);
  return true;
}

#else

bool fetch_pages(void*, int64_t) { return false; }

#endif

}  // namespace bitfold::cpu
