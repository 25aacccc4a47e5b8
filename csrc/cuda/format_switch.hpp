// A format that a kernel learns at run time, to code that is compiled for each. All threads take the same way, once, so
// that formats with the same needs of registers can share a kernel.
#pragma once

#include <utility>

#include "cuda/device.hpp"
#include "formats/format.hpp"

namespace bitfold::cuda {

// f.operator()<row>(), where `row` is one of Rows; whether it is.
template <int... Rows, class F>
BITFOLD_DEVICE bool switch_row(int row, std::integer_sequence<int, Rows...>, const F& f) {
  return ((row == Rows && (f.template operator()<Rows>(), true)) || ...);
}

// First, First + 1, ... End - 1.
template <int First, int... Offsets>
constexpr auto rows_from(std::integer_sequence<int, Offsets...>) {
  return std::integer_sequence<int, First + Offsets...>();
}
template <int First, int End>
using RowsBetween = decltype(rows_from<First>(std::make_integer_sequence<int, End - First>()));

using CastRows = RowsBetween<kFp16, kE4m3>;
using PlaneRows = RowsBetween<kE4m3, kQ4_0>;
using SmallBlockRows = std::integer_sequence<int, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kIq4Nl, kMxfp4>;  // of 32 columns
using LargeBlockRows = std::integer_sequence<int, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K, kIq4Xs>;

template <int... Rows>
constexpr bool has_row(int row, std::integer_sequence<int, Rows...>) {
  return ((row == Rows) || ...);
}

}  // namespace bitfold::cuda
