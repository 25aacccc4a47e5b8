// The seam for products of 8-bit weights with x rounded to 8 bits, row by row: what the op is told, on any device.
// docs/activations.md says what it means.
//
// A column of x is an outlier if some finite |x| of the call reaches the threshold (per_row: of this row), or if there
// is an exact copy of it. With C the columns that are none, f32() one rounding to fp32 and a the largest |x| in C:
//
//   code[j, c] = even(f32(x[j, c] * f32(127 / a[j])))       c in C, else 0; a < kSmallestRow: 0
//   step[j]    = f32(a[j] / 127)                            a < kSmallestRow: 0; x_scale: that, and codes are clamped
//   sum[j, i]  = sum over c of code[j, c] * (w's code[i, c] - zero[i]), exactly, in parts of kPartColumns columns
//   y[j, i]    = sum as fp32 * f32(step[j] * scale[i]), the parts added up in order
//              + scale[i] * (sum of x[j, c] * (w's code[i, c] - zero[i])), c the outliers without a copy
//              + sum of x[j, c] * copy[i, c], c the outliers that have one
//              + bias[i]
//
// The two sums over outliers begin with 0 and go on column by column, ascending: f32(sum + f32(x * w)), where the
// product is exact for 16-bit x. What doesn't occur adds nothing. A row with a NaN or an infinity is NaN throughout,
// and makes no column an outlier by these. With float64 x all of it is float64.
#pragma once

#include <cstdint>

#include "formats/args.hpp"

namespace bitfold {

struct LinearInt8Args {
  Weight w;  // int8, with one scale for each row or for all
  MatrixIn x;
  const void* bias;  // of x's dtype; may be null
  void* y;           // contiguous, of x's dtype
  double threshold;  // 0: only columns with a copy are outliers
  bool per_row;
  const float* x_scale;    // one number above 0; null: a step for each row
  const int32_t* columns;  // [copies], ascending: those with a copy
  const void* copy;        // [n, copies]: w's columns before they were rounded, fp16 or bf16
  DType copy_dtype;
  int64_t copies;
  ParallelFor parallel_for;
};

// A row whose largest number is below has only zeros: 127 over it must be a number.
inline constexpr float kSmallestRow = 0x1p-100f;
// Columns whose products fit 32 bits: 127 * 255 of them, and 65536 columns.
inline constexpr int64_t kPartColumns = 65536;
static_assert(int64_t{127} * 255 * kPartColumns < int64_t{1} << 31);

}  // namespace bitfold
