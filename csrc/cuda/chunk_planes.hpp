// The formats with planes as chunks (chunk.hpp): codes by PlaneCodes, whose words come from shared memory.
#pragma once

#include "cuda/chunk.hpp"

namespace bitfold::cuda {

template <int Row>
struct PlaneChunk {
  using Codes = PlaneCodes<Row>;
  static constexpr int kRow = Row;
  static constexpr int kBits = kFormats[Row].bits;
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr bool kNested = kFormats[Row].nested;
  static constexpr Scale kStored = kFormats[Row].scale;  // the usual one
  // Each chunk costs a warp as much beside its columns: of int4 256 leave room for two blocks of few tokens.
  static constexpr int kColumns = kBits < 4 || Row == kInt4 ? 256 : 128, kBytes = kColumns * kBits / 8, kAlign = 16;
  static constexpr int kMins = 0, kMinsUp = 0, kTables = 0;
  static constexpr int kUp = 0, kTop = kInteger ? kBits : Row == kE4m3 ? 9 : Row == kE5m2 ? 16 : 0;
  static constexpr bool kPlanes = true;
  // Of 32 consecutive columns a lane has eight; of the narrow codes 16 of 64, which are as many whole bytes.
  static constexpr bool kNarrow = kBits < 4;
  static constexpr int kSpan = kNarrow ? 4 : 2;

  static constexpr int column(int unit, int step, int t, int half) {
    if (kNarrow) return 64 * unit + 16 * t + Codes::column(step, half);
    if (kBits == 8) return 64 * unit + 16 * step + 4 * t + Codes::column(0, half);
    return 64 * unit + 32 * (step / 2) + 8 * t + Codes::column(step % 2, half);
  }

  // Which word has a step's codes, and which of the word's steps that is.
  static constexpr int word_of(int step) { return kNarrow ? 0 : kBits == 8 ? step : step / 2; }
  static constexpr int of_word(int step) { return kNarrow ? step : kBits == 8 ? 0 : step % 2; }

  struct Head {};
  BITFOLD_DEVICE static Head head(const uint8_t*) { return {}; }

  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<kSpan>& out) {
    operands(lane, unit, lane.scales[2 * unit], lane.scales[2 * unit + 1], out);
  }
  // The same with scales from elsewhere: of the unit's first 32 columns, and of the others.
  BITFOLD_DEVICE static void operands(const Lane& lane, int unit, const ScaleZero& first, const ScaleZero& second,
                                      Operands<kSpan>& out) {
    const uint8_t* bytes = lane.bytes + unit * (kUnit * kBits / 8);
    out.scales[0] = first.scale;
    if constexpr (!kNarrow) out.scales[1] = second.scale;
    uint32_t words[4];
    load(bytes, lane.t, words);
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t zero = s < 2 || kNarrow ? first.zero : second.zero;
        out.halves[s][r] = Codes::value(words + word_of(s), of_word(s), r, zero, {});
      }
    }
  }

  // The words that unit() looks at.
  BITFOLD_DEVICE static void load(const uint8_t* bytes, int t, uint32_t (&words)[4]) {
    const auto word = [&](int at) { return *reinterpret_cast<const uint32_t*>(bytes + at); };
    if constexpr (kBits == 3) {  // six bytes; lanes 1 and 3 begin in the middle of a word
      const int at = 6 * t / 4 * 4;
      const uint32_t shift = 16 * (static_cast<uint32_t>(t) % 2);
      const uint32_t high = word(at + 4);
      words[0] = ptx::funnel_right(word(at), high, shift);
      words[1] = high >> shift;
    } else if constexpr (kBits == 2) {
      words[0] = word(4 * t);
    } else {
#pragma unroll
      for (int i = 0; i < kBits / 2; ++i) words[i] = word(16 * i + 4 * t);
    }
  }

  // The byte that a zero point begins in, and of those of three bits the next, which may have some of it: to be put
  // together when they have come.
  BITFOLD_DEVICE static void load_zero(const uint8_t* zeros, uint32_t group, uint32_t& byte, uint32_t& behind) {
    const uint32_t bit = group * kBits;
    byte = ptx::load1(zeros + bit / 8);
    behind = 0;
    if constexpr (kBits == 3) {
      if (bit % 8 > 8 - kBits) behind = ptx::load1(zeros + bit / 8 + 1);
    }
  }
  BITFOLD_DEVICE static uint32_t zero_of(uint32_t byte, uint32_t behind, uint32_t group) {
    return (byte | behind << 8) >> group * kBits % 8 & ((1u << kBits) - 1);
  }
  // Where a row's scales and zero points begin.
  struct ScaleRow {
    const uint8_t* scales;
    const uint8_t* zeros;
    int64_t first;  // nested: which scale of the matrix that is
  };
  BITFOLD_DEVICE static ScaleRow scale_row(const PlaneMatrix& w, int64_t row) { return scale_row(w, row, 0, w.scale); }
  // Of a row of a block whose first, row0, is a multiple of 256, and which has no more: what is of the block stays with
  // it. Stored: as the matrix has its scales.
  BITFOLD_DEVICE static ScaleRow scale_row(const PlaneMatrix& w, int64_t row0, uint32_t row, Scale stored) {
    const int64_t first = scale_row_of<Row>(w, row0) * w.row_scales;
    const int64_t more = int64_t{scale_row_of<Row>(w, row)} * static_cast<uint32_t>(w.row_scales);
    const int bytes = stored == Scale::F32 ? 4 : kNested && stored == Scale::Nested ? 1 : 2;
    const uint8_t* zeros = nullptr;
    if constexpr (kInteger) zeros = w.zeros + row0 * w.row_zeros + int64_t{row} * static_cast<uint32_t>(w.row_zeros);
    return {w.scales + first * bytes + more * bytes, zeros, kNested ? first + more : 0};
  }
  // Stored: as the matrix has its scales. Without zero points, in whose place is what codes have without them.
  BITFOLD_DEVICE static LoadedScaleZero load_scale(const PlaneMatrix& w, const ScaleRow& row, uint32_t group,
                                                   Scale stored) {
    LoadedScaleZero loaded{};
    if (stored == Scale::F32) loaded.bits = ptx::load4(row.scales + 4 * group);
    else if (kNested && stored == Scale::Nested) loaded.bits = ptx::load1(row.scales + group);
    else loaded.bits = ptx::load2(row.scales + 2 * group);
    if constexpr (kNested) {
      if (stored == Scale::Nested) loaded.more = ptx::load4(w.nested_scales + (row.first + group) / kNestedGroup);
    }
    if constexpr (kInteger) loaded.more = 1u << (kBits - 1);
    return loaded;
  }
  // Whether these are the format's usual scales: both kinds of 16 bits are, which are loaded alike.
  BITFOLD_DEVICE static bool usual(Scale scale) {
    return scale == kStored || (kStored == Scale::F16 && scale == Scale::BF16);
  }
  // map: what codes of nested scales mean; offset: what is added to them.
  BITFOLD_DEVICE static ScaleZero scale_zero(const PlaneMatrix& w, const LoadedScaleZero& loaded, Scale stored,
                                             const float* map, float offset) {
    float scale;
    if (stored == Scale::F32) scale = ptx::uint_as_float(loaded.bits);
    else if (stored == Scale::F16 && w.scale != Scale::BF16)
      scale = ptx::half_to_float(static_cast<uint16_t>(loaded.bits));
    else if (!kNested || stored != Scale::Nested) scale = ptx::bf16_to_float(static_cast<uint16_t>(loaded.bits));
    else scale = ptx::add(ptx::mul(map[loaded.bits], ptx::uint_as_float(loaded.more)), offset);
    return {scale * (Codes::kUnit * kDown), loaded.more * 0x00010001u};
  }
};

