// Codes of planes to the halves of operands: whole numbers, fp8 and codebooks. Of a codebook a table of pairs (a byte
// of two codes is 32 bits of two halves), of which each lane has a copy in a bank of its own.
#pragma once

#include "cuda/fragments.hpp"
#include "formats/codebooks.hpp"
#include "formats/codec.hpp"

namespace bitfold::cuda {

// How a lane's words of consecutive codes become halves: value(words, step, r) is b_r's partner, and its half h is the
// code column(step, 2 r + h) of the lane, times 1 / kUnit. `zero` has the zero point in both halves.
template <int Row>
struct PlaneCodes;

// 2^(10 - p) in both halves.
BITFOLD_HOST_DEVICE constexpr uint32_t magic(int p) { return 0x00010001u * static_cast<uint32_t>((25 - p) << 10); }

// The fields of `Bits` bits at bit p of both halves.
template <int Bits>
BITFOLD_DEVICE uint32_t field(uint32_t word, int p) {
  return word & (0x00010001u * ((1u << Bits) - 1u)) << p;
}
// The same as numbers, less `zero`. p + Bits <= 10.
template <int Bits>
BITFOLD_DEVICE uint32_t field_value(uint32_t word, int p, uint32_t zero) {
  constexpr uint32_t kMask = 0x00010001u * ((1u << Bits) - 1u);
  return ptx::hsub2(ptx::lop3<kAndOr>(word, kMask << p, magic(p)), magic(p) + (zero << p));
}

template <>
struct PlaneCodes<kInt8> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  static constexpr int column(int step, int half) { return 4 * step + half; }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t zero, const Tables&) {
    return ptx::hsub2(ptx::prmt(words[step], magic(0), r == 0 ? 0x5150 : 0x5352), magic(0) + zero);
  }
  static constexpr int place(int, int) { return 0; }
  BITFOLD_DEVICE static uint32_t raw(const uint32_t* words, int step, int r) {
    return ptx::prmt(words[step], 0, r == 0 ? 0x4140 : 0x4342);
  }
};

template <>
struct PlaneCodes<kInt4> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  // Pairs are 16 bits apart: (0, 4), (1, 5) and, 8 bits further on, (2, 6), (3, 7).
  static constexpr int column(int step, int half) {
    return 8 * (step / 2) + 2 * (step % 2) + half / 2 + 4 * (half % 2);
  }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t zero, const Tables&) {
    return field_value<4>(words[step / 2] >> 8 * (step % 2), 4 * r, zero);
  }
  static constexpr int place(int, int r) { return 4 * r; }
  BITFOLD_DEVICE static uint32_t raw(const uint32_t* words, int step, int r) {
    return field<4>(words[step / 2] >> 8 * (step % 2), place(step, r));
  }
};

template <>
struct PlaneCodes<kInt2> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  // Pairs (i, i + 8) of a word's 16 codes.
  static constexpr int column(int step, int half) {
    return 16 * (step / 4) + 2 * (step % 4) + half / 2 + 8 * (half % 2);
  }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t zero, const Tables&) {
    return field_value<2>(words[step / 4] >> 8 * (step / 2 % 2), place(step, r), zero);
  }
  static constexpr int place(int step, int r) { return 4 * (step % 2) + 2 * r; }
  BITFOLD_DEVICE static uint32_t raw(const uint32_t* words, int step, int r) {
    return field<2>(words[step / 4] >> 8 * (step / 2 % 2), place(step, r));
  }
};

template <>
struct PlaneCodes<kInt3> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  // Pairs (i, i + 8) of 16 codes, 48 bits: `pairs` has bits [0, 16) and [24, 40), of which pairs 0 to 2 are in reach of
  // a magic exponent as they lie, 3 and 4 after a shift, and bits [15, 31) and [39, 55) have the others.
  static constexpr int column(int step, int half) { return 2 * step + half / 2 + 8 * (half % 2); }
  static constexpr int place(int step, int r) {
    const int pair = 2 * step + r;
    return 3 * (pair < 3 ? pair : pair < 5 ? pair - 3 : pair - 5);
  }
  // What has the pair at its place.
  BITFOLD_DEVICE static uint32_t halfwords(const uint32_t* words, int step, int r) {
    const int pair = 2 * step + r;
    if (pair >= 5) return ptx::prmt(words[0] >> 15, words[1] >> 7, 0x5410);
    const uint32_t pairs = ptx::prmt(words[0], ptx::funnel_right(words[0], words[1], 24), 0x5410);
    return pair < 3 ? pairs : pairs >> 9;
  }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t zero, const Tables&) {
    return field_value<3>(halfwords(words, step, r), place(step, r), zero);
  }
  BITFOLD_DEVICE static uint32_t raw(const uint32_t* words, int step, int r) {
    return field<3>(halfwords(words, step, r), place(step, r));
  }
};

