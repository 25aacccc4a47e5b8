// What the kernels for x rounded to 8 bits share: their parameter, and how whole sums become numbers of y.
//
// The definition (formats/int8.hpp) says every operation in its order, so that a GPU's bits are a CPU's: sums of codes
// are whole numbers, and everything else is fp32, one rounding after the other, by ptx:: functions that no compiler
// contracts.
#pragma once

#include "cuda/linear_int8.hpp"
#include "cuda/matrix.hpp"

namespace bitfold::cuda {

inline constexpr int kInt8Lines = 128;  // lines, rows and tokens of tables come by so many
inline constexpr int kInt8Piece = 64;   // columns: 16 bytes for each of the four lanes that share a row

// How int8_tile is cut.
struct Int8Tiles {
  int64_t count;
  int64_t tokens;  // multiplied by one launch, and then made numbers by another: a multiple of kInt8Lines, or all
  int splits;      // of k, over blocks
  int block_tokens;
  bool wide;  // wgmma multiplies, and W's codes as they are; else they are 128 less
};
// A pure function of the shape and the GPU; no tiles where int8_rows multiplies.
Int8Tiles int8_tiles(int64_t m, int64_t n, int64_t k, const Gpu& gpu);

// The outliers without a copy among a piece's columns: which they are, and how many came before.
struct alignas(16) Int8Found {
  uint32_t before;
  uint32_t columns[2];  // bits
  uint32_t none;
};

// The first columns of a list as fp32, so that neighbours lie beside one another: what W has there (codes less their
// zero points, or the copy), and x. Codes are put there by int8_tile, past which they come; int8_rows needs them
// itself.
struct Int8Table {
  float* w;   // [lines, table_rows]
  float* x;   // [lines, table_tokens]
  int lines;  // that there is room for, a multiple of kInt8Lines
};

struct Int8Op {
  const uint8_t* codes;  // [n, k], 128 more than the int8
  const void* scales;    // [n], or one
  DType scale_dtype;
  bool one_scale;
  const uint8_t* zeros;  // as scales; null: 128
  int64_t n, k;
  MatrixIn x;
  const void* bias;  // may be null
  void* y;
  float threshold;
  bool finds;  // whether there is a threshold
  bool per_row;
  const float* x_scale;    // null: a step for each row
  const int32_t* columns;  // [copies]
  MatrixIn copy;           // [n, copies]
  int copies;

  // The workspace. A column's bit of each part of x's rows says whether one of them reaches the threshold.
  uint32_t* reached;  // [flag_parts, words]
  uint32_t* copied;   // [words]; null: no copies
  int64_t words;      // whole strips of them
  int flag_parts;
  int64_t flag_rows;       // of a part
  int32_t* outliers;       // those without a copy, ascending; there is room for k
  int32_t* outlier_count;  // null: none are looked for
  // Their columns, and those with a copy.
  Int8Table loose, exact;
  Int8Found* found;  // of each piece of columns; null: none are looked for
  int64_t table_rows, table_tokens;
  // Not 0: an outlier of x in the table is 2^120 or more, and times a code of 8 bits could be no number.
  uint32_t* loose_huge;
  int8_t* x_codes;  // [m, stride], zeros behind k
  int64_t stride;   // a multiple of kInt8Piece
  float* steps;     // [m]
  int32_t* sums;    // [m, parts]: of the codes of kPartColumns columns
  int parts;

