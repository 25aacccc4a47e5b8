// The format table: every weight format is one row here, and nothing about it is written anywhere else.
//
// A format string ("int4-g128-asym") is a row plus run-time parameters (group, zero, scale dtype). Sizes are arithmetic
// on the row; docs/formats.md says in words what this file says in numbers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace bitfold {

// Block: codes, scales and minima of a fixed number of columns lie together, as GGUF files have them (blocks.hpp).
enum class Grid : uint8_t { Cast, Minifloat, Integer, Codebook, Block };
enum class DType : uint8_t { U8, F16, BF16, F32, F64 };
// How the scale of a group is stored; Nested is an 8-bit code with scales of its own (QLoRA's double quantization).
enum class Scale : uint8_t { None, F16, BF16, F32, Nested };
enum class Zero : uint8_t { None, Integer };
// Rows: groups never cross rows. Flat: the matrix is one row of n * k columns (bitsandbytes' straddling blocks).
enum class Layout : uint8_t { Rows, Flat };
// What a product takes x as: the numbers that it holds, or whole numbers of 8 bits times a step for each block.
enum class Activations : uint8_t { Float, Int8 };

// Group sizes below 1 name the granularities that depend on the matrix.
inline constexpr int64_t kPerTensor = 0;
inline constexpr int64_t kPerChannel = -1;
inline constexpr int64_t kNestedGroup = 256;

struct FormatRow {
  std::string_view family;
  Grid grid;
  int bits;        // of one code
  float grid_max;  // largest magnitude on the symmetric grid
  Scale scale;     // default
  int64_t group;   // default granularity
  int64_t min_group;
  int64_t max_group;
  char group_letter;  // 'g' or 'b' in the format string
  bool asymmetric;    // may carry an integer zero point
  bool nested;        // may nest its scales
  bool high_first;    // the even code of a byte sits in the high nibble
  int block_bytes;    // of a block of `group` columns; 0 for the formats with planes
  bool tall;          // a scale may be for some columns of several rows
};

inline constexpr int64_t kAnyGroup = int64_t{1} << 40;

// fp8 scales are fp32: the largest weight over 57344 is below what fp16 holds for ordinary weights.
// A GGUF block type: `bits` of a code, `values` columns in `bytes` bytes. It has no parameters.
constexpr FormatRow block_row(std::string_view family, int bits, int64_t values, int bytes) {
  return {family, Grid::Block, bits, 0.0f, Scale::None, values, 0, 0, ' ', false, false, false, bytes, false};
}

inline constexpr std::array kFormats = {
    FormatRow{"fp16", Grid::Cast, 16, 65504.0f, Scale::None, kPerTensor, 0, 0, ' ', false, false, false, 0, false},
    FormatRow{"bf16", Grid::Cast, 16, 3.3895313892515355e38f, Scale::None, kPerTensor, 0, 0, ' ', false, false, false,
              0, false},
    FormatRow{"fp8-e4m3", Grid::Minifloat, 8, 448.0f, Scale::F32, kPerChannel, 16, kAnyGroup, 'g', false, false, false,
              0, true},
    FormatRow{"fp8-e5m2", Grid::Minifloat, 8, 57344.0f, Scale::F32, kPerChannel, 16, kAnyGroup, 'g', false, false,
              false, 0, true},
    FormatRow{"int8", Grid::Integer, 8, 127.0f, Scale::F16, kPerChannel, 16, kAnyGroup, 'g', true, false, false, 0,
              false},
    FormatRow{"int4", Grid::Integer, 4, 7.0f, Scale::F16, 128, 16, kAnyGroup, 'g', true, false, false, 0, false},
    FormatRow{"int3", Grid::Integer, 3, 3.0f, Scale::F16, 64, 16, kAnyGroup, 'g', true, false, false, 0, false},
    FormatRow{"int2", Grid::Integer, 2, 1.0f, Scale::F16, 64, 16, kAnyGroup, 'g', true, false, false, 0, false},
    FormatRow{"nf4", Grid::Codebook, 4, 1.0f, Scale::F32, 64, 32, 4096, 'b', false, true, true, 0, false},
    FormatRow{"fp4", Grid::Codebook, 4, 1.0f, Scale::F32, 64, 32, 4096, 'b', false, true, true, 0, false},
    block_row("q4_0", 4, 32, 18),
    block_row("q4_1", 4, 32, 20),
    block_row("q5_0", 5, 32, 22),
    block_row("q5_1", 5, 32, 24),
    block_row("q8_0", 8, 32, 34),
    block_row("q2_k", 2, 256, 84),
    block_row("q3_k", 3, 256, 110),
    block_row("q4_k", 4, 256, 144),
    block_row("q5_k", 5, 256, 176),
    block_row("q6_k", 6, 256, 210),
    block_row("iq4_nl", 4, 32, 18),
    block_row("iq4_xs", 4, 256, 136),
    block_row("mxfp4", 4, 32, 17),
};