template <>
struct PlaneCodes<kE5m2> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  static constexpr int column(int step, int half) { return 4 * step + half; }
  // The upper half of a half.
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t, const Tables&) {
    return ptx::prmt(words[step], 0, r == 0 ? 0x1404 : 0x3424);
  }
};

template <>
struct PlaneCodes<kE4m3> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  static constexpr int column(int step, int half) { return 4 * step + half; }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t, const Tables&) {
    return ptx::e4m3s_to_halves(words[step] >> 16 * r);
  }
};

// What the halves of a codebook are, of its numbers. Rounded as they are, nf4's are 2.9e-5 of their root mean square
// off on the average of normal weights, which adds up where x has one sign; times this it is 2.3e-6, and the roundings
// themselves are smaller, too (tests/cuda/test_product_errors.py has the sums).
BITFOLD_HOST_DEVICE constexpr float codebook_up(int row) { return row == kNf4 ? 1.8711f : 1.0f; }

// nf4 and fp4 differ in nothing but this, so that kernels are nf4's for both.
BITFOLD_DEVICE uint32_t codebook_half(int row, uint32_t code) {
  return ptx::float_to_half(row == kFp4 ? code_value<kFp4>(code, 0) : code_value<kNf4>(code, 0) * codebook_up(kNf4));
}
// The halves of both codes of a byte.
BITFOLD_DEVICE uint32_t codebook_pair(int row, uint32_t byte) {
  return codebook_half(row, byte >> 4) | codebook_half(row, byte & 15u) << 16;
}

// What codes of nested scales mean, and what is added to them: to each lane in a place of its own, so that nobody keeps
// where that is.
struct NestedScales {
  float map[256];
  float offset[kWarp];

  // offset: null where scales aren't nested. It is W's, for whom nobody waits behind arrange.cu, which has waited.
  BITFOLD_DEVICE void fill(const float* offset, int thread, int threads) {
    if (offset == nullptr) return;
    for (int i = thread; i < 256; i += threads) map[i] = kDynamicMap[static_cast<size_t>(i)];
    if (thread < kWarp) this->offset[thread] = *offset;
  }
  BITFOLD_DEVICE float mine() const { return offset[ptx::lane_id_anew()]; }
};

// Entry e is the halves of the codes e / 16 and e % 16, once for each lane: lane l finds its own at byte 256 e + 4 l,
// which one permutation puts together, and always in bank l. Half of the place stays empty.
struct PairTables {
  uint32_t pairs[256][64];
  NestedScales nested;

  // All but the nested ones.
  BITFOLD_DEVICE void fill(int row, int thread, int threads) {
    // A lane has a code's number, so that no warp waits for memory more than once.
    const uint32_t mine = codebook_half(row, static_cast<uint32_t>(thread % 16));
#pragma unroll 4
    for (int i = thread / kWarp; i < 256; i += threads / kWarp) {
      pairs[i][thread % kWarp] = ptx::shuffle(mine, i / 16) | ptx::shuffle(mine, i % 16) << 16;
    }
  }
  // Of byte `byte` of a word.
  BITFOLD_DEVICE uint32_t pair(uint32_t word, int byte) const {
    const uint32_t place =
        ptx::prmt(word, static_cast<uint32_t>(4 * ptx::lane_id()), 0x7704u | static_cast<uint32_t>(byte) << 4);
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(pairs) + place);
  }
};

template <>
struct PlaneCodes<kNf4> {
  using Tables = PairTables;
  static constexpr float kUnit = 1.0f;
  static constexpr int column(int step, int half) { return 4 * step + half; }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t, const Tables& tables) {
    return tables.pair(words[step / 2], 2 * (step % 2) + r);
  }
};

}  // namespace bitfold::cuda
