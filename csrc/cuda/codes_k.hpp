// K-quants and IQ4_XS as a lane of the kernel for few rows sees them: which words of a row's block it loads, how codes
// are masked out of them for mma, and what the four lanes of a row make of its scales (fragments_k.hpp).
// csrc/formats/blocks.hpp says what the bits mean.
//
// A code stays where it lies in its halfword, as the bits of a subnormal half: 2^-24 of it, times 2^p where its lowest
// bit is bit p, which its sub-block's scale takes back.
//
//   template <int Row> struct CodesK {
//     static constexpr int kAlign;            // of a block's first byte, at least
//     static constexpr int kStride;           // bytes of a row of a room: an odd number of 16, for other banks
//     static constexpr int kScales;           // sub-blocks, 8 or 16
//     static int scale_at(int i);             // where scale i lies as a float, once a block was opened; four on end
//     static constexpr int column(int step, int t, int half);
//     struct Tables;                          // of the block of threads, and in a lane's registers
//     static void fill(Tables& tables, int thread);
//     struct Kept;                            // registers of a row for all of its block
//     struct Words;                           // and for four steps
//     // The scales 2 t, 2 t + 1 (of 16 also 8 + 2 t, 9 + 2 t), and what lane t has of the operand for minima.
//     static OpenedScales<kScales> open(const uint8_t* block, int t, Kept& kept);
//     static Words load(const Tables& tables, const uint8_t* block, int t, int step);
//     static uint2 codes(const Words& words, const Kept& kept, int step);  // the operand's two registers of the row
//   };
#pragma once

#include "cuda/chunk_blocks_small.hpp"

namespace bitfold::cuda {

template <int Scales>
struct OpenedScales {
  float scales[Scales / 4];
  uint32_t mins[Scales / 8];  // halves
  float step;                 // of minima
};

template <int Row>
struct CodesK;

struct Nothing {};

// Byte i of `bytes` times a step: 2^23 + byte is exact, and so is 2^23 times the step.
BITFOLD_DEVICE float byte_times(uint32_t bytes, int i, float step) {
  const float number = ptx::uint_as_float(ptx::prmt(bytes, 0x4b000000, 0x7440u | static_cast<uint32_t>(i)));
  return ptx::fma(number, step, -0x1p23f * step);
}
BITFOLD_DEVICE uint32_t shifted_left(uint32_t word, int by) { return by < 0 ? word >> -by : word << by; }

// Of formats that have no minima but subtract a constant from their codes: the scales themselves stand for minima.
// pairs: the lane's scales, bytes, `zero` too high; p: bits that its sub-blocks have their codes higher; constant:
// times 2^-24.
template <int Pairs>
BITFOLD_DEVICE OpenedScales<8 * Pairs> open_symmetric(const uint32_t (&pairs)[Pairs], uint32_t zero, float d, int p,
                                                      float constant) {
  OpenedScales<8 * Pairs> opened;
  const float step = d * power_of_two(-p);
#pragma unroll
  for (int i = 0; i < Pairs; ++i) {
    opened.mins[i] = ptx::hsub2(ptx::prmt(pairs[i], 0x64646464, 0x4140), 0x64006400 + 0x00010001 * zero);
    const float2 two = ptx::halves_to_floats(opened.mins[i]);
    opened.scales[2 * i] = two.x * step, opened.scales[2 * i + 1] = two.y * step;
  }
  opened.step = d * (-32.0f * constant);
  return opened;
}

// ---- Q4_K, Q5_K: eight scales and minima of six bits, here and there in three words ----

template <int CodesAt>
struct CodesOfNibbles {
  static constexpr int kAlign = 16, kScales = 8;

  // Lane t has bytes 8 t to 8 t + 7 of 32, whose low nibbles are 32 columns and the high ones the next.
  static constexpr int column(int step, int t, int half) {
    return 64 * (step / 4) + 32 * (step / 2 % 2) + 8 * t + 4 * (step % 2) + half / 2 + 2 * (half % 2);
  }

