// Whether the scale that a search gave a block is none for its weights: what encoders refuse.
#pragma once

#include "formats/args.hpp"
#include "formats/blocks.hpp"
#include "search/blocks.hpp"

namespace bitfold {

// The largest multiple of its scale, or of a scale and a minimum of one size, that a type can mean.
constexpr float reach(int row) {
  switch (row) {
    case kQ4_0: return 8;
    case kQ4_1: return 15 + 1;
    case kQ5_0: return 16;
    case kQ5_1: return 31 + 1;
    case kQ8_0: return 127;
    case kQ2K: return 15 * 3;
    case kQ3K: return 32 * 4;
    case kQ4K: return 63 * 15;
    case kQ5K: return 63 * 31;
    case kQ6K: return 128 * 32;
    case kIq4Nl: return 127;
    case kIq4Xs: return 32 * 127;
    default: return 0;
  }
}
// Twice what a type reaches with the largest scale of binary16. Sums of a search leave binary32 far beyond that (3e14
// and more), and the scale that comes of them may be finite and mean nothing; nearer, the stored scale is infinite.
template <int Row>
inline constexpr float kFar = 2 * reach(Row) * 65504.0f;
// Where the largest weight of a block is smaller, MXFP4's exponent wraps: to 255, which means none, and for the
// smallest number of all, 2^-149, down to kMxfp4Wrapped. With steps so large all codes are 0.
inline constexpr float kNearMxfp4 = 0x1p-125f;

BITFOLD_INLINE float largest_magnitude(const float* w, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = w[i] < 0.0f ? -w[i] : w[i];
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest;
}

// `w`: the block's weights. `at_most` is at least the largest of them, and saves looking.
template <int Row>
BITFOLD_INLINE bool misfits(const Block<Row>& b, const float* w, float at_most) {
  constexpr int64_t kColumns = kFormats[Row].group;
  if (block_overflows(b)) return true;
  if constexpr (Row == kMxfp4) return b.e >= kMxfp4Wrapped && largest_magnitude(w, kColumns) < kNearMxfp4;
  else return at_most > kFar<Row> && largest_magnitude(w, kColumns) > kFar<Row>;
}

// Which of the two faults, by the largest weight of the block.
constexpr EncodeFault misfit(float largest) {
  return largest < kNearMxfp4 ? EncodeFault::ScaleUnderflow : EncodeFault::ScaleOverflow;
}

}  // namespace bitfold
