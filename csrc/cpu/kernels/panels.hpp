// Panels of GGUF's blocks: one block of each of kLanes rows, taken apart for products of bytes.
//
// Every row has a lane. Packed bytes come in sixteen of a row at a time and are transposed to there, four bytes to a
// lane; what follows, for codes, scales and minima alike, is done for all rows at once. In a panel the codes are
// unsigned bytes in the order of their columns. A weight is then d * scale * (code - kZero) - m * min, with a scale
// (and, where kMin, a min) for every kSub columns; blocks of 32 columns have no scales, and add their m.
#pragma once

#include <cstddef>

#include "cpu/kernels/spans.hpp"

namespace bitfold::cpu {
namespace {

// Which numbers a type has, and how they come out of its blocks.
template <int Row>
struct Packed;

template <int Row>
struct Panel {
  using P = Packed<Row>;
  static constexpr int kColumns = static_cast<int>(kFormats[Row].group);
  static constexpr int kSubs = kColumns / P::kSub;
  static constexpr int kScales = kLarge<Row> ? kSubs : 1;
  static constexpr int kMinPairs = kLarge<Row> && P::kMin ? kSubs / 2 : 1;

  alignas(64) int32_t codes[kColumns / 4][kLanes];
  alignas(64) float scales[kScales][kLanes];
  alignas(64) int32_t mins[kMinPairs][kLanes];  // two halves each, in the order of min_place
  alignas(64) float d[kLanes];
  alignas(64) float m[kLanes];

  BITFOLD_SIMD void put(int column, I bytes) { store_int(codes[column / 4], bytes); }
  // Four scales, a byte each: unsigned, less Zero.
  template <int Zero = 0>
  BITFOLD_SIMD void put_scales(int first, I bytes) {
    put_scale<Zero>(first, bit_and(bytes, splat(int32_t{255})));
    put_scale<Zero>(first + 1, bit_and(shift_right<8>(bytes), splat(int32_t{255})));
    put_scale<Zero>(first + 2, bit_and(shift_right<16>(bytes), splat(int32_t{255})));
    put_scale<Zero>(first + 3, shift_right<24>(bytes));
  }
  template <int Zero>
  BITFOLD_SIMD void put_scale(int at, I scale) {
    if constexpr (Zero != 0) scale = sub(scale, splat(int32_t{Zero}));
    store(scales[at], to_float(scale));
  }
  // Four minima, a byte each.
  BITFOLD_SIMD void put_mins(int first, I bytes) {
    store_int(mins[first / 2], bit_and(bytes, splat(int32_t{0x00ff00ff})));
    store_int(mins[first / 2 + 1], bit_and(shift_right<8>(bytes), splat(int32_t{0x00ff00ff})));
  }
  // A half in each half of a lane.
  BITFOLD_SIMD void put_d_and_m(I halves) {
    store(d, low_halves(halves));
    store(m, low_halves(shift_right<16>(halves)));
  }
};
// Where the minimum of sub-block j stands among the halves of Panel::mins: bytes 0 and 2 of a lane are a pair, 1 and 3.
constexpr int min_place(int j) { return j / 4 * 4 + j % 2 * 2 + j % 4 / 2; }

// The same block of kLanes rows, and memory to ask for while they are read: what will be read next.
struct Rows {
  const uint8_t* block;
  int64_t stride;
  const uint8_t* ahead;

