// What chunks of blocks are opened with: words at any address, and small whole numbers as floats and halves.
#pragma once

#include "cuda/chunk.hpp"

namespace bitfold::cuda {

// ---- loads ----

template <int Align>
BITFOLD_DEVICE uint32_t word_at(const uint8_t* p) {
  if constexpr (Align >= 4) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (Align == 2) {
    const auto* halves = reinterpret_cast<const uint16_t*>(p);
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  } else {
    return p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
           static_cast<uint32_t>(p[3]) << 24;
  }
}
BITFOLD_DEVICE uint32_t half_bits_at(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }
BITFOLD_DEVICE float half_at(const uint8_t* p) { return ptx::half_to_float(*reinterpret_cast<const uint16_t*>(p)); }

// ---- whole numbers to floats and halves ----

// Byte `i` of a:b as a float, less `zero`: 2^23 + byte is exact.
BITFOLD_DEVICE float byte_to_float(uint32_t word, int i, float zero) {
  return ptx::uint_as_float(ptx::prmt(word, 0x4b000000u, 0x7440u | static_cast<uint32_t>(i))) - (0x1p23f + zero);
}
// (byte i - zero) 2^power, in both halves.
template <int Power>
BITFOLD_DEVICE uint32_t byte_to_halves(uint32_t word, int i, int zero) {
  constexpr uint32_t kExponent = 0x64u + static_cast<uint32_t>(4 * Power);
  const auto byte = static_cast<uint32_t>(i);
  const uint32_t sum = ptx::prmt(word, kExponent << 8 | kExponent, 0x4040u | byte | byte << 8);
  return ptx::hsub2(sum, 0x00010001u * ((kExponent << 8) + static_cast<uint32_t>(zero)));
}

}  // namespace bitfold::cuda