template <>
struct Chunk<kInt8> : PlaneChunk<kInt8> {};
template <>
struct Chunk<kInt4> : PlaneChunk<kInt4> {};
template <>
struct Chunk<kInt3> : PlaneChunk<kInt3> {};
template <>
struct Chunk<kInt2> : PlaneChunk<kInt2> {};
template <>
struct Chunk<kE4m3> : PlaneChunk<kE4m3> {};
template <>
struct Chunk<kE5m2> : PlaneChunk<kE5m2> {};

// Codebooks: the halves of both codes of a byte, once for each lane, in a bank of its own: lane l finds those of byte e
// at 128 e + 4 l.
template <>
struct Chunk<kNf4> : PlaneChunk<kNf4> {
  static constexpr int kPairs = 256 * kWarp, kTables = kPairs * 4 + static_cast<int>(sizeof(NestedScales));
  BITFOLD_DEVICE static void fill(const PlaneMatrix& w, uint8_t* tables, int thread, int threads) {
    auto* pairs = reinterpret_cast<uint32_t*>(tables);
    for (int i = thread; i < kPairs; i += threads) pairs[i] = codebook_pair(w.row, static_cast<uint32_t>(i / kWarp));
    reinterpret_cast<NestedScales*>(pairs + kPairs)->fill(w.nested_offset, thread, threads);
  }
  BITFOLD_DEVICE static const NestedScales* nested(const uint8_t* tables) {
    return reinterpret_cast<const NestedScales*>(tables + kPairs * 4);
  }
  BITFOLD_DEVICE static void unit(const Lane& lane, const Head&, int unit, Operands<2>& out) {
    operands(lane, unit, lane.scales[2 * unit], lane.scales[2 * unit + 1], out);
  }
  BITFOLD_DEVICE static void operands(const Lane& lane, int unit, const ScaleZero& first, const ScaleZero& second,
                                      Operands<2>& out) {
    uint32_t words[4];
    load(lane.bytes + unit * (kUnit / 2), lane.t, words);
    const auto mine = static_cast<uint32_t>(8 * ptx::lane_id());
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t place =
            ptx::prmt(words[s / 2], mine, 0x7704u | static_cast<uint32_t>(2 * (s % 2) + r) << 4) >> 1;
        out.halves[s][r] = *reinterpret_cast<const uint32_t*>(lane.tables + place);
      }
    }
    out.scales[0] = first.scale;
    out.scales[1] = second.scale;
  }
};

}  // namespace bitfold::cuda
