// Spans of GGUF's blocks, from packed bytes to vectors: what decoding and multiplying share.
//
// A span is 16 columns for each lane: a block of 256 or half of one, or kLanes / 2 blocks of 32. Its codes become four
// vectors of bytes, four codes to a lane, in the order in which they come out of the block most cheaply. Only this is
// fixed: a quarter of a vector (four lanes, 16 bytes) holds 16 consecutive columns, one group, in order. A code is
// those bits of its byte that mask(i) has, for vector i; what the others hold is not said. All types are alike from
// there on: a weight is step * (code - kZero) - min, with a step (and, where kMin, a min) for every kSub columns.
#pragma once

#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {
namespace {

inline constexpr int64_t kSpan = 16 * kLanes;
inline constexpr int kVectors = 4;            // of a span's codes
inline constexpr int kQuarters = kLanes / 4;  // of a vector
inline constexpr int kGroups = kVectors * kQuarters;
inline constexpr bool kWhole = kSpan == 256;  // whether a span is a whole block of 256

template <int Row>
inline constexpr bool kLarge = kFormats[Row].group == 256;
template <int Row>
inline constexpr int64_t kSpanBlocks = kLarge<Row> ? 1 : kSpan / 32;  // blocks that a span reaches into
template <int Row>
inline constexpr int64_t kSpanBytes = kFormats[Row].block_bytes * kSpan / kFormats[Row].group;
template <int Row>
constexpr int64_t blocks_row_bytes(int64_t k) {
  return k / kFormats[Row].group * kFormats[Row].block_bytes;
}

// A span's first block, and which half of it is meant where that is too large for a span.
template <int Row>
struct Place {
  const Block<Row>* block;
  int half;
};
template <int Row>
BITFOLD_SIMD Place<Row> span_at(const uint8_t* row, int64_t span) {
  const auto* blocks = reinterpret_cast<const Block<Row>*>(row);
  if constexpr (kLarge<Row> && !kWhole) return {blocks + span / 2, static_cast<int>(span % 2)};
  else return {blocks + span * kSpanBlocks<Row>, 0};
}

// Asks for what lies `ahead` bytes after a span.
template <int Row>
BITFOLD_SIMD void prefetch_span(const uint8_t* row, int64_t span, int64_t ahead) {
  const uint8_t* from = row + span * kSpanBytes<Row> + ahead;
  for (int64_t byte = 0; byte < kSpanBytes<Row>; byte += 64) prefetch(from + byte);
}

// ---- orders: the group that quarter q of vector i holds ----

struct ByPlane {  // 32 bytes hold columns 128 h + 32 i + (0 .. 31) of half h, bits i; another half lies 8 groups on
  static constexpr int group(int i, int q) { return 8 * (q / 2) + 2 * i + q % 2; }
};
struct ByNibble {  // 32 bytes hold 32 columns low, and the next 32 high
  static constexpr int group(int i, int q) { return kLanes / 2 * (i / 2) + 4 * (q / 2) + 2 * (i % 2) + q % 2; }
};
struct ByHalf {  // 16 bytes hold 16 columns low, and the next 16 high
  static constexpr int group(int i, int q) { return 2 * (kQuarters * (i / 2) + q) + i % 2; }
};
struct InOrder {
  static constexpr int group(int i, int q) { return kQuarters * i + q; }
};

// ---- bytes ----

BITFOLD_SIMD I splat_byte(int value) { return splat(static_cast<int32_t>(0x01010101u * static_cast<uint32_t>(value))); }
constexpr int lowest_bit(int mask) { return mask % 2 != 0 ? 0 : 1 + lowest_bit(mask / 2); }
BITFOLD_SIMD I low_nibbles(I bytes) { return bit_and(bytes, splat_byte(15)); }
BITFOLD_SIMD I high_nibbles(I bytes) { return bit_and(shift_right<4>(bytes), splat_byte(15)); }
// Bits From .. of every byte moved to bits To .., and all others cleared; Mask has them where they arrive.
template <int From, int To, int Mask>
BITFOLD_SIMD I move_bits(I bytes) {
  if constexpr (From < To) return bit_and(shift_left<To - From>(bytes), splat_byte(Mask));
  else return bit_and(shift_right<From - To>(bytes), splat_byte(Mask));
}
// 32 bytes that both halves of a block share, each half's bits moved down to the lowest: `apart` bits lie between them.
BITFOLD_SIMD I load_shared(const uint8_t* p, int half, int apart) {
  int32_t counts[kLanes];
  for (int l = 0; l < kLanes; ++l) counts[l] = apart * (kWhole ? l / 8 : half);
  return shift_right(load_halves(p, 0), load_int(counts));
}

BITFOLD_SIMD uint64_t read64(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}
BITFOLD_SIMD uint32_t read32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// A half in each of a span's blocks of 32 columns, as floats.
template <int Row>
BITFOLD_SIMD F block_halves(const Block<Row>* blocks, Half Block<Row>::* field) {
  uint64_t words[2] = {};
  for (int b = 0; b < kLanes / 2; ++b) words[b / 4] |= uint64_t{(blocks[b].*field).bits()} << 16 * (b % 4);
  return widen_halves(words[0], words[1]);
}
template <int Row>
BITFOLD_SIMD F block_half(const Block<Row>* block, Half Block<Row>::* field) {
  return splat_half((block->*field).bits());
}

// Nibbles: every other vector has the low ones of its bytes, and the next the high ones of the same.
struct Nibbles {
  static constexpr int mask(int i) { return i % 2 == 0 ? 0x0f : 0xf0; }
};
template <int Mask>
struct Masked {
  static constexpr int mask(int) { return Mask; }
};
// Those of 128 bytes, or of the half of them that is a span's.
BITFOLD_SIMD void nibbles_of(const uint8_t* qs, int half, I (&v)[kVectors]) {
  for (int pair = 0; pair < 2; ++pair) {
    v[2 * pair] = v[2 * pair + 1] = load_words<8>(qs + 64 * half + 4 * kLanes * pair);
  }
}
// Those of a span's blocks of 32 columns.
template <int Row>
BITFOLD_SIMD void block_nibbles(const Block<Row>* blocks, I (&v)[kVectors]) {
  for (int pair = 0; pair < 2; ++pair) {
    v[2 * pair] = v[2 * pair + 1] = load_quarters(blocks[kQuarters * pair].qs, sizeof(Block<Row>));
  }
}
BITFOLD_SIMD void move_nibbles_down(I (&v)[kVectors]) {
  for (int i = 0; i < kVectors; ++i) v[i] = i % 2 == 0 ? low_nibbles(v[i]) : high_nibbles(v[i]);
}
// With their fifth bits, at bit 4.
template <int Row>
BITFOLD_SIMD void add_fifth_bits(const Block<Row>* blocks, I (&v)[kVectors]) {
  move_nibbles_down(v);
  for (int pair = 0; pair < 2; ++pair) {
    uint64_t low = 0, high = 0;
    for (int q = 0; q < kQuarters; ++q) {
      const uint64_t bits = read32(blocks[kQuarters * pair + q].qh);
      low |= (bits & 0xffff) << 16 * q;
      high |= (bits >> 16) << 16 * q;
    }
    v[2 * pair] = bit_or(v[2 * pair], spread_bits(low));
    v[2 * pair + 1] = bit_or(v[2 * pair + 1], spread_bits(high));
  }
}

// A codebook of signed bytes, moved up by `zero`.
struct Raised {
  alignas(16) uint8_t values[16];
  int zero;
  constexpr Raised(const std::array<int8_t, 16>& codebook, int up) : values{}, zero(up) {
    for (size_t i = 0; i < 16; ++i) values[i] = static_cast<uint8_t>(codebook[i] + up);
  }
};
inline constexpr Raised kRaisedIq4(kIq4Values, 128), kRaisedMxfp4(kMxfp4Values, 12);
BITFOLD_SIMD void look_up(const Raised& raised, I (&v)[kVectors]) {
  const Bytes16 table = load_bytes16(raised.values);
  move_nibbles_down(v);
  for (I& codes : v) codes = lookup_bytes(table, codes);
}

// The eight scales and eight minima of six bits of Q4_K and Q5_K, one to a byte.
struct ScalesMins {
  uint64_t scales, mins;
};
BITFOLD_SIMD ScalesMins scales_and_mins(const uint8_t* s) {
  const uint32_t a = read32(s), b = read32(s + 4), c = read32(s + 8);
  const uint32_t scales = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
  const uint32_t mins = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
  return {(a & 0x3f3f3f3f) | uint64_t{scales} << 32, (b & 0x3f3f3f3f) | uint64_t{mins} << 32};
}

// ---- the types ----

template <int Row>
struct Span;

template <int Row>
struct KNibbles : ByNibble {  // Q4_K, and what Q5_K has of it
  static constexpr int kSub = 32;
  static constexpr bool kMin = true;
  BITFOLD_SIMD static void scales(Place<Row> at, F* steps, F* mins) {
    const ScalesMins s = scales_and_mins(at.block->scales);
    *steps = mul(block_half(at.block, &Block<Row>::d), to_float(widen_bytes(s.scales >> 32 * at.half, 0)));
    *mins = mul(block_half(at.block, &Block<Row>::dmin), to_float(widen_bytes(s.mins >> 32 * at.half, 0)));
  }
};
template <>
struct Span<kQ4K> : KNibbles<kQ4K>, Nibbles {
  static constexpr int kZero = 0;
  BITFOLD_SIMD static void bytes(Place<kQ4K> at, I (&v)[kVectors]) { nibbles_of(at.block->qs, at.half, v); }
};
template <>
struct Span<kQ5K> : KNibbles<kQ5K>, Masked<0x1f> {
  static constexpr int kZero = 0;
  BITFOLD_SIMD static void bytes(Place<kQ5K> at, I (&v)[kVectors]) {
    nibbles_of(at.block->qs, at.half, v);
    move_nibbles_down(v);
    constexpr int kNext = kLanes / 4;  // bits from a pair of vectors to the next
    const I high = load_shared(at.block->qh, at.half, kWhole ? 2 : 4);
    v[0] = bit_or(v[0], move_bits<0, 4, 16>(high));
    v[1] = bit_or(v[1], move_bits<1, 4, 16>(high));
    v[2] = bit_or(v[2], move_bits<kNext, 4, 16>(high));
    v[3] = bit_or(v[3], move_bits<kNext + 1, 4, 16>(high));
  }
};

BITFOLD_SIMD I two_bit_plane(const uint8_t* qs, int half) { return load_halves(qs + 32 * half, 32); }
template <>
struct Span<kQ2K> : ByPlane {
  static constexpr int kSub = 16, kZero = 0;
  static constexpr bool kMin = true;
  static constexpr int mask(int i) { return 3 << 2 * i; }
  BITFOLD_SIMD static void bytes(Place<kQ2K> at, I (&v)[kVectors]) {
    for (I& bytes : v) bytes = two_bit_plane(at.block->qs, at.half);
  }
  BITFOLD_SIMD static void scales(Place<kQ2K> at, F* steps, F* mins) {
    const I both = unpack<8, false>(at.block->scales + 8 * at.half);
    *steps = mul(block_half(at.block, &Block<kQ2K>::d), to_float(bit_and(both, splat(int32_t{15}))));
    *mins = mul(block_half(at.block, &Block<kQ2K>::dmin), to_float(shift_right<4>(both)));
  }
};
template <>
struct Span<kQ3K> : ByPlane, Masked<0x07> {
  static constexpr int kSub = 16, kZero = 4;
  static constexpr bool kMin = false;
  BITFOLD_SIMD static void bytes(Place<kQ3K> at, I (&v)[kVectors]) {
    const I low = two_bit_plane(at.block->qs, at.half), high = load_shared(at.block->hmask, at.half, 4);
    v[0] = bit_or(move_bits<0, 0, 3>(low), move_bits<0, 2, 4>(high));
    v[1] = bit_or(move_bits<2, 0, 3>(low), move_bits<1, 2, 4>(high));
    v[2] = bit_or(move_bits<4, 0, 3>(low), move_bits<2, 2, 4>(high));
    v[3] = bit_or(move_bits<6, 0, 3>(low), move_bits<3, 2, 4>(high));
  }
  BITFOLD_SIMD static void scales(Place<kQ3K> at, F* steps, F*) {
    const uint8_t* s = at.block->scales;
    const uint64_t low = read64(s), top = read32(s + 8);
    const uint64_t two = top | top << 32;  // of scales 0 .. 3 in bits 0, 1, of 4 .. 7 in bits 2, 3 ...
    const auto with_top = [&](uint64_t nibbles, uint64_t even, uint64_t odd) {
      constexpr uint64_t kTwo = 0x03030303;
      return (nibbles & 0x0f0f0f0f0f0f0f0f) | ((two >> even & kTwo) | (two >> odd & kTwo << 32)) << 4;
    };
    const uint64_t first = with_top(low, 0, 2), second = with_top(low >> 4, 4, 6);
    const I scale = kWhole ? widen_bytes(first, second) : widen_bytes(at.half == 0 ? first : second, 0);
    *steps = mul(block_half(at.block, &Block<kQ3K>::d), to_float(sub(scale, splat(int32_t{32}))));
  }
};
template <>
struct Span<kQ6K> : ByPlane, Masked<0x3f> {
  static constexpr int kSub = 16, kZero = 32;
  static constexpr bool kMin = false;
  BITFOLD_SIMD static void bytes(Place<kQ6K> at, I (&v)[kVectors]) {
    const uint8_t* low = at.block->ql + 64 * at.half;
    const I a = load_halves(low, 64), b = load_halves(low + 32, 64);
    const I high = load_halves(at.block->qh + 32 * at.half, 32);
    v[0] = bit_or(low_nibbles(a), move_bits<0, 4, 48>(high));
    v[1] = bit_or(low_nibbles(b), move_bits<2, 4, 48>(high));
    v[2] = bit_or(high_nibbles(a), move_bits<4, 4, 48>(high));
    v[3] = bit_or(high_nibbles(b), move_bits<6, 4, 48>(high));
  }
  BITFOLD_SIMD static void scales(Place<kQ6K> at, F* steps, F*) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(at.block->scales) + 8 * at.half;
    const I scale = shift_right_signed<24>(shift_left<24>(unpack<8, false>(bytes)));
    *steps = mul(block_half(at.block, &Block<kQ6K>::d), to_float(scale));
  }
};
template <>
struct Span<kIq4Xs> : ByHalf, Masked<0xff> {
  static constexpr int kSub = 32, kZero = kRaisedIq4.zero;
  static constexpr bool kMin = false;
  BITFOLD_SIMD static void bytes(Place<kIq4Xs> at, I (&v)[kVectors]) {
    nibbles_of(at.block->qs, at.half, v);
    look_up(kRaisedIq4, v);
  }
  BITFOLD_SIMD static void scales(Place<kIq4Xs> at, F* steps, F*) {
    uint64_t low = read32(at.block->scales_l), high = at.block->scales_h[0] | at.block->scales_h[1] << 8;
    low = (low | low << 16) & 0x0000ffff0000ffff;
    low = (low | low << 8) & 0x00ff00ff00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f0f0f0f0f;
    high = (high | high << 24) & 0x000000ff000000ff;
    high = (high | high << 12) & 0x000f000f000f000f;
    high = (high | high << 6) & 0x0303030303030303;
    const I scale = widen_bytes((low | high << 4) >> 32 * at.half, 0);
    *steps = mul(block_half(at.block, &Block<kIq4Xs>::d), to_float(sub(scale, splat(int32_t{32}))));
  }
};

