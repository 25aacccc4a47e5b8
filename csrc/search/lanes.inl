// What the searches for scales share: whole numbers as llama.cpp rounds them, sums of squares in its order, and blocks
// that lie one after the other brought into lanes.
#pragma once

#include "search/blocks.hpp"

namespace bitfold::search {
namespace {

// Vectors that are under way together, where a sum waits for its last addition. A GPU has other threads meanwhile.
inline constexpr int kUnderWay = kLanes == 1 ? 1 : 2;

// The nearest whole number, ties to even, for |a| < 2^22; for larger numbers, infinities and NaN what the reference's
// bits give: -2^22 for an infinity, 0 for NaN.
BITFOLD_SIMD I nearest_int(F a) {
  return sub(bit_and(as_int(add(a, splat(kWholes))), splat(0x7fffff)), splat(0x400000));
}

// Lane j of out[i] is value i of the `Values` at from(j), for every lane.
template <int Values, class From>
BITFOLD_SIMD void load_lanes(From from, F (&out)[Values]) {
  static_assert(Values % kLanes == 0);
  for (int first = 0; first < Values; first += kLanes) {
    F rows[kLanes];
    for (int j = 0; j < kLanes; ++j) rows[j] = load(from(j) + first);
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) out[first + i] = rows[i];
  }
}

// In lane j the sum of the squares of the `count` values at from(j), one after the other; count is a multiple of 16.
template <class From>
BITFOLD_SIMD F sum_of_squares(From from, int64_t count) {
  F sum = splat(0.0f);
  for (int64_t first = 0; first < count; first += kLanes) {
    F x[kLanes];
    load_lanes([&](int j) { return from(j) + first; }, x);
    for (int i = 0; i < kLanes; ++i) sum = add(sum, mul(x[i], x[i]));
  }
  return sum;
}

// means[i] = the mean of the squares of row i.
BITFOLD_SIMD void row_means(const EncodeBlocksArgs& a, float (&means)[kEncodeRows]) {
  static_assert(kEncodeRows % kLanes == 0);
  for (int64_t row = 0; row < a.rows; row += kLanes) {
    const F sum = sum_of_squares([&](int lane) { return a.w + smaller(row + lane, a.rows - 1) * a.k; }, a.k);
    store(means + row, div(sum, splat(static_cast<float>(a.k))));
  }
}

}  // namespace
}  // namespace bitfold::search