  using Tables = NoTables;
  BITFOLD_DEVICE static void fill(Tables&, int) {}
  using Words = uint2;
  BITFOLD_DEVICE static Words load(const Tables&, const uint8_t* block, int t, int step) {
    return *reinterpret_cast<const uint2*>(block + CodesAt + 8 * step + 8 * t);
  }

  BITFOLD_DEVICE static OpenedScales<8> open(const uint8_t* block, int t) {
    const uint4 head = *reinterpret_cast<const uint4*>(block);
    const float2 steps = ptx::halves_to_floats(head.x);
    const bool second = t >= 2;
    // Four scales and four minima, of which this lane has bytes 2 t and 2 t + 1.
    const uint32_t four = second ? under(head.y >> 2, 0x30303030, head.w & 0x0f0f0f0f) : head.y & 0x3f3f3f3f;
    const uint32_t mins = second ? under(head.z >> 2, 0x30303030, head.w >> 4 & 0x0f0f0f0f) : head.z & 0x3f3f3f3f;
    const int at = 2 * (t % 2);
    // Odd sub-blocks have their codes 4 bits higher.
    return {{byte_times(four, at, steps.x), byte_times(four, at + 1, steps.x) * 0x1p-4f},
            {ptx::prmt(mins, 0, 0x4040u | static_cast<uint32_t>(at | (at + 1) << 8))},
            steps.y * -32.0f};
  }
};

template <>
struct CodesK<kQ4K> : CodesOfNibbles<16> {
  // 32 bytes beyond a multiple of 128: what half of a warp reads at once, 32 bytes of four rows, lies in all banks.
  static constexpr int kStride = 160;
  // Four where the head was.
  BITFOLD_DEVICE static constexpr int scale_at(int i) { return i < 4 ? 4 * i : 128 + 4 * i; }

  using Kept = Nothing;
  BITFOLD_DEVICE static OpenedScales<8> open(const uint8_t* block, int t, Kept&) {
    return CodesOfNibbles::open(block, t);
  }

  BITFOLD_DEVICE static uint2 codes(const Words& words, const Kept&, int step) {
    const uint32_t even = step % 2 == 0 ? words.x : words.y, odd = even >> 8;
    const uint32_t mask = step % 4 < 2 ? 0x000f000f : 0x00f000f0;
    return {even & mask, odd & mask};
  }
};

template <>
struct CodesK<kQ5K> : CodesOfNibbles<48> {
  // Of what half of a warp reads at once some meets in a bank; 48 bytes more wouldn't fit where a block has 99 KB.
  static constexpr int kStride = 176;
  // Where the head was, and fifth bits.
  BITFOLD_DEVICE static constexpr int scale_at(int i) { return 4 * i; }

  struct Kept {
    uint2 fifths;
  };
  BITFOLD_DEVICE static OpenedScales<8> open(const uint8_t* block, int t, Kept& kept) {
    kept.fifths = *reinterpret_cast<const uint2*>(block + 16 + 8 * t);
    return CodesOfNibbles::open(block, t);
  }

  BITFOLD_DEVICE static uint2 codes(const Words& words, const Kept& kept, int step) {
    const uint32_t even = step % 2 == 0 ? words.x : words.y, odd = even >> 8;
    const uint32_t fifths = step % 2 == 0 ? kept.fifths.x : kept.fifths.y;
    const int bit = step / 2;  // of a byte of these; it goes above the nibble
    if (step % 4 < 2) {
      return {under(shifted_left(fifths, 4 - bit), 0x00100010, even & 0x000f000f),
              under(shifted_left(fifths, -4 - bit), 0x00100010, odd & 0x000f000f)};
    }
    return {under(shifted_left(fifths, 8 - bit), 0x01000100, even & 0x00f000f0),
            under(shifted_left(fifths, -bit), 0x01000100, odd & 0x00f000f0)};
  }
};

// ---- Q2_K, Q3_K, Q6_K: 16 scales ----

// 32 bytes have columns l, l + 32, l + 64, l + 96 of half a block in their bits. Lane t has four of 16 such bytes, and
// so of each of these four runs of 16 columns, sub-blocks of their own, one step.
template <int Align>
struct CodesOfPlanes {
  static constexpr int kAlign = Align, kScales = 16;
  static constexpr int column(int step, int t, int half) {
    return 128 * (step / 8) + 32 * (step % 4) + 16 * (step / 4 % 2) + 4 * t + half / 2 + 2 * (half % 2);
  }
  using Tables = NoTables;
  BITFOLD_DEVICE static void fill(Tables&, int) {}
};

template <>
struct CodesK<kQ2K> : CodesOfPlanes<4> {
  static constexpr int kStride = 144;
  BITFOLD_DEVICE static constexpr int scale_at(int i) {
    return i < 4 ? 4 * i : 80 + 4 * i;
  }  // the first where scales were

