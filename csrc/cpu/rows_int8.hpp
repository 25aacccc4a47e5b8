// The leaf kernels of products with x rounded to 8 bits, row by row (linear_rows_int8.cpp, kernels/rows_int8.inl).
#pragma once

#include <cstdint>

#include "cpu/kernels.hpp"

namespace bitfold::cpu {

// `columns` numbers of a row of x, as whole ones: clamped to -127 .. 127.
struct RowsInt8Round {
  const float* x;
  int64_t columns;
  float inverse;  // of the step
  int8_t* codes;
};

// sums[j * sum_stride + i] = the products of row i of the weight's codes, unsigned, with row j of x's, over `columns`
// columns, at most kPartColumns.
struct RowsInt8Products {
  const uint8_t* w;
  int64_t w_stride;
  int64_t rows;  // of the weight
  const int8_t* x;
  int64_t x_stride;
  int64_t columns;
  int64_t m;
  int32_t* sums;
  int64_t sum_stride;  // of `many` a multiple of kRowsInt8Block, and rows up to one are written
};
inline constexpr int64_t kRowsInt8Block = 64;

// y[i] (+)= (sums[i] - zeros[i] * codes_sum) * (step * scales[i]).
struct RowsInt8Scale {
  const int32_t* sums;
  const float* scales;
  const int32_t* zeros;
  int64_t rows;
  int32_t codes_sum;
  float step;
  bool first;  // of the parts
  float* y;
};

// sums[j * kRowsInt8Block + i] += x[j * x_stride + c] * panel[c * kRowsInt8Block + i], column by column: of each row of
// a block of the weight and each of m rows of x.
struct RowsInt8Sides {
  const float* panel;
  int64_t columns;
  const float* x;
  int64_t x_stride;
  int64_t m;
  float* sums;
};

struct RowsInt8Kernel {
  // largest[c] = the largest finite |x[c]| so far; columns up to a multiple of kAlign are read and written.
  void (*mark)(const float* x, int64_t columns, float* largest);
  int32_t (*round)(const RowsInt8Round&);  // returns the sum of the codes
  // Of m <= kFusedRows rows of x, one after the other; fused_rows(m) of them are read, and columns up to a multiple of
  // kRowsInt8Block, which are zeros.
  void (*few)(const RowsInt8Products&);
  // Of any m rows of x, in groups of `group` rows: four columns of each row in turn. x_stride is that of a group;
  // columns are zeros up to a multiple of kRowsInt8Block, and the last group's missing rows may be anything.
  void (*many)(const RowsInt8Products&);
  void (*scale)(const RowsInt8Scale&);
  void (*add_products)(const RowsInt8Sides&);
  int64_t group;
};

}  // namespace bitfold::cpu
