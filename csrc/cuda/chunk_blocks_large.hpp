// GGUF's blocks of 256 columns to operands of mma (chunk.hpp). csrc/formats/blocks.hpp says what the bits mean.
//
// Scales of K-quants are small whole numbers, as codes are: their products are exact in halves (but Q6_K's and
// IQ4_XS's), so that a code is multiplied with its sub-block's scale in place, and the block's own scale comes to the
// sums of a whole unit. Minima of sub-blocks are a product of their own, of small whole numbers again: one step for
// each chunk, with sums of x over sub-blocks (divided by 32) as its columns.
#pragma once

#include "cuda/chunk_blocks_small.hpp"

namespace bitfold::cuda {

template <int Row, int Align>
struct LargeBlocks {
  static constexpr int kColumns = 256, kBytes = sizeof(Block<Row>), kAlign = Align, kTables = 0, kUp = 0, kMinsUp = 15;
  static constexpr bool kPlanes = false;
  // Where a field of the block lies.
  BITFOLD_DEVICE static const Block<Row>& block(const uint8_t* chunk) {
    return *reinterpret_cast<const Block<Row>*>(chunk);
  }
};

// Q4_K and Q5_K: 32 bytes of nibbles have 32 columns low, and the next 32 high, which are a unit; lane t has four of
// the first 16 and four of the other 16, and so the low nibbles in steps 0 and 1, the high ones in 2 and 3.
template <int Row, int Align>
struct NibblesK : LargeBlocks<Row, Align> {
  static constexpr int kSpan = 4, kMins = 8;
  static constexpr int column(int unit, int step, int t, int half) {
    return 64 * unit + 32 * (step / 2) + 16 * (step % 2) + 4 * t + half / 2 + 2 * (half % 2);
  }
  // The block's first 16 bytes, taken apart where they are wanted: registers are dear.
  struct Head {
    uint32_t steps;    // d, dmin
    uint32_t a, b, c;  // eight scales and eight minima, six bits each
  };
  BITFOLD_DEVICE static Head head(const uint8_t* chunk) {
    return {word_at<Align>(chunk), word_at<Align>(chunk + 4), word_at<Align>(chunk + 8), word_at<Align>(chunk + 12)};
  }
  BITFOLD_DEVICE static float peak(const Lane&, const Head& head) {
    const float2 two = ptx::halves_to_floats(head.steps);
    return larger(finite_magnitude(two.x) * (0x1p20f * kDown), finite_magnitude(two.y) * (0x1p9f * 32.0f * kDown));
  }
  // Of the unit's two sub-blocks, times 16 for the first, whose codes lie four bits lower.
  BITFOLD_DEVICE static void scales(const Head& head, int unit, uint32_t (&s)[2]) {
    const uint32_t first = head.a & 0x3f3f3f3f, last = under(head.a >> 2, 0x30303030, head.c & 0x0f0f0f0f);
    const uint32_t two = ptx::prmt(first, last, static_cast<uint32_t>(0x10 + 0x22 * unit));
    s[0] = byte_to_halves<4>(two, 0, 0);
    s[1] = byte_to_halves<0>(two, 1, 0);
  }
  BITFOLD_DEVICE static float scale(const Head& head) {
    return ptx::half_to_float(static_cast<uint16_t>(head.steps)) * (0x1p20f * kDown);
  }
  BITFOLD_DEVICE static float mins(const Lane& lane, const Head& head, uint32_t (&a)[2]) {
    const auto at = static_cast<uint32_t>(2 * lane.t);
    const uint32_t first = head.b & 0x3f3f3f3f, last = under(head.b >> 2, 0x30303030, head.c >> 4 & 0x0f0f0f0f);
    a[0] = a[1] = ptx::prmt(first, last, at | (at + 1) << 8) & 0x003f003f;
    return ptx::half_to_float(static_cast<uint16_t>(head.steps >> 16)) * (-0x1p24f * 32.0f * kDown);
  }
};

template <>
struct Chunk<kQ4K> : NibblesK<kQ4K, 16> {
  static constexpr int kTop = -10;
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<4>& out) {
    const uint8_t* qs = lane.bytes + 16 + 32 * unit + 4 * lane.t;
    uint32_t s[2];
    scales(head, unit, s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t even = word_at<16>(qs + 16 * i), odd = even >> 8;
      out.halves[i][0] = ptx::hmul2(even & 0x000f000f, s[0]);
      out.halves[i][1] = ptx::hmul2(odd & 0x000f000f, s[0]);
      out.halves[2 + i][0] = ptx::hmul2(even & 0x00f000f0, s[1]);
      out.halves[2 + i][1] = ptx::hmul2(odd & 0x00f000f0, s[1]);
    }
    out.scales[0] = scale(head);
  }
};