// Row numbers, for kernels that are instantiated per row.
enum Row : int {
  kFp16,
  kBf16,
  kE4m3,
  kE5m2,
  kInt8,
  kInt4,
  kInt3,
  kInt2,
  kNf4,
  kFp4,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Nl,
  kIq4Xs,
  kMxfp4,
  kRowCount
};
static_assert(kFormats.size() == kRowCount);
static_assert(kFormats[kInt4].family == "int4" && kFormats[kFp4].family == "fp4" &&
              kFormats[kE5m2].family == "fp8-e5m2" && kFormats[kQ4_0].family == "q4_0" &&
              kFormats[kMxfp4].family == "mxfp4");

// One weight format, parsed: a row and its parameters.
struct Format {
  int row;
  int64_t group;  // kPerTensor, kPerChannel, or columns of a group
  Zero zero;
  Scale scale;
  int row_shift = 0;  // log2 of the rows that share their scales; kPerTensor: all do

  constexpr const FormatRow& info() const { return kFormats[static_cast<size_t>(row)]; }
  constexpr int bits() const { return info().bits; }
  constexpr bool is_block() const { return info().grid == Grid::Block; }
  constexpr bool operator==(const Format&) const = default;
};

// Throws std::invalid_argument with one sentence that names the format, what is wrong, and a near match.
Format parse_format(std::string_view text);
std::string to_string(const Format& format);
Layout parse_layout(std::string_view text);
// "float" or "int8". Throws where `format` has no products of the kind.
Activations parse_activations(std::string_view text, const Format& format);

// ---- sizes ----

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The planes that a weight can have; a format has some of them, in this order.
enum PlaneIndex : int { kCodes, kScales, kZeros, kNestedScales, kNestedOffset, kMaxPlanes };

// The size law of one plane as plain numbers, so that Python can divide symbolic sizes by them:
//   entries of a row = per > 0 ? ceil(k / per) : 1;  columns = ceil(entries * bits / unit);
//   rows = rows_per > 0 ? ceil(n / rows_per) : 1;
//   shape = nested_per > 0 ? [ceil(rows * entries / nested_per)] : [rows, columns].
struct PlaneLaw {
  PlaneIndex plane;
  std::string_view name;
  DType dtype;
  int64_t rows_per;
  int64_t per;
  int64_t bits;
  int64_t unit;        // bits of one stored element
  int64_t nested_per;  // > 0: a vector, one element for so many entries of the whole matrix (kOneElement: just one)
};
inline constexpr int64_t kOneElement = int64_t{1} << 62;

struct PlaneLaws {
  std::array<PlaneLaw, kMaxPlanes> items;
  int count;
};

constexpr DType scale_dtype(Scale scale) {
  switch (scale) {
    case Scale::F16: return DType::F16;
    case Scale::BF16: return DType::BF16;
    case Scale::F32: return DType::F32;
    default: return DType::U8;
  }
}

constexpr int64_t dtype_bits(DType dtype) {
  switch (dtype) {
    case DType::U8: return 8;
    case DType::F16:
    case DType::BF16: return 16;
    case DType::F32: return 32;
    default: return 64;
  }
}

