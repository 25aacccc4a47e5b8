// What an encoder of blocks is told, on any device.
#pragma once

#include <cstdint>

#include "formats/format.hpp"

namespace bitfold {

// `rows` <= kEncodeRows rows of k columns, one after the other, to their blocks; k is whole blocks, all of w is finite.
// importance has an entry for every column, or is null. Every operation is rounded to binary32, in the order that the
// type's search has, with no fused multiply-add: lanes may hold different blocks, never parts of a sum.
struct EncodeBlocksArgs {
  const float* w;
  const float* importance;
  int64_t rows;
  int64_t k;
  uint8_t* blocks;
};
// Rows that an encoder is given at a time.
inline constexpr int64_t kEncodeRows = 16;

// An exponent of MXFP4 from here on is one of very large numbers, or has wrapped below zero.
inline constexpr uint8_t kMxfp4Wrapped = 232;

}  // namespace bitfold
