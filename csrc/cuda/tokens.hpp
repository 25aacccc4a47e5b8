// x of at most 8 tokens in shared memory, as B operands in the order of columns that a source asks for.
//
// bf16 becomes fp16 times a power of two for each token and slice of k, so that the largest lies in [2^14, 2^15): all
// that is within 2^-31 of it stays exact. fp16 stays as it is.
#pragma once

#include "cuda/fragments.hpp"

namespace bitfold::cuda {

inline constexpr int kTokens = 8;  // of an mma

struct TokensArgs {
  const uint16_t* data;
  int64_t row_stride;  // elements
  int64_t column_stride;
  int64_t k;
  int m;
  bool bf16;
};

// What is known of a slice once it is staged.
struct TokenScales {
  uint32_t peak[kTokens];  // the largest magnitude, as bf16's bits
  float unit[kTokens];     // of what lies in shared memory
};

// 14 - floor(log2 of the bf16), within what a float's power of two can undo; 0 for zero, infinity and NaN.
BITFOLD_DEVICE int exponent_to_fp16(uint32_t bf16_magnitude) {
  const int field = static_cast<int>(bf16_magnitude >> 7);
  if (bf16_magnitude == 0 || field == 255) return 0;
  return smaller(14 - (field - 127), 126);
}
BITFOLD_DEVICE float power_of_two(int exponent) {
  return ptx::uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

template <class Source>
struct Tokens {
  static constexpr int kPairs = Source::kSteps / 2;
  // 16 bytes are b0, b1 of an even step and of the next, for one lane; so many are a piece of one token.
  static constexpr int kQuads = 4 * kPairs;
  static constexpr int64_t kPieceBytes = 16 * kQuads;

  // Neighbouring tokens have their pairs swapped, so that the eight lanes that read together read from all banks.
  BITFOLD_DEVICE static int place(int piece, int m, int token, int pair, int t) {
    const int swapped = kPairs % 2 == 0 ? pair ^ (token & 1) : pair;
    return ((piece * m + token) * kPairs + swapped) * 4 + t;
  }

  // Pieces [first, first + pieces) of all tokens to x, by all threads of the block. Begins and ends with a barrier.
  BITFOLD_DEVICE static void stage(const TokensArgs& args, int64_t first, int pieces, uint4* x, TokenScales& scales) {
    const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < kTokens) scales.peak[thread] = 0;
    ptx::sync_block();
    if (args.bf16) {
      find_peaks(args, first, pieces, scales);
      ptx::sync_block();
    }
    if (thread < kTokens) {
      scales.unit[thread] = args.bf16 ? power_of_two(-exponent_to_fp16(scales.peak[thread])) : 1.0f;
    }
    for (int i = thread; i < pieces * args.m * kQuads; i += threads) {
      const int piece = i / (args.m * kQuads), rest = i % (args.m * kQuads);
      const int token = rest / kQuads, pair = rest % kQuads / 4, t = i % 4;
      const float scale = args.bf16 ? power_of_two(exponent_to_fp16(scales.peak[token])) : 1.0f;
      uint4 quad;
      quad.x = two(args, token, first + piece, 2 * pair, t, 0, scale);
      quad.y = two(args, token, first + piece, 2 * pair, t, 2, scale);
      quad.z = two(args, token, first + piece, 2 * pair + 1, t, 0, scale);
      quad.w = two(args, token, first + piece, 2 * pair + 1, t, 2, scale);
      x[place(piece, args.m, token, pair, t)] = quad;
    }
    ptx::sync_block();
  }

 private:
  BITFOLD_DEVICE static uint16_t element(const TokensArgs& args, int token, int64_t column) {
    if (column >= args.k) return 0;
    return ptx::load2(args.data + token * args.row_stride + column * args.column_stride);
  }

  BITFOLD_DEVICE static void find_peaks(const TokensArgs& args, int64_t first, int pieces, TokenScales& scales) {
    const int64_t begin = first * Source::kColumns, columns = int64_t{pieces} * Source::kColumns;
    for (int token = 0; token < args.m; ++token) {
      uint32_t peak = 0;
      for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
        peak = larger(peak, element(args, token, begin + c) & 0x7fffu);
      }
      for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
      if (ptx::lane_id() == 0) ptx::atomic_max(&scales.peak[token], peak);
    }
  }

  // Halves `half` and half + 1 of a step.
  BITFOLD_DEVICE static uint32_t two(const TokensArgs& args, int token, int64_t piece, int step, int t, int half,
                                     float scale) {
    const int64_t begin = piece * Source::kColumns;
    const uint16_t low = element(args, token, begin + Source::column(step, t, half));
    const uint16_t high = element(args, token, begin + Source::column(step, t, half + 1));
    if (!args.bf16) return low | static_cast<uint32_t>(high) << 16;
    return ptx::floats_to_halves(ptx::bf16_to_float(low) * scale, ptx::bf16_to_float(high) * scale);
  }
};

}  // namespace bitfold::cuda
