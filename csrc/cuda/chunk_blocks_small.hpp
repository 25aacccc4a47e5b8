// GGUF's blocks of 32 columns to operands of mma (chunk.hpp). csrc/formats/blocks.hpp says what the bits mean.
#pragma once

#include "cuda/chunk_bits.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cuda {

// ---- blocks of 32 columns, of nibbles ----

// Byte j has column j low and column j + 16 high; lane t has bytes 4t ... 4t + 3 of both blocks of a unit, the low
// nibbles in the first step of each, bytes 0 and 2 in b0 and bytes 1 and 3 in b1.
template <int Row, int Qs, int Align>
struct SmallBlocks {
  static constexpr int kColumns = 256, kBlock = sizeof(Block<Row>), kBytes = 8 * kBlock, kAlign = Align;
  static constexpr int kSpan = 2, kMins = 0, kTables = 0, kUp = 0, kMinsUp = 0;
  static constexpr bool kPlanes = false;
  static constexpr int column(int unit, int step, int t, int half) {
    return 64 * unit + 32 * (step / 2) + 16 * (step % 2) + 4 * t + half / 2 + 2 * (half % 2);
  }
  struct Head {};
  BITFOLD_DEVICE static Head head(const uint8_t*) { return {}; }
  // The larger magnitude of two halves, at byte At of blocks 2t and 2t + 1.
  template <int At>
  BITFOLD_DEVICE static float half_peak(const Lane& lane) {
    return larger(finite_magnitude(half_at(block(lane, 2 * lane.t) + At)),
                  finite_magnitude(half_at(block(lane, 2 * lane.t + 1) + At)));
  }
  BITFOLD_DEVICE static float peak(const Lane& lane, const Head&) { return half_peak<0>(lane) * kDown; }

  BITFOLD_DEVICE static const uint8_t* block(const Lane& lane, int b) { return lane.bytes + b * kBlock; }
  BITFOLD_DEVICE static uint32_t nibbles(const uint8_t* block, int t) { return word_at<Align>(block + Qs + 4 * t); }
  // Minima of blocks 2t and 2t + 1, halves as they are.
  template <int At>
  BITFOLD_DEVICE static float half_mins(const Lane& lane, uint32_t (&a)[2]) {
    a[0] = a[1] = half_bits_at(block(lane, 2 * lane.t) + At) | half_bits_at(block(lane, 2 * lane.t + 1) + At) << 16;
    return 32.0f * kDown;
  }
};

// The fifth bits of four columns: bit i of `bits` goes to bit 4 of byte i, for i = 0, 2 and, shifted by one, 1, 3.
BITFOLD_DEVICE uint32_t spread_fifth(uint32_t bits) { return (bits & 15u) * 0x00040010u; }
inline constexpr uint32_t kFifth = 0x00100010;

template <>
struct Chunk<kQ4_0> : SmallBlocks<kQ4_0, 2, 2> {
  static constexpr int kTop = 3;
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      const uint32_t w = nibbles(block, lane.t), v = w >> 8;
      out.halves[2 * b][0] = ptx::hsub2(under(w, 0x000f000f, magic(0)), magic_and(0, 8));
      out.halves[2 * b][1] = ptx::hsub2(under(v, 0x000f000f, magic(0)), magic_and(0, 8));
      out.halves[2 * b + 1][0] = ptx::hsub2(under(w, 0x00f000f0, magic(4)), magic_and(4, 8));
      out.halves[2 * b + 1][1] = ptx::hsub2(under(v, 0x00f000f0, magic(4)), magic_and(4, 8));
      out.scales[b] = half_at(block) * kDown;
    }
  }
};

