// The seam between the units of linear_rows.cu and their table.
#pragma once

#include "cuda/kernels.hpp"

namespace bitfold::cuda {

// In the place of a format's row: of all formats with planes what fits no kernel of theirs.
inline constexpr int kRagged = kRowCount;

// Defined for each format but the casts (fp4 is nf4's), in a unit of its own.
template <int Row>
void linear_rows_of(const LinearArgs& args, Stream stream);

}  // namespace bitfold::cuda
