// The blocks of GGUF files taken apart into scales and codes: a weight is step * level + offset, with a step and an
// offset for each span of columns, and the codes of a block can be put in the place of others.
#pragma once

#include "formats/blocks.hpp"

namespace bitfold {

// Columns with a step of their own.
template <int Row>
inline constexpr int kSpanColumns = Row == kQ2K || Row == kQ3K || Row == kQ6K ? 16 : 32;

// Levels, and the smallest of them where they are whole numbers in order.
template <int Row>
inline constexpr int kLevels = Row == kQ8_0    ? 255
                               : Row == kMxfp4 ? 15
                                               : 1 << kFormats[Row].bits;
template <int Row>
inline constexpr int kLowest = Row == kQ4_0   ? -8
                               : Row == kQ5_0 ? -16
                               : Row == kQ8_0 ? -127
                               : Row == kQ3K  ? -4
                               : Row == kQ6K  ? -32
                                              : 0;

// The stored code of level number `place`, ascending: MXFP4's has its sign apart, q8_0's is a signed byte.
template <int Row>
BITFOLD_INLINE uint8_t level_code(int place) {
  if constexpr (Row == kMxfp4) return static_cast<uint8_t>(place < 7 ? 15 - place : place - 7);
  else if constexpr (Row == kQ8_0) return static_cast<uint8_t>(place + kLowest<Row>);
  else return static_cast<uint8_t>(place);
}
template <int Row>
BITFOLD_INLINE float level_value(int place) {
  if constexpr (Row == kMxfp4) return static_cast<float>(kMxfp4Values[level_code<Row>(place)]);
  else if constexpr (Row == kIq4Nl || Row == kIq4Xs) return static_cast<float>(kIq4Values[static_cast<size_t>(place)]);
  else return static_cast<float>(place + kLowest<Row>);
}

struct SpanScale {
  float step;
  float offset;
};
// Of span `j` of a block: with them block_value is step * level + offset, each operation rounded.
template <int Row>
BITFOLD_INLINE SpanScale span_scale(const Block<Row>& b, int j) {
  if constexpr (Row == kQ4_1 || Row == kQ5_1) {
    return {b.d.value(), b.m.value()};
  } else if constexpr (Row == kQ2K) {
    return {b.d.value() * static_cast<float>(b.scales[j] & 15),
            -(b.dmin.value() * static_cast<float>(b.scales[j] >> 4))};
  } else if constexpr (Row == kQ3K) {
    return {b.d.value() * static_cast<float>(q3k_scale(b.scales, j) - 32), 0.0f};
  } else if constexpr (Row == kQ4K || Row == kQ5K) {
    const ScaleMin s = scale_and_min(b.scales, j);
    return {b.d.value() * static_cast<float>(s.scale), -(b.dmin.value() * static_cast<float>(s.min))};
  } else if constexpr (Row == kQ6K) {
    return {b.d.value() * static_cast<float>(b.scales[j]), 0.0f};
  } else if constexpr (Row == kIq4Xs) {
    return {b.d.value() * static_cast<float>(iq4xs_scale(b, j) - 32), 0.0f};
  } else if constexpr (Row == kMxfp4) {
    return {mxfp4_step(b.e), 0.0f};
  } else {
    return {b.d.value(), 0.0f};
  }
}

// `value` in the bits of `byte` from `shift` on that `mask` has.
BITFOLD_INLINE void put_bits(uint8_t& byte, int shift, int mask, int value) {
  byte = static_cast<uint8_t>((byte & ~(mask << shift)) | (value & mask) << shift);
}
BITFOLD_INLINE void put_nibble(uint8_t* qs, int i, int value) { put_bits(qs[i % 16], i < 16 ? 0 : 4, 15, value); }
BITFOLD_INLINE void put_bit(uint8_t* bytes, int i, int value) { put_bits(bytes[i / 8], i % 8, 1, value); }

// The code of column i, where block_value reads it.
template <int Row>
BITFOLD_INLINE void put_code(Block<Row>& b, int i, uint8_t code) {
  if constexpr (Row == kQ8_0) {
    b.qs[i] = static_cast<int8_t>(code);
  } else if constexpr (Row == kQ2K || Row == kQ3K) {
    put_bits(b.qs[i / 128 * 32 + i % 32], i % 128 / 32 * 2, 3, code);
    if constexpr (Row == kQ3K) put_bits(b.hmask[i % 32], i / 32, 1, code >> 2);
  } else if constexpr (Row == kQ4K || Row == kQ5K) {
    put_bits(b.qs[i / 64 * 32 + i % 32], i % 64 / 32 * 4, 15, code);
    if constexpr (Row == kQ5K) put_bits(b.qh[i % 32], i / 32, 1, code >> 4);
  } else if constexpr (Row == kQ6K) {
    const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
    put_bits(b.ql[64 * half + 32 * (quarter % 2) + l], quarter / 2 * 4, 15, code);
    put_bits(b.qh[32 * half + l], 2 * quarter, 3, code >> 4);
  } else if constexpr (Row == kIq4Xs) {
    put_nibble(b.qs + i / 32 * 16, i % 32, code);
  } else {
    put_nibble(b.qs, i, code);
    if constexpr (Row == kQ5_0 || Row == kQ5_1) put_bit(b.qh, i, code >> 4);
  }
}

}  // namespace bitfold
