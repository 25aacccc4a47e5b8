// GPTQ's ops (gptq.cpp): their functions, which ops.cpp registers with all the others.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/border.hpp"

namespace bitfold::border {

// The factor [k, k] of a damped Hessian, upper, and an int64 [1]: 0, or 1 + the column where there is none.
std::vector<Tensor> gptq_factor(const Tensor& hessian, const Tensor& order, double unit, double damping);

// Codes uint8 [n, c] (places of levels), errors [c, n] where `behind` is given (else [0, n]), and the loss of each row,
// float64 [n], of columns [begin, begin + c) of the factor (formats/gptq.hpp).
std::vector<Tensor> gptq_columns(const Tensor& weight, const Tensor& order, const Tensor& factor, int64_t begin,
                                 const Tensor& step, const Tensor& offset, const Tensor& group,
                                 std::optional<Tensor> table, int64_t low, int64_t high, std::optional<Tensor> behind,
                                 bool round);

// The step of every group of `group` columns that costs least, of `start` [groups, n] times each of `factors` as
// `stored` holds it, and that cost: float32 [groups, n] each (formats/gptq.hpp).
std::vector<Tensor> search_steps(const Tensor& weight, int64_t group, const Tensor& start, const Tensor& factors,
                                 ScalarType stored, std::optional<Tensor> zeros, std::optional<Tensor> importance,
                                 std::optional<Tensor> table, int64_t low, int64_t high);

// GGUF's blocks as a grid: step and offset float32 [spans, n], levels float32 [l] ascending, uint8 [l] how they are
// stored.
std::vector<Tensor> block_grid(const Tensor& blocks, const std::string& format, int64_t n, int64_t k);
// Blocks with the same scales and uint8 [n, k] codes as they are stored.
Tensor put_block_codes(const Tensor& blocks, const Tensor& codes, const std::string& format);

}  // namespace bitfold::border
