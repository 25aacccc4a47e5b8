// Ranges of numbers, for those who choose a step by them.
#pragma once

#include "cuda/device.hpp"

namespace bitfold::cuda {

// What all lanes of a warp saw together: the smallest and largest number, and whether all are finite.
template <class Range>
BITFOLD_DEVICE Range over_warp(Range range) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float low = ptx::shuffle_xor(range.low, mask), high = ptx::shuffle_xor(range.high, mask);
    range.low = low < range.low ? low : range.low;
    range.high = high > range.high ? high : range.high;
  }
  range.finite = ptx::all(range.finite);
  return range;
}

}  // namespace bitfold::cuda
