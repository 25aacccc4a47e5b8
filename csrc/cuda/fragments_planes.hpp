// The formats with planes as sources of fragments (fragments.hpp), where k and the groups are whole pieces, so that
// rows are aligned as planes are: the fast way.
//
// A lane takes consecutive columns of its two rows, so that the four lanes of a row read 4 kLaneBytes bytes on end. All
// columns of a piece share a scale, which therefore comes to fp32 sums. Integers become halves by a mask and a "magic"
// exponent: a field whose lowest bit is bit p of a half, or'ed with the half 2^(10 - p), is the number 2^(10 - p) +
// code, and subtracting 2^(10 - p) + zero is exact. So no sum of x is needed for zero points. Codebooks go through a
// table of pairs (a byte of two codes is 32 bits of two halves) of which each lane has a copy in a bank of its own.
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

// Entry e is the halves of the codes e / 16 and e % 16, once for each lane: lane l finds its own at byte 256 e + 4 l,
// which one permutation puts together, and always in bank l. Half of the place stays empty.
struct PairTables {
  uint32_t pairs[256][64];
  float dynamic_map[256];

  template <int Row>
  BITFOLD_DEVICE void fill(int thread, int threads) {
    for (int i = thread; i < 256 * kWarp; i += threads) {
      const auto code = static_cast<uint32_t>(i / kWarp);
      pairs[code][i % kWarp] = ptx::floats_to_halves(code_value<Row>(code >> 4, 0), code_value<Row>(code & 15u, 0));
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

template <int Row>
struct CodebookCodes {
  using Tables = PairTables;
  static constexpr float kUnit = 1.0f;
  static constexpr int column(int step, int half) { return 4 * step + half; }
  BITFOLD_DEVICE static uint32_t value(const uint32_t* words, int step, int r, uint32_t, const Tables& tables) {
    return tables.pair(words[step / 2], 2 * (step % 2) + r);
  }
};
template <>
struct PlaneCodes<kNf4> : CodebookCodes<kNf4> {};
template <>
struct PlaneCodes<kFp4> : CodebookCodes<kFp4> {};

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
  Scale scale;
};

// Bytes from the zero points of a row to those of the next.
inline int64_t row_zero_bytes(const Format& format, int64_t k) {
  return format.group == kPerTensor ? 0 : bitfold::ceil_div(groups_in_row(format, k) * format.bits(), 8);
}

template <int Row>
PlaneMatrix plane_matrix(const Weight& w, int columns_of_piece) {
  constexpr uint32_t kAll = (1u << 31) - 1;
  constexpr int kBits = kFormats[Row].bits;
  const int64_t group = w.format.group, groups = groups_in_row(w.format, w.k);
  const auto pieces = group < 1 ? kAll : static_cast<uint32_t>(smaller<int64_t>(group / columns_of_piece, kAll));
  return {
      .codes = static_cast<const uint8_t*>(w.codes),
      .scales = static_cast<const uint8_t*>(w.scales),
      .zeros = w.zeros,
      .nested_scales = w.nested_scales,
      .nested_offset = w.nested_offset,
      .n = w.n,
      .row_bytes = bitfold::ceil_div(w.k * kBits, 8),
      .row_scales = group == kPerTensor ? 0 : groups,
      .row_zeros = row_zero_bytes(w.format, w.k),
      .pieces = Divider::of(pieces),
      .scale = w.format.scale,
  };
}

// What a lane has loaded of the scale of a row's group; to be looked at when the loads have arrived.
template <Scale Stored>
struct LoadedScale {
  uint32_t bits;
  float nested;

  BITFOLD_DEVICE static bool is(const PlaneMatrix& w, Scale scale) {
    return Stored == Scale::None ? w.scale == scale : Stored == scale;
  }
  BITFOLD_DEVICE static int bytes(const PlaneMatrix& w) { return is(w, Scale::F32) ? 4 : is(w, Scale::Nested) ? 1 : 2; }
  // byte: of the plane.
  template <class Byte>
  BITFOLD_DEVICE void load(const PlaneMatrix& w, Byte byte) {
    const uint8_t* from = w.scales + byte;
    if (is(w, Scale::F32)) {
      bits = ptx::load4(from);
    } else if (is(w, Scale::Nested)) {
      bits = ptx::load1(from);
      nested = ptx::uint_as_float(ptx::load4(w.nested_scales + byte / static_cast<Byte>(kNestedGroup)));
    } else {
      bits = ptx::load2(from);
    }
  }
  BITFOLD_DEVICE float value(const PlaneMatrix& w, const float* dynamic_map) const {
    if (is(w, Scale::F32)) return ptx::uint_as_float(bits);
    if (!is(w, Scale::Nested)) {
      const auto half = static_cast<uint16_t>(bits);
      return w.scale == Scale::BF16 ? ptx::bf16_to_float(half) : ptx::half_to_float(half);
    }
    return ptx::add(ptx::mul(dynamic_map[bits], nested), *w.nested_offset);
  }
};

// The same of zero points: the bytes that hold code `group` of a row, and where in them it begins.
template <int Bits>
struct LoadedZero {
  static constexpr bool kStraddles = 8 % Bits != 0;
  uint32_t low, high, shift;

  BITFOLD_DEVICE void load(const uint8_t* row, uint32_t group) {
    const uint32_t bit = group * Bits;
    shift = bit % 8;
    low = ptx::load1(row + bit / 8);
    high = kStraddles && shift + Bits > 8 ? ptx::load1(row + bit / 8 + 1) : 0;
  }
  BITFOLD_DEVICE void symmetric() { low = 1u << (Bits - 1), high = 0, shift = 0; }
  BITFOLD_DEVICE uint32_t value() const {
    return ((kStraddles ? low | high << 8 : low) >> shift) & ((1u << Bits) - 1u);
  }
};

// ---- the source ----

template <int Row, int Columns, Scale Stored, bool Zeros>
class PlaneFragments {
  using Codes = PlaneCodes<Row>;
  static constexpr int kBits = kFormats[Row].bits;
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr bool kZeros = kInteger && Zeros;
  static constexpr bool kNested = kFormats[Row].nested;
  static constexpr int kLaneColumns = Columns / 4;
  static constexpr uint32_t kMiddle = 0x00010001u << (kBits - 1);
  static constexpr int64_t kFar = int64_t{1} << 32;
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
           knows_scale(w.format.scale) && (Zeros || w.zeros == nullptr) &&
           groups_in_row(w.format, w.k) * w.n < kFar / 4;
  }
  static constexpr bool knows_scale(Scale scale) {
    return Stored == Scale::None || scale == Stored || (Stored == Scale::F16 && scale == Scale::BF16);
  }

  using Matrix = PlaneMatrix;
  static Matrix matrix(const Weight& w) { return plane_matrix<Row>(w, Columns); }

  using Tables = typename Codes::Tables;
  BITFOLD_DEVICE static void fill(Tables& tables, int thread, int threads) {
    if constexpr (kFormats[Row].grid == Grid::Codebook) tables.template fill<Row>(thread, threads);
  }

  struct Slot {
    uint32_t words[2][kWords];
    LoadedScale<Stored> scale[2];
    LoadedZero<kBits> zero[2];
  };

  PlaneFragments() = default;
  BITFOLD_DEVICE PlaneFragments(const Matrix& w, int64_t row, const Tables& tables) : w_(&w), tables_(&tables) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    for (int i = 0; i < 2; ++i) {
      const int64_t mine = smaller<int64_t>(row + g + 8 * i, w.n - 1);
      codes_[i] = w.codes + mine * w.row_bytes + (Row == kInt3 ? 6 * t / 4 * 4 : kLaneBytes * t);
      scales_[i] = static_cast<uint32_t>(mine * w.row_scales * LoadedScale<Stored>::bytes(w));
      zeros_[i] = static_cast<uint32_t>(mine * w.row_zeros);
    }
  }

