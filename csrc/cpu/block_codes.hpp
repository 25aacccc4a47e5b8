// GGUF's blocks as scales and codes (formats/block_codes.hpp), a matrix at a time.
#pragma once

#include <cstdint>

#include "formats/args.hpp"

namespace bitfold::cpu {

// Columns with a step of their own, and how many levels there are.
struct BlockShape {
  int64_t span;
  int64_t levels;
};
BlockShape block_shape(const Format& format);

struct BlockGridArgs {
  Format format;
  int64_t n;
  int64_t k;
  const void* blocks;
  float* step;     // [k / span, n]
  float* offset;   // likewise
  float* levels;   // [levels], ascending
  uint8_t* codes;  // how each of them is stored
  ParallelFor parallel_for;
};
void block_grid(const BlockGridArgs& args);

// codes [n, k], as they are stored, into blocks that keep their scales.
struct BlockCodesArgs {
  Format format;
  int64_t n;
  int64_t k;
  const uint8_t* codes;
  void* blocks;
  ParallelFor parallel_for;
};
void put_block_codes(const BlockCodesArgs& args);

}  // namespace bitfold::cpu
