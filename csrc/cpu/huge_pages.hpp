// Fresh memory costs more than decoding into it while it comes in pages of 4 KB.
#pragma once

#include <cstdint>

namespace bitfold::cpu {

// Asks for huge pages where [data, data + bytes) covers any. Advice: where it is not taken, nothing changes.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace bitfold::cpu
