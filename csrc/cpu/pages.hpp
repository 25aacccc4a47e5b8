// Outputs that are larger than the caches, and pages that the system gives when they are first written.
#pragma once

#include <cstdint>

namespace bitfold::cpu {

// Outputs of so many bytes go past the caches, a piece of about so many at a time.
inline constexpr int64_t kLargeBytes = 4 << 20;
inline constexpr int64_t kPieceBytes = 256 << 10;

// Where a range has no pages yet, asks for all of them at once, whose faults would each cost more than writing a page
// does, and returns true: the pages were cleared just now, and lie in the caches. False where it has them, or where
// the system doesn't say.
bool fetch_pages(void* begin, int64_t bytes);

}  // namespace bitfold::cpu
