// How a number of y is made of its sum; few rows.
#pragma once

#include "cuda/device.hpp"

namespace bitfold::cuda {

BITFOLD_DEVICE void write_sum(uint16_t* y, const uint16_t* bias, bool bf16, int64_t token, int64_t row, int64_t n,
                              float sum) {
  if (bias != nullptr) sum += bf16 ? ptx::bf16_to_float(bias[row]) : ptx::half_to_float(bias[row]);
  y[token * n + row] = bf16 ? ptx::float_to_bf16(sum) : ptx::float_to_half(sum);
}

}  // namespace bitfold::cuda
