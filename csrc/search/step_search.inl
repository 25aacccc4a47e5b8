// What a weight costs with a step that is tried (StepSearchArgs): the cube of how far it is from the nearest level, in
// units of the step that the search starts from. No sum and no product is fused with another, so that all machines find
// the same steps.
#pragma once

#include "formats/gptq.hpp"

namespace bitfold::search {
namespace {

// The whole numbers from low to high.
struct Wholes {
  F low, high;
  BITFOLD_SIMD F nearest(F quotient) const { return min(max(round_even(quotient), low), high); }
};

// The entries of a table; in the middle between two of them the lower is taken.
struct Entries {
  const float* levels;   // [kGptqLevels], the last repeated
  const float* middles;  // [kGptqLevels - 1], between a level and the next
  BITFOLD_SIMD F nearest(F quotient) const {
    F level = splat(levels[0]);
    for (int i = 0; i + 1 < kGptqLevels; ++i) {
      level = select(greater(quotient, splat(middles[i])), splat(levels[i + 1]), level);
    }
    return level;
  }
};

// A step that is tried, over the start; a step of 0 leaves nothing of a weight.
struct Tried {
  F ratio, inverse, zero;
  BITFOLD_SIMD Tried(F r, F z) : ratio(r), zero(z) {
    const F nothing = splat(0.0f);
    inverse = select(equal(r, nothing), nothing, div(splat(1.0f), r));
  }
};

template <class Levels>
BITFOLD_SIMD F cost(F weight, const Tried& tried, const Levels& levels) {
  const F level = levels.nearest(add(mul(weight, tried.inverse), tried.zero));
  const F error = sub(weight, mul(sub(level, tried.zero), tried.ratio));
  return mul(mul(error, error), abs(error));
}

}  // namespace
}  // namespace bitfold::search
