// The seam for GPTQ: what its ops are told, on any device. Plain pointers and sizes, as in args.hpp.
//
// Columns are those of the Hessian in the order of the work, the last one rounded first. With U upper and UᵀU the
// damped Hessian, what GPTQ makes small is the squared norm of E Uᵀ, E = W - Q (python/bitfold/quantizers/gptq.py).
#pragma once

#include <cstdint>

#include "formats/args.hpp"

namespace bitfold {

// factor [k, k] of hessian[order, order] / unit + damping: upper, zeros below.
struct GptqFactorArgs {
  MatrixIn hessian;  // fp32 or float64, symmetric
  const int64_t* order;
  double unit;
  double damping;
  float* factor;
  ParallelFor parallel_for;
};

// What a weight may become: step * level + offset, of its row and the group of its column.
struct GptqGrid {
  const float* step;    // [groups, n]
  const float* offset;  // likewise
  int64_t groups;
  const float* table;  // levels, ascending, at most kGptqLevels; null: the whole numbers from low to high
  int64_t low;
  int64_t high;
  bool round;  // false: any number
};
inline constexpr int kGptqLevels = 16;

// Columns [begin, begin + weight.columns) of the k.
struct GptqColumnsArgs {
  MatrixIn weight;       // fp32, contiguous
  const int64_t* order;  // which column of `weight` and of `codes` each is
  const int64_t* group;  // of each
  const float* factor;   // [k, k]
  int64_t k;
  int64_t begin;
  const float* behind;  // [k - begin - weight.columns, n]: errors of the columns that were rounded before
  GptqGrid grid;
  uint8_t* codes;  // [n, weight.columns]: the place of the level, counted from the lowest
  float* errors;   // [weight.columns, n], or null
  double* loss;    // [n]: the squared norm of these columns of E Uᵀ
  ParallelFor parallel_for;
};

// The step of every group that costs least, of those tried: `start` times each factor, as the format stores it; of
// equal ones the first. A weight costs the cube of its error, which holds large errors back more than the square would
// (docs/gptq.md). Costs are in units of the start's cube: no weights are too small or too large.
struct StepSearchArgs {
  MatrixIn weight;          // fp32, contiguous
  int64_t group;            // columns of a group, at least 1; the last of a row may have fewer
  const float* importance;  // [weight.columns]: times what a column's weights cost; null: 1
  const float* start;       // [groups, n], finite
  const float* zeros;       // likewise, what is taken from the level; null: 0
  const float* factors;     // [tried]
  int64_t tried;            // 1 to kMostTried
  Scale stored;             // F16, BF16 or F32
  const float* table;       // levels, ascending, from 0 to high; null: the whole numbers from low to high
  int64_t low;
  int64_t high;
  float* step;  // [groups, n]
  float* cost;  // likewise
  ParallelFor parallel_for;
};
inline constexpr int kMostTried = 64;

}  // namespace bitfold