  // Bytes at .. at + 15 of the blocks.
  BITFOLD_SIMD void sixteen(int64_t at, I (&v)[4]) {
    for (int i = 0; i < 4; ++i) v[i] = load_quarters(block + at + i * stride, 4 * stride);
    transpose_quarters(v);
    for (int line = 0; line < kLanes * 16; line += 64) prefetch(ahead + line);
    ahead += kLanes * 16;
  }
  BITFOLD_SIMD F half(int64_t at) const {
    uint16_t bits[kLanes];
    for (int l = 0; l < kLanes; ++l) std::memcpy(bits + l, block + at + l * stride, sizeof(bits[0]));
    return load_half(bits);
  }
  BITFOLD_SIMD I byte(int64_t at) const {
    uint8_t bytes[kLanes];
    for (int l = 0; l < kLanes; ++l) bytes[l] = block[at + l * stride];
    return unpack<8, false>(bytes);
  }
};

// ---- blocks of 256 columns ----

// Header of Q4_K and Q5_K: d, m, and eight scales and minima of six bits in twelve bytes.
template <int Row>
BITFOLD_SIMD void open_k_header(Rows& rows, Panel<Row>& to) {
  static_assert(offsetof(Block<Row>, dmin) == 2 && offsetof(Block<Row>, scales) == 4);
  I head[4];
  rows.sixteen(0, head);
  const I a = head[1], b = head[2], c = head[3];
  to.put_d_and_m(head[0]);
  to.put_scales(0, bit_and(a, splat_byte(63)));
  to.put_scales(4, bit_or(low_nibbles(c), move_bits<6, 4, 48>(a)));
  to.put_mins(0, bit_and(b, splat_byte(63)));
  to.put_mins(4, bit_or(high_nibbles(c), move_bits<6, 4, 48>(b)));
}

template <>
struct Packed<kQ4K> {
  static constexpr int kSub = 32, kZero = 0;
  static constexpr bool kMin = true, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ4K>& to) {
    open_k_header(rows, to);
    for (int part = 0; part < 8; ++part) {
      I v[4];
      rows.sixteen(offsetof(Block<kQ4K>, qs) + 16 * part, v);
      const int column = part / 2 * 64 + part % 2 * 16;
      for (int i = 0; i < 4; ++i) {
        to.put(column + 4 * i, low_nibbles(v[i]));
        to.put(column + 32 + 4 * i, high_nibbles(v[i]));
      }
    }
  }
};

template <>
struct Packed<kQ5K> {
  static constexpr int kSub = 32, kZero = 0;
  static constexpr bool kMin = true, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ5K>& to) {
    open_k_header(rows, to);
    for (int side = 0; side < 2; ++side) {  // 16 of every 32 columns
      I high[4];
      rows.sixteen(offsetof(Block<kQ5K>, qh) + 16 * side, high);
      for (int g = 0; g < 4; ++g) {
        I v[4];
        rows.sixteen(offsetof(Block<kQ5K>, qs) + 32 * g + 16 * side, v);
        const int column = 64 * g + 16 * side;
        for (int i = 0; i < 4; ++i) {
          to.put(column + 4 * i, bit_or(low_nibbles(v[i]), move_bits<0, 4, 16>(high[i])));
          to.put(column + 32 + 4 * i, bit_or(high_nibbles(v[i]), move_bits<1, 4, 16>(high[i])));
          high[i] = shift_right<2>(high[i]);
        }
      }
    }
  }
};

template <>
struct Packed<kQ2K> {
  static constexpr int kSub = 16, kZero = 0;
  static constexpr bool kMin = true, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ2K>& to) {
    using B = Block<kQ2K>;
    I v[4];
    rows.sixteen(offsetof(B, scales), v);
    for (int i = 0; i < 4; ++i) {
      to.put_scales(4 * i, low_nibbles(v[i]));
      to.put_mins(4 * i, high_nibbles(v[i]));
    }
    for (int part = 0; part < 4; ++part) {
      rows.sixteen(offsetof(B, qs) + 16 * part, v);
      const int column = part / 2 * 128 + part % 2 * 16;
      for (int i = 0; i < 4; ++i) {
        to.put(column + 4 * i, move_bits<0, 0, 3>(v[i]));
        to.put(column + 32 + 4 * i, move_bits<2, 0, 3>(v[i]));
        to.put(column + 64 + 4 * i, move_bits<4, 0, 3>(v[i]));
        to.put(column + 96 + 4 * i, move_bits<6, 0, 3>(v[i]));
      }
    }
    rows.sixteen(sizeof(B) - 16, v);
    static_assert(offsetof(B, d) == sizeof(B) - 4);
    to.put_d_and_m(v[3]);
  }
};

