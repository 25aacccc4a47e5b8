// Whole runs (eight columns of one group, which start at a byte), some of them at a time: all that lies in memory of
// them is loaded before any of it is looked at. Where they lie is 32-bit arithmetic, and never a division.
#pragma once

#include <type_traits>

#include "cuda/runs.hpp"

namespace bitfold::cuda {

// i / d for every i below 2^31 (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
struct Divider {
  uint32_t multiplier;
  int shift;
  BITFOLD_DEVICE uint32_t operator()(uint32_t i) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(i) * multiplier >> 32) >> shift;
  }
};
// For 2 <= d < 2^31.
inline Divider divider_of(int64_t d) {
  int log2 = 1;
  while (int64_t{1} << log2 < d) ++log2;
  return {static_cast<uint32_t>(bitfold::ceil_div(int64_t{1} << (31 + log2), d)), log2 - 1};
}
inline constexpr Divider kAlwaysZero{0, 0};

// Where a run lies.
struct RunPlace {
  const uint8_t* codes;  // its own, or its block's
  uint32_t row, group;   // of its zero point; a block's group is the run's place in it
  uint32_t scale;        // place in the plane of scales
};

// ---- formats with planes ----

// Codes as pairs of halves: 1024 + code for whole numbers, the number itself for fp8. Pair j has columns
// first_of_pair(j) and second_of_pair(j).
template <int Row>
inline constexpr bool kPairsAreNeighbours = kFormats[Row].bits == 8;
template <int Row>
BITFOLD_DEVICE constexpr int first_of_pair(int j) {
  return kPairsAreNeighbours<Row> ? 2 * j : j;
}
template <int Row>
BITFOLD_DEVICE constexpr int second_of_pair(int j) {
  return kPairsAreNeighbours<Row> ? 2 * j + 1 : j + 4;
}
template <int Row>
BITFOLD_DEVICE void pairs_of(uint2 codes, uint32_t (&pairs)[4]) {
  constexpr int kBits = kFormats[Row].bits;
  if constexpr (kBits == 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = j < 2 ? codes.x : codes.y;
      if constexpr (Row == kE4m3) pairs[j] = ptx::e4m3s_to_halves(word >> 16 * (j % 2));
      else if constexpr (Row == kE5m2) pairs[j] = ptx::prmt(word, 0, j % 2 == 0 ? 0x1404 : 0x3424);  // its upper byte
      else pairs[j] = ptx::prmt(word, 0x64646464u, j % 2 == 0 ? 0x4140 : 0x4342);
    }
  } else {
    // Columns 0 to 3 in the lower half of the word, 4 to 7 in the upper.
    uint32_t word = codes.x;
    if constexpr (kBits == 3) word = (word & 0xfffu) | (word << 4 & 0xfff0000u);
    else if constexpr (kBits == 2) word = ptx::prmt(word, 0, 0x4140);
    constexpr uint32_t kMask = 0x00010001u * ((1u << kBits) - 1u);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(word >> kBits * j, kMask, 0x64006400u);
  }
}

// Entries of the codebook: a nibble times four is its place in bytes.
template <int Row>
BITFOLD_DEVICE void look_up(uint32_t codes, const float* codebook, float (&values)[kRun]) {
  constexpr uint32_t kPlaces = 0x3c3c3c3cu;
  const uint32_t low = codes << 2 & kPlaces, high = codes >> 2 & kPlaces;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const uint32_t places = (j % 2 == 0) == kFormats[Row].high_first ? high : low;
    const auto* bytes = reinterpret_cast<const unsigned char*>(codebook);
    values[j] = *reinterpret_cast<const float*>(bytes + ptx::prmt(places, 0, 0x4440u + static_cast<uint32_t>(j / 2)));
  }
}

template <int Row, int Count>
class PlaneRuns {
  static constexpr FormatRow kRow = kFormats[Row];
  uint2 codes_[Count];
  float scales_[Count];
  uint32_t zeros_[Count];  // pairs of halves, 1024 + zero

 public:
  BITFOLD_DEVICE void load(const WeightRuns& d, const RunPlace (&places)[Count]) {
    const Format& format = d.w.format;
#pragma unroll
    for (int i = 0; i < Count; ++i) codes_[i] = load_bytes<kRow.bits, lowest_bit(kRow.bits)>(places[i].codes);
    uint32_t stored[Count], nested[Count];
    if (format.scale == Scale::F32) {
      const auto* scales = static_cast<const float*>(d.w.scales);
#pragma unroll
      for (int i = 0; i < Count; ++i) stored[i] = ptx::load4(scales + places[i].scale);
    } else if (kRow.nested && format.scale == Scale::Nested) {
      const auto* scales = static_cast<const uint8_t*>(d.w.scales);
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        stored[i] = ptx::load1(scales + places[i].scale);
        nested[i] = ptx::load4(d.w.nested_scales + places[i].scale / kNestedGroup);
      }
    } else {
      const auto* scales = static_cast<const uint16_t*>(d.w.scales);
#pragma unroll
      for (int i = 0; i < Count; ++i) stored[i] = ptx::load2(scales + places[i].scale);
    }
    if constexpr (kRow.grid == Grid::Integer) load_zeros(d, places);

