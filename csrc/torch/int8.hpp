// The product with x rounded to 8 bits, row by row (int8.cpp): its function, which ops.cpp registers.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/border.hpp"

namespace bitfold::border {

// x W^T + bias (formats/int8.hpp), of x's dtype.
Tensor linear_int8(const Tensor& x, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
                   std::optional<Tensor> bias, double threshold, bool per_row, std::optional<Tensor> x_scale,
                   std::optional<Tensor> outlier_columns, std::optional<Tensor> outlier_weight);

}  // namespace bitfold::border