template <>
struct Chunk<kQ5K> : NibblesK<kQ5K, 16> {
  static constexpr int kTop = -9;
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<4>& out) {
    const uint8_t* qs = lane.bytes + 48 + 32 * unit + 4 * lane.t;
    const uint8_t* qh = lane.bytes + 16 + 4 * lane.t;
    uint32_t s[2];
    scales(head, unit, s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // The unit's two bits come down to bits 0 and 1 of every byte, and from there to bit 4 and, above a high
      // nibble, 8.
      const uint32_t even = word_at<16>(qs + 16 * i), odd = even >> 8, fifth = word_at<16>(qh + 16 * i) >> 2 * unit;
      out.halves[i][0] = ptx::hmul2(under(fifth << 4, 0x00100010, even & 0x000f000f), s[0]);
      out.halves[i][1] = ptx::hmul2(under(fifth >> 4, 0x00100010, odd & 0x000f000f), s[0]);
      out.halves[2 + i][0] = ptx::hmul2(under(fifth << 7, 0x01000100, even & 0x00f000f0), s[1]);
      out.halves[2 + i][1] = ptx::hmul2(under(fifth >> 1, 0x01000100, odd & 0x00f000f0), s[1]);
    }
    out.scales[0] = scale(head);
  }
};

// Q2_K, Q3_K, Q6_K: 32 bytes have columns l, l + 32, l + 64, l + 96 of half a block in their bits. Lane t has four of
// 16 such bytes, and so of each of these four runs of 16 columns, sub-blocks of their own, one step. Units 0 and 1 are
// the two of the first half.
template <int Row, int Align>
struct PlanesK : LargeBlocks<Row, Align> {
  static constexpr int column(int unit, int step, int t, int half) {
    return 128 * (unit / 2) + 32 * step + 16 * (unit % 2) + 4 * t + half / 2 + 2 * (half % 2);
  }
};

template <>
struct Chunk<kQ2K> : PlanesK<kQ2K, 4> {
  static constexpr int kSpan = 4, kMins = 16, kTop = -14;
  struct Head {
    float d, dmin;
  };
  BITFOLD_DEVICE static Head head(const uint8_t* chunk) {
    const float2 steps = ptx::halves_to_floats(word_at<4>(chunk + 80));
    return {steps.x, steps.y};
  }
  BITFOLD_DEVICE static float peak(const Lane&, const Head& head) {
    return larger(finite_magnitude(head.d) * (0x1p20f * kDown), finite_magnitude(head.dmin) * (0x1p9f * 32.0f * kDown));
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<4>& out) {
    const int half = unit / 2, run = unit % 2;
    const uint32_t w = word_at<4>(lane.bytes + 16 + 32 * half + 16 * run + 4 * lane.t), v = w >> 8;
    // Scales of columns 32 i + 16 run: bytes 0 and 2 of two words.
    const uint32_t first = word_at<4>(lane.bytes + 8 * half) >> 8 * run & 0x000f000f;
    const uint32_t second = word_at<4>(lane.bytes + 8 * half + 4) >> 8 * run & 0x000f000f;
    const uint32_t s[4] = {byte_to_halves<4>(first, 0, 0), byte_to_halves<2>(first, 2, 0),
                           byte_to_halves<0>(second, 0, 0), byte_to_halves<-2>(second, 2, 0)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.halves[i][0] = ptx::hmul2(w & 0x00030003u << 2 * i, s[i]);
      out.halves[i][1] = ptx::hmul2(v & 0x00030003u << 2 * i, s[i]);
    }
    out.scales[0] = head.d * (0x1p20f * kDown);
  }
  BITFOLD_DEVICE static float mins(const Lane& lane, const Head& head, uint32_t (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = half_bits_at(lane.bytes + 8 * i + 2 * lane.t);
      a[i] = ptx::prmt(two, 0, 0x4140) >> 4 & 0x000f000f;
    }
    return head.dmin * (-0x1p24f * 32.0f * kDown);
  }
};

