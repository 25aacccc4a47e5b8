// The formats with planes as sources of fragments (fragments.hpp), where k and the groups are whole pieces, so that
// rows are aligned as planes are: the fast way.
//
// A lane takes consecutive columns of its two rows, so that the four lanes of a row read 4 kLaneBytes bytes on end. All
// columns of a piece share a scale, which therefore comes to fp32 sums. Integers become halves by a mask and a "magic"
// exponent: a field whose lowest bit is bit p of a half, or'ed with the half 2^(10 - p), is the number 2^(10 - p) +
// code, and subtracting 2^(10 - p) + zero is exact. So no sum of x is needed for zero points. Codebooks go through a
// table of pairs (a byte of two codes is 32 bits of two halves) of which each lane has a copy in a bank of its own.
//
// How scales are stored and whether there are zero points is asked at every piece, but where a Manner knows it.
#pragma once

#include <utility>

#include "cuda/fragments.hpp"
#include "formats/codebooks.hpp"
#include "formats/codec.hpp"

namespace bitfold::cuda {

// ---- codes to halves ----

// How a lane's words of consecutive codes become halves: value(words, step, r) is b_r's partner, and its half h is the
// code column(step, 2 r + h) of the lane, times 1 / kUnit. `zero` has the zero point in both halves.
template <int Row>
struct PlaneCodes;

// 2^(10 - p) in both halves.
BITFOLD_HOST_DEVICE constexpr uint32_t magic(int p) { return 0x00010001u * static_cast<uint32_t>((25 - p) << 10); }

// The fields of `Bits` bits at bit p of both halves, less `zero`. p + Bits <= 10.
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
    return field_value<2>(words[step / 4] >> 8 * (step / 2 % 2), 4 * (step % 2) + 2 * r, zero);
  }
};

template <>
struct PlaneCodes<kInt3> {
  using Tables = NoTables;
  static constexpr float kUnit = 1.0f;
  // Pairs (i, i + 8) of 16 codes, 48 bits: `pairs` has bits [0, 16) and [24, 40), of which pairs 0 to 2 are in reach of
  // a magic exponent as they lie, 3 and 4 after a shift, and bits [15, 31) and [39, 55) have the others.
  static constexpr int column(int step, int half) { return 2 * step + half / 2 + 8 * (half % 2); }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t zero, const Tables&) {
    const int pair = 2 * step + r;
    if (pair < 5) {
      const uint32_t pairs = ptx::prmt(words[0], ptx::funnel_right(words[0], words[1], 24), 0x5410);
      return pair < 3 ? field_value<3>(pairs, 3 * pair, zero) : field_value<3>(pairs >> 9, 3 * (pair - 3), zero);
    }
    return field_value<3>(ptx::prmt(words[0] >> 15, words[1] >> 7, 0x5410), 3 * (pair - 5), zero);
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

// The halves of both codes of a byte. nf4 and fp4 differ in nothing but this, so that kernels are nf4's for both.
BITFOLD_DEVICE uint32_t codebook_pair(int row, uint32_t byte) {
  const auto value = [row](uint32_t code) {
    return row == kFp4 ? code_value<kFp4>(code, 0) : code_value<kNf4>(code, 0);
  };
  return ptx::floats_to_halves(value(byte >> 4), value(byte & 15u));
}

// Entry e is the halves of the codes e / 16 and e % 16, once for each lane: lane l finds its own at byte 256 e + 4 l,
// which one permutation puts together, and always in bank l. Half of the place stays empty.
struct PairTables {
  uint32_t pairs[256][64];
  float dynamic_map[256];

  BITFOLD_DEVICE void fill(int row, int thread, int threads) {
    for (int i = thread; i < 256 * kWarp; i += threads) {
      pairs[i / kWarp][i % kWarp] = codebook_pair(row, static_cast<uint32_t>(i / kWarp));
    }
    for (int i = thread; i < 256; i += threads) dynamic_map[i] = kDynamicMap[static_cast<size_t>(i)];
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

// ---- scales and zero points ----

// The matrix as a kernel's parameter.
struct PlaneMatrix {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // null: none
  const float* nested_scales;
  const float* nested_offset;
  int64_t n;
  int64_t row_bytes;   // of codes
  int64_t row_scales;  // from the first scale of a row to that of the next: 0 where the matrix has one
  int64_t row_zeros;   // the same of zeros, in bytes
  Divider pieces;      // of a group
  int row;             // of the table of formats
  Scale scale;
  int scale_bytes;
};

// Bytes from the zero points of a row to those of the next.
inline int64_t row_zero_bytes(const Format& format, int64_t k) {
  return format.group == kPerTensor ? 0 : bitfold::ceil_div(groups_in_row(format, k) * format.bits(), 8);
}

inline PlaneMatrix plane_matrix(const Weight& w, int columns_of_piece) {
  constexpr uint32_t kAll = (1u << 31) - 1;
  const int64_t group = w.format.group, groups = groups_in_row(w.format, w.k);
  const auto pieces = group < 1 ? kAll : static_cast<uint32_t>(smaller<int64_t>(group / columns_of_piece, kAll));
  return {
      .codes = static_cast<const uint8_t*>(w.codes),
      .scales = static_cast<const uint8_t*>(w.scales),
      .zeros = w.zeros,
      .nested_scales = w.nested_scales,
      .nested_offset = w.nested_offset,
      .n = w.n,
      .row_bytes = bitfold::ceil_div(w.k * w.format.bits(), int64_t{8}),
      .row_scales = group == kPerTensor ? 0 : groups,
      .row_zeros = row_zero_bytes(w.format, w.k),
      .pieces = Divider::of(pieces),
      .row = w.format.row,
      .scale = w.format.scale,
      .scale_bytes = static_cast<int>(dtype_bits(scale_dtype(w.format.scale)) / 8),
  };
}

// What a lane has loaded of the scales of a group of its two rows, to be looked at when it has arrived.
// `stored` is how scales are stored: F32, Nested, or F16 for both kinds of 16 bits.
struct LoadedScales {
  uint32_t bits[2];
  uint32_t nested[2];

  BITFOLD_DEVICE void load(const PlaneMatrix& w, Scale stored, const uint8_t* const (&from)[2]) {
    if (stored == Scale::F32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) bits[i] = ptx::load4(from[i]);
    } else if (stored == Scale::Nested) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bits[i] = ptx::load1(from[i]);
        nested[i] = ptx::load4(w.nested_scales + static_cast<uint32_t>(from[i] - w.scales) / kNestedGroup);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) bits[i] = ptx::load2(from[i]);
    }
  }
  // dynamic_map: of nested scales.
  BITFOLD_DEVICE Scales values(const PlaneMatrix& w, Scale stored, const float* dynamic_map) const {
    Scales scales;
    if (stored == Scale::F32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales.of[i] = ptx::uint_as_float(bits[i]);
    } else if (stored == Scale::Nested) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales.of[i] = ptx::add(ptx::mul(dynamic_map[bits[i]], ptx::uint_as_float(nested[i])), *w.nested_offset);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto half = static_cast<uint16_t>(bits[i]);
        scales.of[i] = w.scale == Scale::BF16 ? ptx::bf16_to_float(half) : ptx::half_to_float(half);
      }
    }
    return scales;
  }
};