constexpr PlaneLaws plane_laws(const Format& format) {
  const FormatRow& row = format.info();
  const int64_t scale_rows = format.group == kPerTensor ? 0 : int64_t{1} << format.row_shift;
  const int64_t per = format.group > 0 ? format.group : 0;
  PlaneLaws laws{};
  auto add = [&](PlaneLaw law) { laws.items[static_cast<size_t>(laws.count++)] = law; };
  if (row.grid == Grid::Cast) {
    add({kCodes, "codes", format.row == kFp16 ? DType::F16 : DType::BF16, 1, 1, 16, 16, 0});
    return laws;
  }
  if (format.is_block()) {
    add({kCodes, "blocks", DType::U8, 1, per, 8 * row.block_bytes, 8, 0});
    return laws;
  }
  const DType scale = scale_dtype(format.scale);
  add({kCodes, "codes", DType::U8, 1, 1, row.bits, 8, 0});
  add({kScales, "scales", scale, scale_rows, per, dtype_bits(scale), dtype_bits(scale), 0});
  if (format.zero == Zero::Integer) add({kZeros, "zeros", DType::U8, scale_rows, per, row.bits, 8, 0});
  if (format.scale == Scale::Nested) {
    add({kNestedScales, "nested_scales", DType::F32, scale_rows, per, 32, 32, kNestedGroup});
    add({kNestedOffset, "nested_offset", DType::F32, 0, 0, 32, 32, kOneElement});
  }
  return laws;
}

struct Extent {
  int dims;
  int64_t rows;
  int64_t columns;
  constexpr int64_t elements() const { return rows * columns; }
};

constexpr Extent plane_extent(const PlaneLaw& law, int64_t n, int64_t k) {
  const int64_t rows = law.rows_per > 0 ? ceil_div(n, law.rows_per) : 1;
  const int64_t entries = law.per > 0 ? ceil_div(k, law.per) : 1;
  if (law.nested_per == kOneElement) return {1, 1, 1};
  if (law.nested_per > 0) return {1, 1, ceil_div(rows * entries, law.nested_per)};
  return {2, rows, ceil_div(entries * law.bits, law.unit)};
}

constexpr int64_t stored_bytes(const Format& format, int64_t n, int64_t k) {
  const PlaneLaws laws = plane_laws(format);
  int64_t bytes = 0;
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    bytes += plane_extent(law, n, k).elements() * law.unit / 8;
  }
  return bytes;
}

// Groups of a row (of the one flat row, when k is n * k).
constexpr int64_t groups_in_row(const Format& format, int64_t k) {
  return format.group > 0 ? ceil_div(k, format.group) : 1;
}
// The row of the plane of scales that row `row` of the weight has its scales in.
constexpr int64_t scale_row(const Format& format, int64_t row) {
  return format.group == kPerTensor ? 0 : row >> format.row_shift;
}

// 4096 x 4096 at the defaults, in bits per weight: the figures that people quote.
constexpr double bits_per_weight(const Format& f, int64_t n, int64_t k) {
  return 8.0 * static_cast<double>(stored_bytes(f, n, k)) / (static_cast<double>(n) * static_cast<double>(k));
}
static_assert(stored_bytes({kFp16, kPerTensor, Zero::None, Scale::None}, 3, 5) == 30);
static_assert(bits_per_weight({kInt4, 128, Zero::None, Scale::F16}, 4096, 4096) == 4.125);
static_assert(bits_per_weight({kInt4, 128, Zero::Integer, Scale::F16}, 4096, 4096) == 4.15625);
static_assert(bits_per_weight({kInt3, 64, Zero::None, Scale::F16}, 4096, 4096) == 3.25);
static_assert(bits_per_weight({kInt2, 64, Zero::None, Scale::F16}, 4096, 4096) == 2.25);
static_assert(bits_per_weight({kNf4, 64, Zero::None, Scale::F32}, 4096, 4096) == 4.5);
static_assert(stored_bytes({kE4m3, 128, Zero::None, Scale::F32, 7}, 130, 257) == 130 * 257 + 2 * 3 * 4);
static_assert(stored_bytes({kNf4, 64, Zero::None, Scale::Nested}, 4096, 4096) ==
              4096 * 2048 + 4096 * 64 + 4 * 1024 + 4);  // 4.127 bits
static_assert(stored_bytes({kInt8, kPerChannel, Zero::None, Scale::F16}, 4096, 4096) == 4096 * 4096 + 2 * 4096);
static_assert(stored_bytes({kInt8, kPerTensor, Zero::Integer, Scale::F16}, 3, 5) == 15 + 2 + 1);
static_assert(bits_per_weight({kQ4K, 256, Zero::None, Scale::None}, 4096, 4096) == 4.5);
static_assert(bits_per_weight({kQ6K, 256, Zero::None, Scale::None}, 4096, 4096) == 6.5625);
static_assert(stored_bytes({kInt3, 16, Zero::Integer, Scale::F16}, 2, 17) == 2 * 7 + 2 * 2 * 2 + 2 * 1);

}  // namespace bitfold
