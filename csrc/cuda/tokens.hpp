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
  bool aligned;  // four columns at a time can be loaded: rows are contiguous and whole pieces, on 8-byte boundaries
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

// How the eight columns of a quad (b0, b1 of an even step and of the next) lie in x: two runs of four columns, one
// after the other, or in turns, or in no way that is known here.
enum class Runs : uint8_t { Sequential, Interleaved, None };

template <class Source>
constexpr Runs runs_of_quads() {
  bool sequential = true, interleaved = true;
  for (int step = 0; step < Source::kSteps; step += 2) {
    for (int t = 0; t < 4; ++t) {
      for (int i = 0; i < 8; ++i) {
        const int at = Source::column(step + i / 4, t, i % 4);
        sequential = sequential && at == Source::column(step + i / 4, t, 0) + i % 4;
        interleaved = interleaved && at == Source::column(step, t, i % 2) + i / 2;
      }
      sequential = sequential && Source::column(step, t, 0) % 4 == 0 && Source::column(step + 1, t, 0) % 4 == 0;
      interleaved = interleaved && Source::column(step, t, 0) % 4 == 0 && Source::column(step, t, 1) % 4 == 0;
    }
  }
  return sequential ? Runs::Sequential : interleaved ? Runs::Interleaved : Runs::None;
}

template <class Source>
struct Tokens {
  static constexpr int kPairs = Source::kSteps / 2;
  static constexpr Runs kRuns = runs_of_quads<Source>();
  // A quad is 16 bytes; so many are a piece of one token.
  static constexpr int kQuads = 4 * kPairs;
  // Sums of x over sub-blocks, for minima: of each a 32nd, as a half and what that leaves, in the order of a step whose
  // columns they are. A lane has kMinWords of a token's piece.
  static constexpr int kMinWords = Source::kMins / 4;
  static constexpr int64_t kPieceBytes = 16 * kQuads + 16 * kMinWords;

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
    for (int token = 0; token < args.m; ++token) {
      const float scale = args.bf16 ? power_of_two(exponent_to_fp16(scales.peak[token])) : 1.0f;
#pragma unroll 2
      for (int i = thread; i < pieces * kQuads; i += threads) {
        const int piece = i / kQuads, pair = i % kQuads / 4, t = i % 4;
        uint4 quad = load_quad(args, token, first + piece, pair, t);
        if (args.bf16) {
          quad = {to_halves(quad.x, scale), to_halves(quad.y, scale), to_halves(quad.z, scale),
                  to_halves(quad.w, scale)};
        }
        x[place(piece, args.m, token, pair, t)] = quad;
      }
      if constexpr (Source::kMins > 0) {
        auto* halves = reinterpret_cast<uint16_t*>(mins(x, pieces, args.m));
        for (int i = thread; i < pieces * Source::kMins; i += threads) {
          const int piece = i / Source::kMins, block = i % Source::kMins;
          stage_sum(args, token, first + piece, block, scale, halves + (piece * args.m + token) * 4 * kMinWords * 2);
        }
      }
    }
    ptx::sync_block();
  }

  // Where the sums of `pieces` pieces of m tokens begin.
  BITFOLD_DEVICE static uint32_t* mins(uint4* x, int pieces, int m) {
    return reinterpret_cast<uint32_t*>(x + pieces * m * kQuads);
  }

 private:
  BITFOLD_DEVICE static uint16_t element(const TokensArgs& args, int token, int64_t column) {
    if (column >= args.k) return 0;
    return ptx::load2(args.data + token * args.row_stride + column * args.column_stride);
  }

  // Of eight bytes of x the magnitudes' largest.
  BITFOLD_DEVICE static uint32_t peak_of(uint32_t two) { return larger(two & 0x7fffu, two >> 16 & 0x7fffu); }

  BITFOLD_DEVICE static void find_peaks(const TokensArgs& args, int64_t first, int pieces, TokenScales& scales) {
    const int64_t begin = first * Source::kColumns, columns = int64_t{pieces} * Source::kColumns;
    for (int token = 0; token < args.m; ++token) {
      uint32_t peak = 0;
      if (args.aligned) {
        const uint16_t* row = args.data + token * args.row_stride + begin;
#pragma unroll 2
        for (int64_t c = 4 * threadIdx.x; c < columns; c += 4 * blockDim.x) {
          const uint2 four = ptx::load8(row + c);
          peak = larger(peak, larger(peak_of(four.x), peak_of(four.y)));
        }
      } else {
        for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
          peak = larger(peak, element(args, token, begin + c) & 0x7fffu);
        }
      }
      for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
      if (ptx::lane_id() == 0) ptx::atomic_max(&scales.peak[token], peak);
    }
  }

  // The quad's eight numbers as they are in x.
  BITFOLD_DEVICE static uint4 load_quad(const TokensArgs& args, int token, int64_t piece, int pair, int t) {
    const int64_t begin = piece * Source::kColumns;
    const int step = 2 * pair;
    if (kRuns != Runs::None && args.aligned) {
      const uint16_t* row = args.data + token * args.row_stride + begin;
      const uint2 a = ptx::load8(row + Source::column(step, t, 0));
      if constexpr (kRuns == Runs::Sequential) {
        const uint2 b = ptx::load8(row + Source::column(step + 1, t, 0));
        return {a.x, a.y, b.x, b.y};
      } else {
        const uint2 b = ptx::load8(row + Source::column(step, t, 1));
        return {ptx::prmt(a.x, b.x, 0x5410), ptx::prmt(a.x, b.x, 0x7632), ptx::prmt(a.y, b.y, 0x5410),
                ptx::prmt(a.y, b.y, 0x7632)};
      }
    }
    const auto two = [&](int at, int half) {
      const uint32_t high = element(args, token, begin + Source::column(at, t, half + 1));
      return element(args, token, begin + Source::column(at, t, half)) | high << 16;
    };
    return {two(step, 0), two(step, 2), two(step + 1, 0), two(step + 1, 2)};
  }

  BITFOLD_DEVICE static void stage_sum(const TokensArgs& args, int token, int64_t piece, int block, float scale,
                                       uint16_t* halves) {
    constexpr int kWidth = Source::kColumns / larger(Source::kMins, 1);
    const int64_t begin = piece * Source::kColumns + block * kWidth;
    float sum = 0.0f;
    const auto add = [&](uint32_t two) {
      const float2 numbers = ptx::halves_to_floats(args.bf16 ? to_halves(two, scale) : two);
      sum = ptx::add(ptx::add(sum, numbers.x), numbers.y);
    };
    for (int c = 0; c < kWidth; c += 4) {
      if (args.aligned) {
        const uint2 four = ptx::load8(args.data + token * args.row_stride + begin + c);
        add(four.x), add(four.y);
      } else {
        for (int i = c; i < c + 4; i += 2) {
          const uint32_t high = element(args, token, begin + i + 1);
          add(element(args, token, begin + i) | high << 16);
        }
      }
    }
    sum *= 1.0f / 32.0f;
    const uint16_t high = ptx::float_to_half(sum);
    uint16_t* mine = halves + 2 * (block % 8 / 2 * kMinWords + block / 8) + block % 2;
    mine[0] = high;
    mine[Source::kMins / 4] = ptx::float_to_half(sum - ptx::half_to_float(high));
  }

  BITFOLD_DEVICE static uint32_t to_halves(uint32_t bf16s, float scale) {
    const float2 two = ptx::bf16s_to_floats(bf16s);
    return ptx::floats_to_halves(two.x * scale, two.y * scale);
  }
};

}  // namespace bitfold::cuda
