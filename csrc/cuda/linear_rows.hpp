// The seam between the units of linear_rows.cu, their table and what adds up their sums.
#pragma once

#include "cuda/kernels.hpp"

namespace bitfold::cuda {

// In the place of a format's row: of all formats with planes what fits no kernel of theirs.
inline constexpr int kRagged = kRowCount;

struct RowsCall {
  const LinearArgs& args;
  void* workspace;
  Stream stream;
  int64_t* wanted;  // null; or gets the bytes of a workspace, and nothing is launched
};

// Defined for each format but the casts (fp4 is nf4's), in a unit of its own.
template <int Row>
void linear_rows_of(const RowsCall& call);

// Sums of slices of k, to be added up.
struct RowsSums {
  const float* partials;  // [slices, m, rows]
  const uint16_t* bias;   // may be null
  uint16_t* y;            // [m, n]
  int64_t m, n, rows;
  int slices;
  bool bf16;
};
void rows_sums(const RowsSums& sums, Stream stream);

}  // namespace bitfold::cuda
