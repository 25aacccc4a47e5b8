// Activations of 8-bit floats (e4m3): what kernels are told beside args.hpp. docs/activations-fp8.md has the
// arithmetic.
#pragma once

#include "formats/args.hpp"

namespace bitfold {

// What each row of x becomes: codes, and the scale that they are meant for.
struct RoundFp8Args {
  MatrixIn x;
  const float* x_scale;  // one for all rows, above 0; null: each row's largest magnitude over 448
  uint8_t* codes;        // [rows, columns], dense
  float* scales;         // [rows]
  ParallelFor parallel_for;
};

// What a row with a NaN, or of which no scale can be chosen, becomes: NaN times NaN.
inline constexpr uint8_t kFp8Nan = 0x7f;
inline constexpr float kFp8Largest = kFormats[kE4m3].grid_max;

// y as LinearArgs say, but of x rounded.
struct LinearFp8Args {
  LinearArgs linear;
  const float* x_scale;
};

}  // namespace bitfold
