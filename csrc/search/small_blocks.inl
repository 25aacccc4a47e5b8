// What the encoders of the blocks of 32 columns share: several of them in lanes, and their codes a vector at a time.
#pragma once

#include "search/put_codes.inl"

namespace bitfold::search {
namespace {

constexpr int kSmall = 32;  // columns of a block
constexpr int kSmallVectors = kSmall / kLanes;

// kLanes blocks that follow each other; lanes past the last repeat it.
struct SmallBlocks {
  int64_t first, count;
  const float* x[kLanes];
  const float* importance[kLanes];  // null without
  int64_t row[kLanes];
};

template <class Each>
BITFOLD_SIMD void each_small_blocks(const EncodeBlocksArgs& a, Each each) {
  const int64_t row_blocks = a.k / kSmall, blocks = a.rows * row_blocks;
  int64_t row = 0, column = 0;  // of the next block
  SmallBlocks b;
  for (b.first = 0; b.first < blocks; b.first += kLanes) {
    b.count = smaller(kLanes, blocks - b.first);
    for (int lane = 0; lane < kLanes; ++lane) {
      b.x[lane] = a.w + (row * row_blocks + column) * kSmall;
      b.importance[lane] = a.importance == nullptr ? nullptr : a.importance + column * kSmall;
      b.row[lane] = row;
      if (b.first + lane + 1 >= blocks) continue;
      if (++column == row_blocks) column = 0, ++row;
    }
    each(b);
  }
}

// The numbers of one block to integers, a vector at a time.
template <class Code>
BITFOLD_SIMD void block_codes(const float* x, I (&codes)[kSmallVectors], Code code) {
  for (int v = 0; v < kSmallVectors; ++v) codes[v] = code(load(x + v * kLanes));
}

}  // namespace
}  // namespace bitfold::search
