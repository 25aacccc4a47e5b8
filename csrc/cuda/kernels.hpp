// The kernels' launchers, for the drivers (linear.cpp): one regime of the plan each.
#pragma once

#include "cuda/cuda.hpp"

namespace bitfold::cuda {

// x of any dtype, any layout: float64 in float64, the others in fp32.
void linear_floor(const LinearArgs& args, Stream stream);

// m <= kRows.
int64_t linear_rows_workspace(const LinearArgs& args);
void linear_rows(const LinearArgs& args, void* workspace, Stream stream);

// Regimes Tile and Wgmma.
int64_t linear_tile_workspace(const LinearArgs& args);
void linear_tile(const LinearArgs& args, void* workspace, Stream stream);

}  // namespace bitfold::cuda
