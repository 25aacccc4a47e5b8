// The blocks of GGUF files: where the bits of each type lie, and what they mean, one block at a time. This is the floor
// that every faster path must agree with to the bit.
//
// Decoding is binary32, each operation rounded, in the order written. Everything in a block lies at single bytes, so
// that blocks may start anywhere.
#pragma once

#include "formats/codebooks.hpp"
#include "formats/format.hpp"
#include "formats/numeric.hpp"

namespace bitfold {

// A binary16 in two bytes, the lower first.
struct Half {
  uint8_t low, high;
  BITFOLD_INLINE float value() const { return half_to_float(bits()); }
  BITFOLD_INLINE uint16_t bits() const { return static_cast<uint16_t>(low | high << 8); }
  BITFOLD_INLINE void set(float value) {
    const uint16_t rounded = float_to_half(value);
    low = static_cast<uint8_t>(rounded);
    high = static_cast<uint8_t>(rounded >> 8);
  }
};

template <int Row>
struct Block;

// Nibbles of the 32-column types: byte j holds column j in its low nibble and column j + 16 in its high one.
template <>
struct Block<kQ4_0> {  // (c - 8) d
  Half d;
  uint8_t qs[16];
};
template <>
struct Block<kQ4_1> {  // c d + m
  Half d, m;
  uint8_t qs[16];
};
template <>
struct Block<kQ5_0> {  // (c - 16) d; bit i of qh is bit 4 of column i
  Half d;
  uint8_t qh[4], qs[16];
};
template <>
struct Block<kQ5_1> {  // c d + m
  Half d, m;
  uint8_t qh[4], qs[16];
};
template <>
struct Block<kQ8_0> {  // c d
  Half d;
  int8_t qs[32];
};
// The 2-bit plane of Q2_K and Q3_K: column 128 h + 32 k + l has bits 2k, 2k + 1 of byte 32 h + l.
template <>
struct Block<kQ2K> {  // (d s) c - (dmin m), s and m the nibbles of scales[column / 16]
  uint8_t scales[16], qs[64];
  Half d, dmin;
};
template <>
struct Block<kQ3K> {  // (d (s - 32)) (c - 4); bit i / 32 of hmask[i % 32] is bit 2 of column i
  uint8_t hmask[32], qs[64], scales[12];
  Half d;
};
// scales: 8 scales and 8 minima of 6 bits (scale_and_min). Byte 32 g + l holds column 64 g + l low, 64 g + 32 + l high.
template <>
struct Block<kQ4K> {  // (d s) c - (dmin m)
  Half d, dmin;
  uint8_t scales[12], qs[128];
};
template <>
struct Block<kQ5K> {  // as Q4_K; bit i / 32 of qh[i % 32] is bit 4 of column i
  Half d, dmin;
  uint8_t scales[12], qh[32], qs[128];
};
template <>
struct Block<kQ6K> {  // (d s) (c - 32), s of column / 16
  uint8_t ql[128], qh[64];
  int8_t scales[16];
  Half d;
};
template <>
struct Block<kIq4Nl> {  // d V[c]
  Half d;
  uint8_t qs[16];
};
template <>
struct Block<kIq4Xs> {  // (d (s - 32)) V[c], s of column / 32: four bits in scales_l, two in scales_h
  Half d;
  uint8_t scales_h[2], scales_l[4], qs[128];
};
template <>
struct Block<kMxfp4> {  // 2^(e - 128) V[c]
  uint8_t e, qs[16];
};

template <int Row>
inline constexpr bool kBlockSizeHolds = sizeof(Block<Row>) == static_cast<size_t>(kFormats[Row].block_bytes);
static_assert(kBlockSizeHolds<kQ4_0> && kBlockSizeHolds<kQ4_1> && kBlockSizeHolds<kQ5_0> && kBlockSizeHolds<kQ5_1> &&
              kBlockSizeHolds<kQ8_0> && kBlockSizeHolds<kQ2K> && kBlockSizeHolds<kQ3K> && kBlockSizeHolds<kQ4K> &&
              kBlockSizeHolds<kQ5K> && kBlockSizeHolds<kQ6K> && kBlockSizeHolds<kIq4Nl> && kBlockSizeHolds<kIq4Xs> &&
              kBlockSizeHolds<kMxfp4>);

// 2^(e - 128), sub-normal for e = 0 and 1.
BITFOLD_INLINE float mxfp4_step(uint8_t e) {
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

// Scale and minimum of sub-block j, 0 to 63, of the twelve bytes of Q4_K and Q5_K.
struct ScaleMin {
  int scale, min;
};
BITFOLD_INLINE ScaleMin scale_and_min(const uint8_t* s, int j) {
  if (j < 4) return {s[j] & 63, s[j + 4] & 63};
  return {(s[j + 4] & 15) | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4};
}
// Scale j of Q3_K, 0 to 63.
BITFOLD_INLINE int q3k_scale(const uint8_t* s, int j) {
  return (j < 8 ? s[j] & 15 : s[j - 8] >> 4) | (s[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
}
// Scale j of IQ4_XS, 0 to 63.
BITFOLD_INLINE int iq4xs_scale(const Block<kIq4Xs>& b, int j) {
  return (b.scales_l[j / 2] >> 4 * (j % 2) & 15) | (b.scales_h[j / 4] >> 2 * (j % 4) & 3) << 4;
}

BITFOLD_INLINE int nibble(const uint8_t* qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }
BITFOLD_INLINE int bit(const uint8_t* bytes, int i) { return bytes[i / 8] >> i % 8 & 1; }
BITFOLD_INLINE int two_bits(const uint8_t* qs, int i) { return qs[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3; }

// Column i of a block.
template <int Row>
BITFOLD_INLINE float block_value(const Block<Row>& b, int i) {
  if constexpr (Row == kQ4_0) {
    return static_cast<float>(nibble(b.qs, i) - 8) * b.d.value();
  } else if constexpr (Row == kQ4_1) {
    const float product = static_cast<float>(nibble(b.qs, i)) * b.d.value();
    return product + b.m.value();
  } else if constexpr (Row == kQ5_0) {
    return static_cast<float>((nibble(b.qs, i) | bit(b.qh, i) << 4) - 16) * b.d.value();
  } else if constexpr (Row == kQ5_1) {
    const float product = static_cast<float>(nibble(b.qs, i) | bit(b.qh, i) << 4) * b.d.value();
    return product + b.m.value();
  } else if constexpr (Row == kQ8_0) {
    return static_cast<float>(b.qs[i]) * b.d.value();
  } else if constexpr (Row == kQ2K) {
    const int scale = b.scales[i / 16];
    const float step = b.d.value() * static_cast<float>(scale & 15);
    const float min = b.dmin.value() * static_cast<float>(scale >> 4);
    const float product = step * static_cast<float>(two_bits(b.qs, i));
    return product - min;
  } else if constexpr (Row == kQ3K) {
    const float step = b.d.value() * static_cast<float>(q3k_scale(b.scales, i / 16) - 32);
    const int code = two_bits(b.qs, i) | (b.hmask[i % 32] >> i / 32 & 1) << 2;
    return step * static_cast<float>(code - 4);
  } else if constexpr (Row == kQ4K || Row == kQ5K) {
    const ScaleMin s = scale_and_min(b.scales, i / 32);
    int code = b.qs[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
    if constexpr (Row == kQ5K) code |= (b.qh[i % 32] >> i / 32 & 1) << 4;
    const float step = b.d.value() * static_cast<float>(s.scale);
    const float min = b.dmin.value() * static_cast<float>(s.min);
    const float product = step * static_cast<float>(code);
    return product - min;
  } else if constexpr (Row == kQ6K) {
    const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
    const int low = b.ql[64 * half + 32 * (quarter % 2) + l] >> quarter / 2 * 4 & 15;
    const int code = low | (b.qh[32 * half + l] >> 2 * quarter & 3) << 4;
    const float step = b.d.value() * static_cast<float>(b.scales[i / 16]);
    return step * static_cast<float>(code - 32);
  } else if constexpr (Row == kIq4Nl) {
    return b.d.value() * static_cast<float>(kIq4Values[static_cast<size_t>(nibble(b.qs, i))]);
  } else if constexpr (Row == kIq4Xs) {
    const float step = b.d.value() * static_cast<float>(iq4xs_scale(b, i / 32) - 32);
    return step * static_cast<float>(kIq4Values[static_cast<size_t>(nibble(b.qs + i / 32 * 16, i % 32))]);
  } else {
    static_assert(Row == kMxfp4);
    return static_cast<float>(kMxfp4Values[static_cast<size_t>(nibble(b.qs, i))]) * mxfp4_step(b.e);
  }
}

// Whether a scale or minimum of a block is no finite number, so that the block means none.
template <int Row>
BITFOLD_INLINE bool block_overflows(const Block<Row>& b) {
  constexpr auto odd = [](Half half) { return (half.bits() & 0x7c00) == 0x7c00; };
  if constexpr (Row == kMxfp4) return b.e == 255;
  else if constexpr (Row == kQ4_1 || Row == kQ5_1) return odd(b.d) || odd(b.m);
  else if constexpr (Row == kQ2K || Row == kQ4K || Row == kQ5K) return odd(b.d) || odd(b.dmin);
  else return odd(b.d);
}

}  // namespace bitfold