template <>
struct Chunk<kQ3K> : PlanesK<kQ3K, 2> {
  static constexpr int kSpan = 4, kMins = 0, kTop = 11;
  struct Head {
    float d;
    uint32_t low[2], high;  // the four lower bits of scales, and the two upper ones
  };
  BITFOLD_DEVICE static Head head(const uint8_t* chunk) {
    return {half_at(chunk + 108), {word_at<2>(chunk + 96), word_at<2>(chunk + 100)}, word_at<2>(chunk + 104)};
  }
  BITFOLD_DEVICE static float peak(const Lane&, const Head& head) {
    return finite_magnitude(head.d) * (0x1p-4f * kDown);
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<4>& out) {
    const int half = unit / 2, run = unit % 2;
    const uint32_t w = word_at<2>(lane.bytes + 32 + 32 * half + 16 * run + 4 * lane.t);
    const uint32_t third = word_at<2>(lane.bytes + 16 * run + 4 * lane.t) >> 4 * half;
    uint32_t s[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // scales of columns 64 i + 16 run and 64 i + 32 + 16 run: bytes 0 and 2
      const uint32_t upper = head.high >> (4 * half + 2 * i) & 0x03030303;
      const uint32_t four = under(head.low[i] >> 4 * half, 0x0f0f0f0f, upper << 4) >> 8 * run;
      s[2 * i] = i == 0 ? byte_to_halves<4>(four, 0, 32) : byte_to_halves<0>(four, 0, 32);
      s[2 * i + 1] = i == 0 ? byte_to_halves<2>(four, 2, 32) : byte_to_halves<-2>(four, 2, 32);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 1024 + 4^i code, with the third bit above the others.
      const uint32_t mask = 0x00030003u << 2 * i, top = 0x00040004u << 2 * i;
      const uint32_t even = under(third << (2 + i), top, under(w, mask, magic(0)));
      const uint32_t odd = under(third >> (6 - i), top, under(w >> 8, mask, magic(0)));
      const uint32_t four = magic_and(0, 4 << 2 * i);
      out.halves[i][0] = ptx::hmul2(ptx::hsub2(even, four), s[i]);
      out.halves[i][1] = ptx::hmul2(ptx::hsub2(odd, four), s[i]);
    }
    out.scales[0] = head.d * (0x1p-4f * kDown);
  }
};

template <>
struct Chunk<kQ6K> : PlanesK<kQ6K, 2> {
  static constexpr int kSpan = 1, kMins = 0, kTop = 5;
  struct Head {
    float d;
  };
  BITFOLD_DEVICE static Head head(const uint8_t* chunk) { return {half_at(chunk + 208)}; }
  BITFOLD_DEVICE static float peak(const Lane&, const Head& head) {
    return finite_magnitude(head.d) * (128.0f * kDown);
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<1>& out) {
    const int half = unit / 2, run = unit % 2, at = 16 * run + 4 * lane.t;
    const uint32_t low[2] = {word_at<2>(lane.bytes + 64 * half + at), word_at<2>(lane.bytes + 64 * half + 32 + at)};
    const uint32_t high = word_at<2>(lane.bytes + 128 + 32 * half + at);
    // Bits 0 and 1 of runs 0 and 2 go to bit 4, where 2's are above its high nibble, and those of runs 1 and 3
    // likewise.
    const uint32_t even[2] = {high << 4, high << 2}, odd[2] = {high >> 4, high >> 6};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t w = low[i], v = w >> 8;
      out.halves[i][0] = ptx::hsub2(under(even[i], 0x00300030, under(w, 0x000f000f, magic(0))), magic_and(0, 32));
      out.halves[i][1] = ptx::hsub2(under(odd[i], 0x00300030, under(v, 0x000f000f, magic(0))), magic_and(0, 32));
      out.halves[2 + i][0] = ptx::hsub2(under(even[i], 0x03000300, under(w, 0x00f000f0, magic(4))), magic_and(4, 32));
      out.halves[2 + i][1] = ptx::hsub2(under(odd[i], 0x03000300, under(v, 0x00f000f0, magic(4))), magic_and(4, 32));
    }
    // Signed bytes, 128 higher: of columns 32 i + 16 run.
    const uint8_t* scales = lane.bytes + 192 + 8 * half;
    const uint32_t first = (word_at<2>(scales) ^ 0x80808080) >> 8 * run;
    const uint32_t second = (word_at<2>(scales + 4) ^ 0x80808080) >> 8 * run;
    const float d = head.d * kDown;
    out.scales[0] = d * byte_to_float(first, 0, 128.0f);
    out.scales[1] = d * byte_to_float(first, 2, 128.0f);
    out.scales[2] = d * byte_to_float(second, 0, 128.0f);
    out.scales[3] = d * byte_to_float(second, 2, 128.0f);
  }
};

template <>
struct Chunk<kIq4Xs> : LargeBlocks<kIq4Xs, 8> {
  static constexpr int kSpan = 2, kMins = 0, kTop = 7;
  static constexpr int column(int unit, int step, int t, int half) { return iq4_column(unit, step, t, half); }
  struct Head {
    float d;
    uint32_t low, high;  // four bits, two bits of each scale
  };
  BITFOLD_DEVICE static Head head(const uint8_t* chunk) {
    const uint32_t word = word_at<8>(chunk);
    return {ptx::half_to_float(static_cast<uint16_t>(word)), word_at<8>(chunk + 4), word >> 16};
  }
  BITFOLD_DEVICE static float peak(const Lane&, const Head& head) { return finite_magnitude(head.d) * (32.0f * kDown); }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head& head, int unit, Operands<2>& out) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int sub = 2 * unit + b;
      iq4_block<8>(lane.bytes + 8 + 16 * sub, lane.t, out.halves[2 * b], out.halves[2 * b + 1]);
      const uint32_t scale = (head.low >> 4 * sub & 15) | (head.high >> 2 * sub & 3) << 4;
      out.scales[b] = head.d * kDown * byte_to_float(scale, 0, 32.0f);
    }
  }
};

}  // namespace bitfold::cuda