  using Kept = Nothing;
  BITFOLD_DEVICE static OpenedScales<16> open(const uint8_t* block, int t, Kept&) {
    OpenedScales<16> opened;
    const float2 steps = ptx::halves_to_floats(word_at<4>(block + 80));
    const float step = steps.x * power_of_two(-2 * t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = half_bits_at(block + 8 * i + 2 * t), scales = pair & 0x0f0f;
      opened.scales[2 * i] = byte_times(scales, 0, step), opened.scales[2 * i + 1] = byte_times(scales, 1, step);
      opened.mins[i] = ptx::prmt(pair, 0, 0x4140) >> 4 & 0x000f000f;
    }
    opened.step = steps.y * -32.0f;
    return opened;
  }

  using Words = uint32_t;
  BITFOLD_DEVICE static Words load(const Tables&, const uint8_t* block, int t, int step) {
    return word_at<4>(block + 16 + 4 * step + 4 * t);
  }
  BITFOLD_DEVICE static uint2 codes(const Words& word, const Kept&, int step) {
    const uint32_t mask = 0x00030003u << 2 * (step % 4);
    return {word & mask, word >> 8 & mask};
  }
};

template <>
struct CodesK<kQ3K> : CodesOfPlanes<2> {
  static constexpr int kStride = 144;
  BITFOLD_DEVICE static constexpr int scale_at(int i) {
    return i < 8 ? 4 * i : 80 + 4 * i;
  }  // two where third bits were

  struct Kept {
    uint32_t thirds[2];
  };
  BITFOLD_DEVICE static OpenedScales<16> open(const uint8_t* block, int t, Kept& kept) {
    kept.thirds[0] = word_at<2>(block + 4 * t), kept.thirds[1] = word_at<2>(block + 16 + 4 * t);
    // Four lower bits of scale j and j + 8 in a byte, two upper ones of j, j + 4, j + 8, j + 12.
    const uint32_t low = half_bits_at(block + 96 + 2 * t);
    const uint32_t high = half_bits_at(block + 104 + 2 * (t % 2)) << 4 >> t / 2 * 2;
    const uint32_t pairs[2] = {under(low, 0x0f0f, high & 0x3030), under(low >> 4, 0x0f0f, high >> 4 & 0x3030)};
    return open_symmetric(pairs, 32, half_at(block + 108), 2 * t, 0x1p-22f);
  }

  using Words = uint32_t;
  BITFOLD_DEVICE static Words load(const Tables&, const uint8_t* block, int t, int step) {
    return word_at<2>(block + 32 + 4 * step + 4 * t);
  }
  BITFOLD_DEVICE static uint2 codes(const Words& word, const Kept& kept, int step) {
    // Its third bits are bit 4 (step / 8) + i of a byte, and go above the two others.
    const int i = step % 4, up = 2 + i - 4 * (step / 8);
    const uint32_t mask = 0x00030003u << 2 * i, third = 0x00040004u << 2 * i, thirds = kept.thirds[step / 4 % 2];
    return {under(shifted_left(thirds, up), third, word & mask),
            under(shifted_left(thirds, up - 8), third, word >> 8 & mask)};
  }
};

template <>
struct CodesK<kQ6K> : CodesOfPlanes<2> {
  static constexpr int kStride = 272;
  BITFOLD_DEVICE static constexpr int scale_at(int i) { return 208 + 4 * i; }  // behind all codes

