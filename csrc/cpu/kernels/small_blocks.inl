// What the encoders of the blocks of 32 columns share: several of them in lanes, and how codes and scales are stored.
#pragma once

#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {
namespace {

constexpr int kSmall = 32;  // columns of a block
constexpr int kSmallVectors = kSmall / kLanes;

// kLanes blocks that follow each other; lanes past the last repeat it.
struct SmallBlocks {
  int64_t first, count;
  const float* x[kLanes];
  const float* importance[kLanes];  // null without
  int64_t row[kLanes];
};

template <class Each>
BITFOLD_SIMD void each_small_blocks(const EncodeBlocksArgs& a, Each each) {
  const int64_t row_blocks = a.k / kSmall, blocks = a.rows * row_blocks;
  int64_t row = 0, column = 0;  // of the next block
  SmallBlocks b;
  for (b.first = 0; b.first < blocks; b.first += kLanes) {
    b.count = smaller(kLanes, blocks - b.first);
    for (int lane = 0; lane < kLanes; ++lane) {
      b.x[lane] = a.w + (row * row_blocks + column) * kSmall;
      b.importance[lane] = a.importance == nullptr ? nullptr : a.importance + column * kSmall;
      b.row[lane] = row;
      if (b.first + lane + 1 >= blocks) continue;
      if (++column == row_blocks) column = 0, ++row;
    }
    each(b);
  }
}

// ---- Storing ----

// Any NaN is stored as x86 makes them.
BITFOLD_SIMD void store_scales(uint16_t* to, F scales) {
  store_half(to, select(equal(scales, scales), scales, as_float(splat(static_cast<int32_t>(0xffc00000)))));
}
BITFOLD_SIMD void put_half(Half& to, uint16_t from) { std::memcpy(&to, &from, sizeof(from)); }

// The numbers of one block to integers, a vector at a time.
template <class Code>
BITFOLD_SIMD void block_codes(const float* x, I (&codes)[kSmallVectors], Code code) {
  for (int v = 0; v < kSmallVectors; ++v) codes[v] = code(load(x + v * kLanes));
}

// Codes of 4 bits, the second half of the block in the high nibbles.
BITFOLD_SIMD void put_nibbles(uint8_t* qs, const I (&codes)[kSmallVectors]) {
  for (int v = 0; v < kSmallVectors / 2; ++v) {
    store_bytes(qs + v * kLanes, bit_or(codes[v], shift_left<4>(codes[v + kSmallVectors / 2])));
  }
}
// Codes of 5 bits: the highest of each apart.
BITFOLD_SIMD void put_fives(uint8_t* qh, uint8_t* qs, I (&codes)[kSmallVectors]) {
  uint32_t high = 0;
  for (int v = 0; v < kSmallVectors; ++v) {
    high |= bits(greater(codes[v], splat(15))) << v * kLanes;
    codes[v] = bit_and(codes[v], splat(15));
  }
  std::memcpy(qh, &high, sizeof(high));
  put_nibbles(qs, codes);
}

}  // namespace
}  // namespace bitfold::cpu
