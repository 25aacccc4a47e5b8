// The KV cache's ops (kv.cpp): their functions, which ops.cpp registers with all the others.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/border.hpp"

namespace bitfold::border {

// Blocks, uint8 [batch, heads, tokens / group, bytes], of keys and values [batch, heads, tokens, head]
// (formats/kv.hpp).
Tensor kv_pack(const Tensor& keys, const Tensor& values, const std::string& format, int64_t group, int64_t value_group);

// Keys and values [batch, heads, tokens, head] of the first `blocks` blocks of the pages, from token `first` on, and
// after them those of the tensors `keys` and `values`, of which there is at least one each and whose dtype they have.
std::vector<Tensor> kv_unpack(const std::vector<Tensor>& pages, int64_t blocks, int64_t first,
                              const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                              const std::string& format, int64_t group, int64_t value_group);

// [batch, rows, query heads, head] in the query's dtype, of query [batch, query heads, rows, head]: attention to the
// tokens of the first `blocks` blocks of the pages, from token `first` on, and to exact keys and values after them. A
// row that the mask lets see nothing is 0.
Tensor kv_attention(const Tensor& query, const std::vector<Tensor>& pages, int64_t blocks, int64_t first,
                    const Tensor& keys, const Tensor& values, const std::string& format, int64_t group,
                    int64_t value_group, std::optional<Tensor> mask, double scale);

}  // namespace bitfold::border