  using Kept = Nothing;
  BITFOLD_DEVICE static OpenedScales<16> open(const uint8_t* block, int t, Kept&) {
    uint32_t pairs[2];  // signed bytes, 128 higher
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i] = half_bits_at(block + 192 + 8 * i + 2 * t) ^ 0x8080;
    return open_symmetric(pairs, 128, half_at(block + 208), t >= 2 ? 4 : 0, 0x1p-19f);
  }

  struct Words {
    uint32_t low[2], high;
  };
  BITFOLD_DEVICE static Words load(const Tables&, const uint8_t* block, int t, int step) {
    const uint8_t* low = block + 64 * (step / 8) + 16 * (step / 4 % 2) + 4 * t;
    return {{word_at<2>(low), word_at<2>(low + 32)}, word_at<2>(block + 128 + 4 * step + 4 * t)};
  }
  BITFOLD_DEVICE static uint2 codes(const Words& words, const Kept&, int step) {
    // The two upper bits of runs 0 and 2 are four below where they go, above a low nibble and a high one, and those of
    // 1 and 3 two.
    const int i = step % 4, up = i % 2 == 0 ? 4 : 2;
    const uint32_t low = words.low[i % 2];
    const uint32_t mask = i < 2 ? 0x000f000f : 0x00f000f0, upper = i < 2 ? 0x00300030 : 0x03000300;
    return {under(words.high << up, upper, low & mask), under(words.high >> (8 - up), upper, low >> 8 & mask)};
  }
};

// ---- IQ4_XS: eight scales of six bits, four here and two there; codes of a codebook ----

template <>
struct CodesK<kIq4Xs> {
  static constexpr int kAlign = 8, kScales = 8, kStride = 176;
  static constexpr int column(int step, int t, int half) { return iq4_column(step / 4, step % 4, t, half); }
  BITFOLD_DEVICE static constexpr int scale_at(int i) { return 144 + 4 * i; }  // behind all codes

  using Kept = Nothing;
  BITFOLD_DEVICE static OpenedScales<8> open(const uint8_t* block, int t, Kept&) {
    const uint32_t low = block[4 + t], high = half_bits_at(block + 2) >> 4 * t;
    const uint32_t pairs[1] = {(low & 0x0f) | (low & 0xf0) << 4 | (high & 3) << 4 | (high & 12) << 10};
    return open_symmetric(pairs, 32, half_at(block), 0, 0x1p-17f);
  }

  // The codebook comes to registers from shared memory: as constants it would be copied to a register at each use.
  struct Tables {
    uint4 codebook;
  };
  BITFOLD_DEVICE static void fill(Tables& tables, int thread) {
    if (thread == 0) tables.codebook = {iq4_word(0), iq4_word(1), iq4_word(2), iq4_word(3)};
  }
  // Its bytes, 128 higher, of two sub-blocks.
  struct Words {
    Bytes8 bytes[2];
  };
  BITFOLD_DEVICE static Words load(const Tables& tables, const uint8_t* block, int t, int step) {
    const uint8_t* qs = block + 8 + 8 * step + 4 * t;
    const uint4& all = tables.codebook;
    const uint32_t words[4] = {all.x, all.y, all.z, all.w};
    return {{look_up(words, word_at<8>(qs)), look_up(words, word_at<8>(qs + 16))}};
  }
  BITFOLD_DEVICE static uint2 codes(const Words& words, const Kept&, int step) {
    const Bytes8& bytes = words.bytes[step % 4 / 2];
    const uint32_t four = step % 2 == 0 ? bytes.first : bytes.second;
    return {ptx::prmt(four, 0, 0x4140), ptx::prmt(four, 0, 0x4342)};
  }
};

}  // namespace bitfold::cuda
