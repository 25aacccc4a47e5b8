// The ops of activations of 8-bit floats (fp8.cpp): their functions, which ops.cpp registers with all the others.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/border.hpp"

namespace bitfold::border {

// Codes uint8 of x's shape (e4m3) and scales float32 of its leading dimensions, docs/activations-fp8.md; x_scale:
// float32 [1] or [], one scale for all.
std::vector<Tensor> round_fp8(const Tensor& x, std::optional<Tensor> x_scale);

// linear of x rounded so.
Tensor linear_fp8(const Tensor& x, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
                  std::optional<Tensor> bias, std::optional<Tensor> x_scale);

}  // namespace bitfold::border