template <>
struct Packed<kQ3K> {
  static constexpr int kSub = 16, kZero = 4;
  static constexpr bool kMin = false, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ3K>& to) {
    using B = Block<kQ3K>;
    I v[4];
    for (int side = 0; side < 2; ++side) {  // 16 of every 32 columns
      I high[4];
      rows.sixteen(offsetof(B, hmask) + 16 * side, high);
      for (int half = 0; half < 2; ++half) {
        rows.sixteen(offsetof(B, qs) + 32 * half + 16 * side, v);
        const int column = 128 * half + 16 * side;
        for (int i = 0; i < 4; ++i) {
          to.put(column + 4 * i, bit_or(move_bits<0, 0, 3>(v[i]), move_bits<0, 2, 4>(high[i])));
          to.put(column + 32 + 4 * i, bit_or(move_bits<2, 0, 3>(v[i]), move_bits<1, 2, 4>(high[i])));
          to.put(column + 64 + 4 * i, bit_or(move_bits<4, 0, 3>(v[i]), move_bits<2, 2, 4>(high[i])));
          to.put(column + 96 + 4 * i, bit_or(move_bits<6, 0, 3>(v[i]), move_bits<3, 2, 4>(high[i])));
          high[i] = shift_right<4>(high[i]);
        }
      }
    }
    rows.sixteen(sizeof(B) - 16, v);  // two bytes of codes, the scales, d
    static_assert(offsetof(B, scales) == sizeof(B) - 14);
    const auto two_on = [&](int i) { return bit_or(shift_right<16>(v[i]), shift_left<16>(v[i + 1])); };
    const I a = two_on(0), b = two_on(1), c = two_on(2);
    to.put_scales<32>(0, bit_or(low_nibbles(a), move_bits<0, 4, 48>(c)));
    to.put_scales<32>(4, bit_or(low_nibbles(b), move_bits<2, 4, 48>(c)));
    to.put_scales<32>(8, bit_or(high_nibbles(a), move_bits<4, 4, 48>(c)));
    to.put_scales<32>(12, bit_or(high_nibbles(b), move_bits<6, 4, 48>(c)));
    store(to.d, low_halves(shift_right<16>(v[3])));
  }
};

template <>
struct Packed<kQ6K> {
  static constexpr int kSub = 16, kZero = 32;
  static constexpr bool kMin = false, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ6K>& to) {
    using B = Block<kQ6K>;
    for (int part = 0; part < 4; ++part) {  // half, 16 of every 32 columns
      I a[4], b[4], high[4];
      rows.sixteen(offsetof(B, ql) + part / 2 * 64 + part % 2 * 16, a);
      rows.sixteen(offsetof(B, ql) + part / 2 * 64 + part % 2 * 16 + 32, b);
      rows.sixteen(offsetof(B, qh) + 16 * part, high);
      const int column = part / 2 * 128 + part % 2 * 16;
      for (int i = 0; i < 4; ++i) {
        to.put(column + 4 * i, bit_or(low_nibbles(a[i]), move_bits<0, 4, 48>(high[i])));
        to.put(column + 32 + 4 * i, bit_or(low_nibbles(b[i]), move_bits<2, 4, 48>(high[i])));
        to.put(column + 64 + 4 * i, bit_or(high_nibbles(a[i]), move_bits<4, 4, 48>(high[i])));
        to.put(column + 96 + 4 * i, bit_or(high_nibbles(b[i]), move_bits<6, 4, 48>(high[i])));
      }
    }
    I scales[4];
    rows.sixteen(offsetof(B, scales), scales);
    for (int i = 0; i < 4; ++i) to.put_scales<128>(4 * i, bit_xor(scales[i], splat_byte(128)));  // they are signed
    store(to.d, rows.half(offsetof(B, d)));
  }
};

template <>
struct Packed<kIq4Xs> {
  static constexpr int kSub = 32, kZero = kRaisedIq4.zero;
  static constexpr bool kMin = false, kWide = true;
  BITFOLD_SIMD static void open(Rows rows, Panel<kIq4Xs>& to) {
    using B = Block<kIq4Xs>;
    static_assert(offsetof(B, scales_h) == 2 && offsetof(B, scales_l) == 4);
    I v[4];
    rows.sixteen(0, v);
    store(to.d, low_halves(v[0]));
    I low = v[1], high = shift_right<12>(v[0]);
    for (int j = 0; j < 8; ++j) {
      const I scale = bit_or(bit_and(low, splat(int32_t{15})), bit_and(high, splat(int32_t{48})));
      to.put_scale<32>(j, scale);
      low = shift_right<4>(low);
      high = shift_right<2>(high);
    }
    const Bytes16 table = load_bytes16(kRaisedIq4.values);
    for (int j = 0; j < 8; ++j) {
      rows.sixteen(offsetof(B, qs) + 16 * j, v);
      for (int i = 0; i < 4; ++i) {
        to.put(32 * j + 4 * i, lookup_bytes(table, low_nibbles(v[i])));
        to.put(32 * j + 16 + 4 * i, lookup_bytes(table, high_nibbles(v[i])));
      }
    }
  }
};

// ---- blocks of 32 columns ----