template <>
struct Chunk<kQ4_1> : SmallBlocks<kQ4_1, 4, 4> {
  static constexpr int kMins = 8;
  static constexpr int kUp = 15, kTop = -5;
  BITFOLD_DEVICE static float peak(const Lane& lane, const Head&) {
    return larger(half_peak<0>(lane) * (0x1p9f * kDown), larger(half_peak<2>(lane), 1.0f) * (32.0f * kDown));
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      const uint32_t w = nibbles(block, lane.t);
      out.halves[2 * b][0] = w & 0x000f000f;
      out.halves[2 * b][1] = w >> 8 & 0x000f000f;
      out.halves[2 * b + 1][0] = w >> 4 & 0x000f000f;
      out.halves[2 * b + 1][1] = w >> 12 & 0x000f000f;
      out.scales[b] = half_at(block) * (0x1p24f * kDown);
    }
  }
  BITFOLD_DEVICE static float mins(const Lane& lane, const Head&, uint32_t (&a)[2]) { return half_mins<2>(lane, a); }
};

template <>
struct Chunk<kQ5_0> : SmallBlocks<kQ5_0, 6, 2> {
  static constexpr int kTop = 4;
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      const uint32_t w = nibbles(block, lane.t), high = word_at<2>(block + 2) >> 4 * lane.t;
      const uint32_t first = spread_fifth(high), second = spread_fifth(high >> 16);
      const uint32_t fifth[4] = {first, first >> 1, second, second >> 1};
      const int down[4] = {0, 8, 4, 12};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t sum = under(fifth[i], kFifth, under(w >> down[i], 0x000f000f, magic(0)));
        out.halves[2 * b + i / 2][i % 2] = ptx::hsub2(sum, magic_and(0, 16));
      }
      out.scales[b] = half_at(block) * kDown;
    }
  }
};

template <>
struct Chunk<kQ5_1> : SmallBlocks<kQ5_1, 8, 4> {
  static constexpr int kMins = 8;
  static constexpr int kUp = 15, kTop = -4;
  BITFOLD_DEVICE static float peak(const Lane& lane, const Head&) {
    return larger(half_peak<0>(lane) * (0x1p9f * kDown), larger(half_peak<2>(lane), 1.0f) * (32.0f * kDown));
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      const uint32_t w = nibbles(block, lane.t), high = word_at<4>(block + 4) >> 4 * lane.t;
      const uint32_t first = spread_fifth(high), second = spread_fifth(high >> 16);
      out.halves[2 * b][0] = under(first, kFifth, w & 0x000f000f);
      out.halves[2 * b][1] = under(first >> 1, kFifth, w >> 8 & 0x000f000f);
      out.halves[2 * b + 1][0] = under(second, kFifth, w >> 4 & 0x000f000f);
      out.halves[2 * b + 1][1] = under(second >> 1, kFifth, w >> 12 & 0x000f000f);
      out.scales[b] = half_at(block) * (0x1p24f * kDown);
    }
  }
  BITFOLD_DEVICE static float mins(const Lane& lane, const Head&, uint32_t (&a)[2]) { return half_mins<2>(lane, a); }
};

// Sixteen bytes that four bits choose from, and the same nibbles' bytes of a word in their order: first[i] of nibble i,
// second[i] of nibble 4 + i.
struct Bytes8 {
  uint32_t first, second;
};
BITFOLD_DEVICE Bytes8 look_up(const uint32_t (&table)[4], uint32_t w) {
  const uint32_t index = w & 0x77777777, left = w << 4;
  // The top bit of each nibble, in all bits of its byte: of the low nibbles from `left`, of the high ones from w.
  const uint32_t upper[2] = {ptx::prmt(w, left, 0x9d8c), ptx::prmt(w, left, 0xbfae)};
  uint32_t out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = index >> 16 * i;
    const uint32_t low = ptx::prmt(table[0], table[1], at), high = ptx::prmt(table[2], table[3], at);
    out[i] = ptx::lop3<(0xcc & 0xf0) | (0xaa & ~0xf0 & 0xff)>(upper[i], high, low);
  }
  return {out[0], out[1]};
}