// The same of zero points. Codes of 3 bits may straddle two bytes: then even lanes have the first, odd ones the second.
template <int Bits>
struct LoadedZeros {
  static constexpr bool kStraddles = 8 % Bits != 0;
  uint32_t bytes[2];

  // rows: bytes from the plane's begin to the two rows' zero points.
  BITFOLD_DEVICE void load(const PlaneMatrix& w, const uint32_t (&rows)[2], uint32_t group) {
    const uint32_t bit = group * Bits;
    uint32_t at = bit / 8;
    if (kStraddles && bit % 8 + Bits > 8) at += ptx::lane_id() % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) bytes[i] = ptx::load1(w.zeros + rows[i] + at);
  }
  // In both halves. By all lanes of a warp.
  BITFOLD_DEVICE uint32_t pair(int i, uint32_t group) const {
    uint32_t bits = bytes[i];
    if constexpr (kStraddles) {
      bits = ptx::prmt(bits, ptx::shuffle_xor(bits, 1), ptx::lane_id() % 2 == 0 ? 0x1140 : 0x1104);
    }
    return 0x00010001u * (bits >> group * Bits % 8 & ((1u << Bits) - 1u));
  }
};

// ---- the source ----

template <int Row, int Columns>
class PlaneFragments {
  using Codes = PlaneCodes<Row>;
  static constexpr int kBits = kFormats[Row].bits;
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr bool kNested = kFormats[Row].nested;
  static constexpr int kLaneColumns = Columns / 4;
  static constexpr uint32_t kMiddle = 0x00010001u << (kBits - 1);
  // int3: a lane's 6 bytes lie in 8 that it shares with its neighbour.
  static constexpr int kWords = Row == kInt3 ? 2 : kLaneColumns * kBits / 32;
  static_assert(Row == kInt3 ? Columns == 64 : kWords == 1 || kWords == 2 || kWords == 4);

 public:
  static constexpr int kColumns = Columns;
  static constexpr int kSteps = Columns / 16;
  static constexpr int kSections = 1;
  static constexpr int kMins = 0;
  static constexpr int kLaneBytes = kLaneColumns * kBits / 8;
  static constexpr int kRoom = 0;
  static constexpr float kUnit = 1.0f;
  static_assert(kSteps % 2 == 0);

  static constexpr int column(int step, int t, int half) { return t * kLaneColumns + Codes::column(step, half); }

  static bool fits(const Weight& w) {
    const int64_t group = w.format.group;
    return w.layout == Layout::Rows && w.k % Columns == 0 && (group < 1 || group % Columns == 0) &&
           groups_in_row(w.format, w.k) * w.n < int64_t{1} << 32;
  }

  using Matrix = PlaneMatrix;
  static Matrix matrix(const Weight& w) { return plane_matrix(w, Columns); }

