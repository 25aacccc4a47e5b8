// What the ops that multiply share: the output, and torch's own ops where they are what multiplies.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "torch/border.hpp"

namespace bitfold::border {

inline Tensor empty_rows(const Tensor& x, int64_t columns) {
  return empty_beside(x, shape_beside(x, columns), x.scalar_type());
}

template <class... Arguments>
Tensor call_torch(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw std::runtime_error(std::string("torch's ") + op + " failed" + torch_reason());
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of contiguous rows: torch may multiply others in another order, and strides must not change the bits.
template <class... Arguments>
Tensor torch_product(const char* op, const Arguments&... arguments) {
  return torch::stable::contiguous(call_torch(op, "", arguments...));
}

}  // namespace bitfold::border