  // Of int8_tile and int8_finish.
  Int8Tiles tiles;
  int32_t* partial;  // [split, x.rows, table_rows]: whole sums
};

// The launchers, in the order in which linear_int8.cpp calls them.
void int8_mark(const Int8Op& op, Stream stream);
void int8_round(const Int8Op& op, Stream stream);
void int8_rows(const Int8Op& op, Stream stream);    // anything, and fast for at most kInt8Tokens rows of x
void int8_tile(const Int8Op& op, Stream stream);    // where int8_tiles says that there are any
void int8_finish(const Int8Op& op, Stream stream);  // after int8_tile
inline constexpr int64_t kInt8Tokens = 8;

BITFOLD_DEVICE float int8_x(const Int8Op& op, int64_t row, int64_t column) {
  return read_float(op.x, row * op.x.row_stride + column * op.x.column_stride);
}
BITFOLD_DEVICE bool is_finite(float a) { return (ptx::float_as_uint(a) & 0x7fffffffu) < 0x7f800000u; }
BITFOLD_DEVICE float magnitude(float a) { return ptx::uint_as_float(ptx::float_as_uint(a) & 0x7fffffffu); }
BITFOLD_DEVICE bool reaches(const Int8Op& op, float x) { return is_finite(x) && magnitude(x) >= op.threshold; }

// What a row of W is made of.
struct Int8Row {
  float scale;
  int zero;
};
BITFOLD_DEVICE int64_t int8_scale(const Int8Op& op, int64_t row) { return op.one_scale ? 0 : row; }
BITFOLD_DEVICE int int8_zero(const Int8Op& op, int64_t row) {
  return op.zeros != nullptr ? op.zeros[int8_scale(op, row)] : 128;
}
BITFOLD_DEVICE Int8Row int8_row(const Int8Op& op, int64_t row) {
  return {read_float({op.scales, op.scale_dtype, 1, 1, 1, 1}, int8_scale(op, row)), int8_zero(op, row)};
}

// What a part of a row of x is made of.
struct alignas(8) Int8Token {
  float step;
  int sum;  // of its codes
};
BITFOLD_DEVICE Int8Token int8_token(const Int8Op& op, int64_t token, int part) {
  return {op.steps[token], op.sums[token * op.parts + part]};
}

// A part's sum as a number: what was summed is of codes less `less`, and the row's zero point is what they are less by.
BITFOLD_DEVICE float int8_part(int sum, int less, const Int8Row& row, const Int8Token& token) {
  const auto rest = static_cast<uint32_t>(less - row.zero) * static_cast<uint32_t>(token.sum);
  const auto whole = static_cast<int>(static_cast<uint32_t>(sum) + rest);
  return ptx::mul(static_cast<float>(whole), ptx::mul(token.step, row.scale));
}

// An outlier's number in a row of x: with thresholds by row it may be none there.
BITFOLD_DEVICE float int8_outlier(const Int8Op& op, int64_t token, int64_t column) {
  const float x = int8_x(op, token, column);
  return !op.per_row || reaches(op, x) ? x : 0.0f;
}
// fn(i, column) for the loose outliers of a piece, of which `column` is counted from its first, that have a place among
// the first `lines` of the list.
template <class Fn>
BITFOLD_DEVICE void each_found(const Int8Found& found, int lines, const Fn& fn) {
  auto i = static_cast<int>(found.before);
#pragma unroll
  for (int word = 0; word < 2; ++word) {
#pragma unroll 1
    for (uint32_t bits = found.columns[word]; bits != 0 && i < lines; bits &= bits - 1, ++i) {
      fn(i, 32 * word + 31 - ptx::clz(bits & (0u - bits)));
    }
  }
}
BITFOLD_DEVICE int int8_outliers(const Int8Op& op) { return op.outlier_count != nullptr ? *op.outlier_count : 0; }

// y of what its three sums are.
BITFOLD_DEVICE void int8_store(const Int8Op& op, int64_t token, int64_t row, float scale, float y, float loose,
                               float exact) {
  y = ptx::add(ptx::add(y, ptx::mul(scale, loose)), exact);
  if (op.bias != nullptr) y = ptx::add(y, read_float({op.bias, op.x.dtype, 1, 1, 1, 1}, row));
  write_number(op.y, op.x.dtype, token * op.n + row, y);
}

// Four codes of W, of which mma takes the int8.
BITFOLD_DEVICE uint32_t int8_codes(uint32_t four) { return four ^ 0x80808080u; }

}  // namespace bitfold::cuda