  using Tables = typename Codes::Tables;
  BITFOLD_DEVICE static void fill(const Matrix& w, Tables& tables, int thread, int threads) {
    if constexpr (kFormats[Row].grid == Grid::Codebook) tables.fill(w.row, thread, threads);
  }

  struct Slot {
    uint32_t words[2][kWords];
    LoadedScales scales;
    LoadedZeros<kBits> zeros;
    uint32_t zero[2];  // of an open piece, in both halves
  };

  BITFOLD_DEVICE static Manner manner(const Matrix& w) {
    const Scale stored = stored_as<Manner::Any>(w);
    if (w.zeros == nullptr && stored == stored_as<Manner::Plain>(w)) return Manner::Plain;
    if constexpr (kInteger || kNested) {
      if ((kNested || w.zeros != nullptr) && stored == stored_as<Manner::Full>(w)) return Manner::Full;
    }
    return Manner::Any;
  }

  PlaneFragments() = default;
  BITFOLD_DEVICE PlaneFragments(const Matrix& w, int64_t row, const Tables& tables) : w_(&w), tables_(&tables) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    for (int i = 0; i < 2; ++i) {
      const int64_t mine = smaller<int64_t>(row + g + 8 * i, w.n - 1);
      codes_[i] = w.codes + mine * w.row_bytes + (Row == kInt3 ? 6 * t / 4 * 4 : kLaneBytes * t);
      scales_[i] = w.scales + mine * w.row_scales * w.scale_bytes;
      zeros_[i] = static_cast<uint32_t>(mine * w.row_zeros);
    }
  }

  template <Manner M>
  BITFOLD_DEVICE void fetch(Slot& slot, int piece, std::byte*) const {
    const uint32_t group = w_->pieces.divide(static_cast<uint32_t>(piece));
    const uint8_t* scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words(codes_[i] + int64_t{piece} * (Columns * kBits / 8), slot.words[i]);
      scales[i] = scales_[i] + uint64_t{group} * static_cast<uint32_t>(w_->scale_bytes);
    }
    slot.scales.load(*w_, stored_as<M>(*w_), scales);
    if (has_zeros<M>(*w_)) slot.zeros.load(*w_, zeros_, group);
  }

  template <Manner M>
  BITFOLD_DEVICE void open(Slot& slot, int piece, const std::byte*) const {
    if constexpr (Row == kInt3) {  // lanes 1 and 3 begin in the middle of a word
      const uint32_t shift = 16 * (ptx::lane_id() % 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        slot.words[i][0] = ptx::funnel_right(slot.words[i][0], slot.words[i][1], shift);
        slot.words[i][1] >>= shift;
      }
    }
    slot.zero[0] = slot.zero[1] = kMiddle;
    if (has_zeros<M>(*w_)) {
      const uint32_t group = w_->pieces.divide(static_cast<uint32_t>(piece));
#pragma unroll
      for (int i = 0; i < 2; ++i) slot.zero[i] = slot.zeros.pair(i, group);
    }
  }

  BITFOLD_DEVICE void step(const Slot& slot, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[kLow0 + i] = Codes::value(slot.words[i], step, 0, slot.zero[i], *tables_);
      a[kLow1 + i] = Codes::value(slot.words[i], step, 1, slot.zero[i], *tables_);
    }
  }

  template <Manner M>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int) const {
    const float* dynamic_map = nullptr;
    if constexpr (kNested) dynamic_map = tables_->dynamic_map;
    return slot.scales.values(*w_, stored_as<M>(*w_), dynamic_map);
  }

 private:
  template <Manner M>
  BITFOLD_DEVICE static Scale stored_as(const Matrix& w) {
    if (M == Manner::Plain) return kFormats[Row].scale;
    if (M == Manner::Full) return kNested ? Scale::Nested : kFormats[Row].scale;
    return w.scale == Scale::F32 || (kNested && w.scale == Scale::Nested) ? w.scale : Scale::F16;
  }

  template <Manner M>
  BITFOLD_DEVICE static bool has_zeros(const Matrix& w) {
    return kInteger && (M == Manner::Full || (M == Manner::Any && w.zeros != nullptr));
  }

  // Loads that leave nothing of a sector for others take no place in the first cache.
  BITFOLD_DEVICE static void load_words(const uint8_t* from, uint32_t (&words)[kWords]) {
    if constexpr (Row == kInt3) {
      words[0] = ptx::load4(from);
      words[1] = ptx::load4(from + 4);
    } else if constexpr (kWords == 4) {
      const uint4 loaded = ptx::load_streaming16(from);
      words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else if constexpr (kWords == 2) {
      const uint2 loaded = ptx::load_streaming8(from);
      words[0] = loaded.x, words[1] = loaded.y;
    } else {
      words[0] = ptx::load4(from);
    }
  }

  const Matrix* w_;
  const Tables* tables_;
  const uint8_t *codes_[2], *scales_[2];  // of the two rows
  uint32_t zeros_[2];                     // from the plane's begin
};

}  // namespace bitfold::cuda