template <int Row, class Code>
BITFOLD_SIMD void open_nibbles(Rows& rows, Panel<Row>& to, Code code) {
  I v[4];
  rows.sixteen(offsetof(Block<Row>, qs), v);
  for (int i = 0; i < 4; ++i) {
    to.put(4 * i, code(low_nibbles(v[i]), 4 * i));
    to.put(16 + 4 * i, code(high_nibbles(v[i]), 16 + 4 * i));
  }
}
template <int Row>
BITFOLD_SIMD void open_nibbles(Rows& rows, Panel<Row>& to) {
  open_nibbles(rows, to, [](I codes, int) { return codes; });
}
// Four bits to bit 4 of the bytes of a lane, as a lookup.
struct FifthBits {
  static constexpr std::array<float, 16> kSpread = [] {
    std::array<float, 16> out{};
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t bytes = (i & 1) | (i >> 1 & 1) << 8 | (i >> 2 & 1) << 16 | (i >> 3) << 24;
      out[i] = std::bit_cast<float>(bytes << 4);
    }
    return out;
  }();
  Table16 table = load_table(&kSpread[0]);
  I bits;
  BITFOLD_SIMD explicit FifthBits(I of_columns) : bits(of_columns) {}
  BITFOLD_SIMD I operator()(I codes, int column) const {
    return bit_or(codes, as_int(lookup(table, shift_right(bits, splat(static_cast<int32_t>(column))))));
  }
};

template <>
struct Packed<kQ4_0> {
  static constexpr int kSub = 32, kZero = 8;
  static constexpr bool kMin = false, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ4_0>& to) {
    store(to.d, rows.half(offsetof(Block<kQ4_0>, d)));
    open_nibbles(rows, to);
  }
};
template <>
struct Packed<kQ4_1> {
  static constexpr int kSub = 32, kZero = 0;
  static constexpr bool kMin = true, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ4_1>& to) {
    store(to.d, rows.half(offsetof(Block<kQ4_1>, d)));
    store(to.m, rows.half(offsetof(Block<kQ4_1>, m)));
    open_nibbles(rows, to);
  }
};
template <>
struct Packed<kQ5_0> {
  static constexpr int kSub = 32, kZero = 16;
  static constexpr bool kMin = false, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ5_0>& to) {
    static_assert(offsetof(Block<kQ5_0>, qh) == 2);
    I head[4];
    rows.sixteen(0, head);
    store(to.d, low_halves(head[0]));
    open_nibbles(rows, to, FifthBits(bit_or(shift_right<16>(head[0]), shift_left<16>(head[1]))));
  }
};
template <>
struct Packed<kQ5_1> {
  static constexpr int kSub = 32, kZero = 0;
  static constexpr bool kMin = true, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ5_1>& to) {
    static_assert(offsetof(Block<kQ5_1>, m) == 2 && offsetof(Block<kQ5_1>, qh) == 4);
    I head[4];
    rows.sixteen(0, head);
    to.put_d_and_m(head[0]);
    open_nibbles(rows, to, FifthBits(head[1]));
  }
};
template <>
struct Packed<kQ8_0> {
  static constexpr int kSub = 32, kZero = 128;
  static constexpr bool kMin = false, kWide = true;
  BITFOLD_SIMD static void open(Rows rows, Panel<kQ8_0>& to) {
    store(to.d, rows.half(offsetof(Block<kQ8_0>, d)));
    for (int side = 0; side < 2; ++side) {
      I v[4];
      rows.sixteen(offsetof(Block<kQ8_0>, qs) + 16 * side, v);
      for (int i = 0; i < 4; ++i) to.put(16 * side + 4 * i, bit_xor(v[i], splat_byte(128)));
    }
  }
};
template <>
struct Packed<kIq4Nl> {
  static constexpr int kSub = 32, kZero = kRaisedIq4.zero;
  static constexpr bool kMin = false, kWide = true;
  BITFOLD_SIMD static void open(Rows rows, Panel<kIq4Nl>& to) {
    store(to.d, rows.half(offsetof(Block<kIq4Nl>, d)));
    const Bytes16 table = load_bytes16(kRaisedIq4.values);
    open_nibbles(rows, to, [&](I codes, int) { return lookup_bytes(table, codes); });
  }
};
template <>
struct Packed<kMxfp4> {
  static constexpr int kSub = 32, kZero = kRaisedMxfp4.zero;
  static constexpr bool kMin = false, kWide = false;
  BITFOLD_SIMD static void open(Rows rows, Panel<kMxfp4>& to) {
    store(to.d, fp4_steps(rows.byte(offsetof(Block<kMxfp4>, e))));
    const Bytes16 table = load_bytes16(kRaisedMxfp4.values);
    open_nibbles(rows, to, [&](I codes, int) { return lookup_bytes(table, codes); });
  }
};

}  // namespace
}  // namespace bitfold::cpu