// The codebook of IQ4, 128 higher.
inline constexpr uint32_t iq4_word(int i) {
  uint32_t word = 0;
  for (int b = 3; b >= 0; --b)
    word = word << 8 | static_cast<uint32_t>(kIq4Values[static_cast<size_t>(4 * i + b)] + 128);
  return word;
}
// One block of 32 columns: two steps. Byte j of lane t's four gives column j and column j + 16 as the two halves of
// one register.
template <int Align>
BITFOLD_DEVICE void iq4_block(const uint8_t* qs, int t, uint32_t (&first)[2], uint32_t (&second)[2]) {
  constexpr uint32_t kTable[4] = {iq4_word(0), iq4_word(1), iq4_word(2), iq4_word(3)};
  const Bytes8 bytes = look_up(kTable, word_at<Align>(qs + 4 * t));
  const auto expand = [](uint32_t four, uint32_t selector) {
    return ptx::hsub2(ptx::prmt(four, magic(0), selector), magic_and(0, 128));
  };
  first[0] = expand(bytes.first, 0x5150);
  first[1] = expand(bytes.first, 0x5352);
  second[0] = expand(bytes.second, 0x5150);
  second[1] = expand(bytes.second, 0x5352);
}
constexpr int iq4_column(int unit, int step, int t, int half) {
  return 64 * unit + 32 * (step / 2) + 16 * (half % 2) + 4 * t + 2 * (step % 2) + half / 2;
}

template <>
struct Chunk<kIq4Nl> : SmallBlocks<kIq4Nl, 2, 2> {
  static constexpr int kTop = 7;
  static constexpr int column(int unit, int step, int t, int half) { return iq4_column(unit, step, t, half); }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      iq4_block<2>(block + 2, lane.t, out.halves[2 * b], out.halves[2 * b + 1]);
      out.scales[b] = half_at(block) * kDown;
    }
  }
};

// A code's three low bits are exponent and mantissa of e2m1 where they go in a half, 2^14 too small; that, kDown and
// the codebook's factor 2 are one another's inverse.
template <>
struct Chunk<kMxfp4> : SmallBlocks<kMxfp4, 1, 1> {
  static constexpr int kTop = -11;
  BITFOLD_DEVICE static float peak(const Lane& lane, const Head&) {
    return larger(finite_magnitude(mxfp4_step(block(lane, 2 * lane.t)[0])),
                  finite_magnitude(mxfp4_step(block(lane, 2 * lane.t + 1)[0])));
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = SmallBlocks::block(lane, 2 * unit + b);
      const uint32_t w = nibbles(block, lane.t);
      // The upper bytes of four halves, of low nibbles and of high ones.
      const uint32_t bytes[2] = {under(w << 4, 0x80808080, w << 1 & 0x0e0e0e0e),
                                 under(w, 0x80808080, w >> 3 & 0x0e0e0e0e)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out.halves[2 * b + i][0] = ptx::prmt(bytes[i], 0, 0x2404);
        out.halves[2 * b + i][1] = ptx::prmt(bytes[i], 0, 0x3414);
      }
      out.scales[b] = mxfp4_step(block[0]);
    }
  }
};
static_assert(0x1p-14f * 0.5f / kDown == 1.0f);

// Four bytes in a row for each lane and step.
template <>
struct Chunk<kQ8_0> {
  static constexpr int kColumns = 128, kBlock = sizeof(Block<kQ8_0>), kBytes = 4 * kBlock, kAlign = 2;
  static constexpr int kSpan = 2, kMins = 0, kTables = 0, kUp = 0, kMinsUp = 0, kTop = 7;
  static constexpr bool kPlanes = false;
  static constexpr int column(int unit, int step, int t, int half) {
    return 64 * unit + 32 * (step / 2) + 16 * (step % 2) + 4 * t + half;
  }
  struct Head {};
  BITFOLD_DEVICE static Head head(const uint8_t*) { return {}; }
  BITFOLD_DEVICE static float peak(const Lane& lane, const Head&) {
    return finite_magnitude(half_at(lane.bytes + lane.t * kBlock)) * kDown;
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = lane.bytes + (2 * unit + b) * kBlock;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t w = word_at<2>(block + 2 + 16 * i + 4 * lane.t) ^ 0x80808080;
        out.halves[2 * b + i][0] = ptx::hsub2(ptx::prmt(w, magic(0), 0x5150), magic_and(0, 128));
        out.halves[2 * b + i][1] = ptx::hsub2(ptx::prmt(w, magic(0), 0x5352), magic_and(0, 128));
      }
      out.scales[b] = half_at(block) * kDown;
    }
  }
};

}  // namespace bitfold::cuda