// Blocks of 32 columns: a step, and perhaps a minimum, which these types add.
template <int Row>
struct Small {
  static constexpr int kSub = 32;
  static constexpr bool kMin = false;
  BITFOLD_SIMD static void scales(Place<Row> at, F* steps, F*) { *steps = block_halves(at.block, &Block<Row>::d); }
};
template <int Row>
struct SmallMin {
  static constexpr int kSub = 32;
  static constexpr bool kMin = true;
  BITFOLD_SIMD static void scales(Place<Row> at, F* steps, F* mins) {
    *steps = block_halves(at.block, &Block<Row>::d);
    *mins = sub(splat(-0.0f), block_halves(at.block, &Block<Row>::m));
  }
};
template <>
struct Span<kQ4_0> : Small<kQ4_0>, ByHalf, Nibbles {
  static constexpr int kZero = 8;
  BITFOLD_SIMD static void bytes(Place<kQ4_0> at, I (&v)[kVectors]) { block_nibbles(at.block, v); }
};
template <>
struct Span<kQ4_1> : SmallMin<kQ4_1>, ByHalf, Nibbles {
  static constexpr int kZero = 0;
  BITFOLD_SIMD static void bytes(Place<kQ4_1> at, I (&v)[kVectors]) { block_nibbles(at.block, v); }
};
template <>
struct Span<kQ5_0> : Small<kQ5_0>, ByHalf, Masked<0x1f> {
  static constexpr int kZero = 16;
  BITFOLD_SIMD static void bytes(Place<kQ5_0> at, I (&v)[kVectors]) {
    block_nibbles(at.block, v);
    add_fifth_bits(at.block, v);
  }
};
template <>
struct Span<kQ5_1> : SmallMin<kQ5_1>, ByHalf, Masked<0x1f> {
  static constexpr int kZero = 0;
  BITFOLD_SIMD static void bytes(Place<kQ5_1> at, I (&v)[kVectors]) {
    block_nibbles(at.block, v);
    add_fifth_bits(at.block, v);
  }
};
template <>
struct Span<kQ8_0> : Small<kQ8_0>, InOrder, Masked<0xff> {
  static constexpr int kZero = 128;
  BITFOLD_SIMD static void bytes(Place<kQ8_0> at, I (&v)[kVectors]) {
    constexpr int kEach = kLanes / 8;  // blocks of a vector
    for (int i = 0; i < kVectors; ++i) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(at.block[kEach * i].qs);
      v[i] = bit_xor(load_halves(bytes, sizeof(Block<kQ8_0>)), splat_byte(128));
    }
  }
};
template <>
struct Span<kIq4Nl> : Small<kIq4Nl>, ByHalf, Masked<0xff> {
  static constexpr int kZero = kRaisedIq4.zero;
  BITFOLD_SIMD static void bytes(Place<kIq4Nl> at, I (&v)[kVectors]) {
    block_nibbles(at.block, v);
    look_up(kRaisedIq4, v);
  }
};
BITFOLD_SIMD F fp4_steps(I e) {  // mxfp4_step in lanes
  const I normal = shift_left<23>(sub(e, splat(int32_t{1})));
  const I subnormal = shift_left<21>(add(e, splat(int32_t{1})));
  return as_float(select(greater(splat(int32_t{2}), e), subnormal, normal));
}
template <>
struct Span<kMxfp4> : ByHalf, Masked<0x1f> {
  static constexpr int kSub = 32, kZero = kRaisedMxfp4.zero;
  static constexpr bool kMin = false;
  BITFOLD_SIMD static void bytes(Place<kMxfp4> at, I (&v)[kVectors]) {
    block_nibbles(at.block, v);
    look_up(kRaisedMxfp4, v);
  }
  BITFOLD_SIMD static void scales(Place<kMxfp4> at, F* steps, F*) {
    uint64_t exponents = 0;
    for (int b = 0; b < kLanes / 2; ++b) exponents |= uint64_t{at.block[b].e} << 8 * b;
    *steps = fp4_steps(widen_bytes(exponents, 0));
  }
};