  BITFOLD_DEVICE void fetch(Slot& slot, int piece, std::byte*) const {
    const int64_t at = int64_t{piece} * (Columns * kBits / 8);
    const uint32_t group = w_->pieces.divide(static_cast<uint32_t>(piece));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words(codes_[i] + at, slot.words[i]);
      slot.scale[i].load(*w_, scales_[i] + group * static_cast<uint32_t>(LoadedScale<Stored>::bytes(*w_)));
    }
    if constexpr (kZeros) {
#pragma unroll
      for (int i = 0; i < 2; ++i) slot.zero[i].symmetric();
      if (w_->zeros != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) slot.zero[i].load(w_->zeros + zeros_[i], group);
      }
    }
  }

  BITFOLD_DEVICE void open(Slot& slot, int, const std::byte*) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Row == kInt3) {  // lanes 1 and 3 begin in the middle of a word
        const uint32_t shift = 16 * (ptx::lane_id() % 2);
        slot.words[i][0] = ptx::funnel_right(slot.words[i][0], slot.words[i][1], shift);
        slot.words[i][1] >>= shift;
      }
    }
  }

  BITFOLD_DEVICE void step(const Slot& slot, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t zero = kZeros ? 0x00010001u * slot.zero[i].value() : kMiddle;
      a[kLow0 + i] = Codes::value(slot.words[i], step, 0, zero, *tables_);
      a[kLow1 + i] = Codes::value(slot.words[i], step, 1, zero, *tables_);
    }
  }

  BITFOLD_DEVICE Scales scales(const Slot& slot, int) const {
    const float* dynamic_map = nullptr;
    if constexpr (kNested) dynamic_map = tables_->dynamic_map;
    return {{slot.scale[0].value(*w_, dynamic_map), slot.scale[1].value(*w_, dynamic_map)}};
  }

 private:
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
  const uint8_t* codes_[2];
  uint32_t scales_[2], zeros_[2];  // bytes from the plane's begin to that of the row
};

template <int Row, int Columns, Scale Stored, bool Zeros>
  requires(kFormats[Row].grid == Grid::Minifloat || kFormats[Row].grid == Grid::Integer ||
           kFormats[Row].grid == Grid::Codebook)
class Fragments<Row, Columns, Stored, Zeros> : public PlaneFragments<Row, Columns, Stored, Zeros> {
  using PlaneFragments<Row, Columns, Stored, Zeros>::PlaneFragments;
};

// Columns of the pieces that a format has, the widest first, and the scales that are known while compiling. Whatever
// they don't fit has pieces of kNarrow columns of any scale, or is ragged.
template <int Row>
struct Pieces {
  using Widths = std::integer_sequence<int, 64>;
  static constexpr int kNarrow = 32;
};
struct NibblePieces {
  using Widths = std::integer_sequence<int, 128, 64>;
  static constexpr int kNarrow = 32;
};
template <>
struct Pieces<kInt4> : NibblePieces {};
template <>
struct Pieces<kNf4> : NibblePieces {};
template <>
struct Pieces<kFp4> : NibblePieces {};
template <>
struct Pieces<kInt3> {
  using Widths = std::integer_sequence<int, 64>;
  static constexpr int kNarrow = 64;
};
template <>
struct Pieces<kInt2> {
  using Widths = std::integer_sequence<int, 128, 64>;
  static constexpr int kNarrow = 64;
};

}  // namespace bitfold::cuda
