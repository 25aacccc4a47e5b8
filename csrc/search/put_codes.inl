// From lanes to the bytes of blocks: scales as halves, codes of 32 columns as nibbles.
#pragma once

#include "formats/blocks.hpp"
#include "search/blocks.hpp"

namespace bitfold::search {
namespace {

// Any NaN is stored as x86 makes them.
BITFOLD_SIMD void store_scales(uint16_t* to, F scales) {
  store_half(to, select(equal(scales, scales), scales, as_float(splat(static_cast<int32_t>(0xffc00000)))));
}
BITFOLD_SIMD void put_half(Half& to, uint16_t from) { std::memcpy(&to, &from, sizeof(from)); }

// Codes of 4 bits, the second half of the columns in the high nibbles.
template <int Vectors>
BITFOLD_SIMD void put_nibbles(uint8_t* qs, const I (&codes)[Vectors]) {
  for (int v = 0; v < Vectors / 2; ++v) {
    store_bytes(qs + v * kLanes, bit_or(codes[v], shift_left<4>(codes[v + Vectors / 2])));
  }
}
// Codes of 5 bits: the highest of each apart, one bit after the other.
template <int Vectors>
BITFOLD_SIMD void put_fives(uint8_t* qh, uint8_t* qs, I (&codes)[Vectors]) {
  uint32_t high = 0;
  for (int v = 0; v < Vectors; ++v) {
    high |= bits(greater(codes[v], splat(15))) << v * kLanes;
    codes[v] = bit_and(codes[v], splat(15));
  }
  std::memcpy(qh, &high, sizeof(high));
  put_nibbles(qs, codes);
}

}  // namespace
}  // namespace bitfold::search