    if (format.scale == Scale::F32) {
#pragma unroll
      for (int i = 0; i < Count; ++i) scales_[i] = ptx::uint_as_float(stored[i]);
    } else if (kRow.nested && format.scale == Scale::Nested) {
      const float offset = ptx::uint_as_float(ptx::load4(d.w.nested_offset));
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const float product = kDynamicMap[stored[i]] * ptx::uint_as_float(nested[i]);
        scales_[i] = product + offset;
      }
    } else if (format.scale == Scale::BF16) {
#pragma unroll
      for (int i = 0; i < Count; ++i) scales_[i] = ptx::bf16_to_float(static_cast<uint16_t>(stored[i]));
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) scales_[i] = ptx::half_to_float(static_cast<uint16_t>(stored[i]));
    }
  }

  BITFOLD_DEVICE void values(int i, const float* codebook, float (&out)[kRun]) const {
    if constexpr (kRow.grid == Grid::Codebook) {
      look_up<Row>(codes_[i].x, codebook, out);
    } else {
      uint32_t pairs[4];
      pairs_of<Row>(codes_[i], pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kRow.grid == Grid::Integer) pairs[j] = ptx::hsub2(pairs[j], zeros_[i]);
        const float2 two = ptx::halves_to_floats(pairs[j]);
        out[first_of_pair<Row>(j)] = two.x;
        out[second_of_pair<Row>(j)] = two.y;
      }
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) out[j] *= scales_[i];
  }

 private:
  BITFOLD_DEVICE void load_zeros(const WeightRuns& d, const RunPlace (&places)[Count]) {
    constexpr int kBits = kRow.bits;
    constexpr uint32_t kMask = (1u << kBits) - 1u;
    if (d.w.format.zero == Zero::None) {
#pragma unroll
      for (int i = 0; i < Count; ++i) zeros_[i] = 0x64006400u + 0x00010001u * (1u << (kBits - 1));
      return;
    }
    uint32_t bytes[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const uint32_t bit = places[i].group * kBits;
      const uint8_t* at = d.w.zeros + static_cast<uint64_t>(places[i].row) * d.zero_row_bytes + (bit >> 3);
      bytes[i] = ptx::load1(at);
      if (8 % kBits != 0 && (bit & 7u) + kBits > 8) bytes[i] |= static_cast<uint32_t>(ptx::load1(at + 1)) << 8;
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      zeros_[i] = 0x64006400u + 0x00010001u * (bytes[i] >> (places[i].group * kBits & 7u) & kMask);
    }
  }
};

// ---- blocks, and 16-bit floats ----

template <int Row, int Count>
class BlockRuns {
  typename RunOfBlock<Row>::Loaded runs_[Count];

 public:
  BITFOLD_DEVICE void load(const WeightRuns&, const RunPlace (&places)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const auto& block = *reinterpret_cast<const Block<Row>*>(places[i].codes);
      runs_[i] = RunOfBlock<Row>::load(block, static_cast<int>(places[i].group));
    }
  }
  BITFOLD_DEVICE void values(int i, const float* codebook, float (&out)[kRun]) const {
    RunOfBlock<Row>::values(runs_[i], codebook, out);
  }
};

template <int Row, int Count>
class CastRuns {
  uint4 words_[Count];

 public:
  BITFOLD_DEVICE void load(const WeightRuns&, const RunPlace (&places)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) words_[i] = ptx::load16(places[i].codes);
  }
  BITFOLD_DEVICE void values(int i, const float*, float (&out)[kRun]) const {
    const uint32_t pairs[4] = {words_[i].x, words_[i].y, words_[i].z, words_[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 two = Row == kFp16 ? ptx::halves_to_floats(pairs[j]) : ptx::bf16s_to_floats(pairs[j]);
      out[2 * j] = two.x;
      out[2 * j + 1] = two.y;
    }
  }
};

template <int Row, int Count>
using WholeRuns = std::conditional_t<
    kFormats[Row].grid == Grid::Block, BlockRuns<Row, Count>,
    std::conditional_t<kFormats[Row].grid == Grid::Cast, CastRuns<Row, Count>, PlaneRuns<Row, Count>>>;

// Bytes of the codes of a run; those of a block are all of its runs'.
template <int Row>
inline constexpr int kCodeBytes =
    kFormats[Row].grid == Grid::Block ? kFormats[Row].block_bytes : kFormats[Row].bits;  // eight columns of them
template <int Row>
inline constexpr int kRunsOfCodes =
    kFormats[Row].grid == Grid::Block ? static_cast<int>(kFormats[Row].group) / kRun : 1;

}  // namespace bitfold::cuda
