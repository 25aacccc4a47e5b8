// The seam between the units of linear_rows.cu and their table.
#pragma once

#include "cuda/kernels.hpp"

namespace bitfold::cuda {

// Defined for each format but the casts, in a unit of its own.
template <int Row>
void linear_rows_of(const LinearArgs& args, Stream stream);

}  // namespace bitfold::cuda