// A span's codes alone in their bytes.
template <int Mask>
BITFOLD_SIMD I alone(I bytes) {
  constexpr int kDown = lowest_bit(Mask), kMask = Mask >> kDown;
  if constexpr (kMask == 0xff) return bytes;
  else return bit_and(shift_right<kDown>(bytes), splat_byte(kMask));
}
template <int Row>
BITFOLD_SIMD void codes_of(Place<Row> at, I (&v)[kVectors]) {
  using S = Span<Row>;
  S::bytes(at, v);
  v[0] = alone<S::mask(0)>(v[0]);
  v[1] = alone<S::mask(1)>(v[1]);
  v[2] = alone<S::mask(2)>(v[2]);
  v[3] = alone<S::mask(3)>(v[3]);
}

// The last span of a row may lack blocks: it is then copied to where they are zero.
template <int Row>
struct SpanCopy {
  Block<Row> blocks[kSpanBlocks<Row>];
  BITFOLD_SIMD Place<Row> span_in(const uint8_t* row, int64_t k, int64_t span) {
    const int64_t missing = (span + 1) * kSpan - k;
    if (missing <= 0) return span_at<Row>(row, span);
    std::memset(blocks, 0, sizeof(blocks));
    const int64_t there = (kSpan - missing) / 32;
    std::memcpy(blocks, span_at<Row>(row, span).block, static_cast<size_t>(there) * sizeof(blocks[0]));
    return {blocks, 0};
  }
};

// Where the steps (and minima) of the lanes of each vector lie among those of their span.
template <int Row>
struct Places {
  I at[kVectors];
  BITFOLD_SIMD Places() {
    for (int i = 0; i < kVectors; ++i) {
      int32_t lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = Span<Row>::group(i, l / 4) * 16 / Span<Row>::kSub;
      at[i] = load_int(lanes);
    }
  }
};

}  // namespace
}  // namespace bitfold::cpu
