// Streams of b-bit codes: one byte a code <-> packed, as docs/formats.md lays the bits. Both directions are exact
// inverses; packing sets the bits that are left over in the last byte to 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/codec.hpp"

namespace bitfold {

BITFOLD_INLINE void pack_codes(const uint8_t* codes, int64_t count, int bits, bool high_first, uint8_t* stream) {
  if (bits == 8) {
    std::memcpy(stream, codes, static_cast<size_t>(count));
    return;
  }
  int64_t i = 0;
  if (bits == 4) {
    const int even = high_first ? 4 : 0, odd = 4 - even;
    for (; i + 2 <= count; i += 2) *stream++ = static_cast<uint8_t>(codes[i] << even | codes[i + 1] << odd);
    if (i < count) *stream = static_cast<uint8_t>(codes[i] << even);
    return;
  }
  for (; i < count; i += 8) {  // eight codes are `bits` whole bytes
    const int64_t present = count - i < 8 ? count - i : 8;
    uint32_t word = 0;
    for (int64_t j = 0; j < present; ++j) word |= static_cast<uint32_t>(codes[i + j]) << (j * bits);
    for (int64_t byte = 0; byte < ceil_div(present * bits, 8); ++byte)
      *stream++ = static_cast<uint8_t>(word >> (8 * byte));
  }
}

BITFOLD_INLINE void unpack_codes(const uint8_t* stream, int64_t count, int bits, bool high_first, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(read_code(stream, i, bits, high_first));
}

}  // namespace bitfold
