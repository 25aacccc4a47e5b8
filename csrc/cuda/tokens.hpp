// x of at most 8 tokens in shared memory, as B operands in the order of columns that a source asks for.
//
// x becomes fp16 times a power of two for each token and slice of k, so that the largest lies in [2^14, 2^15): all that
// is within 2^-31 of it stays exact (2^-25 where a source wants some columns smaller).
#pragma once

#include <type_traits>

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
  bool aligned;  // eight columns at a time can be loaded: rows are contiguous and whole pieces, on 16-byte boundaries
};

// What is known of a slice. Nobody looks at the peaks of a slice that is staged: those of the next one begin at zero
// while slower warps still multiply.
struct TokenScales {
  uint32_t peak[kTokens];    // the largest magnitude, in x's own bits
  uint32_t finite[kTokens];  // whether there is neither an infinity nor a NaN
  float unit[kTokens];       // of what lies in shared memory
};

// 14 - floor(log2) of a magnitude in bf16's or fp16's bits, within what a float's power of two can undo; 0 for zero,
// infinity and NaN.
BITFOLD_DEVICE int exponent_to_fp16(uint32_t magnitude, bool bf16) {
  const auto bits = static_cast<uint16_t>(magnitude);
  const uint32_t number = ptx::float_as_uint(bf16 ? ptx::bf16_to_float(bits) : ptx::half_to_float(bits));
  const auto field = static_cast<int>(number >> 23);
  if (number == 0 || field == 255) return 0;
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
  // Sums of x over sections, floats; four of a piece.
  static constexpr bool kSums = Source::kSums > 0;
  static_assert(Source::kSums <= 4 && !(kSums && Source::kMins > 0));
  static constexpr int64_t kPieceBytes = 16 * kQuads + 16 * kMinWords + (kSums ? 16 : 0);

  // Neighbouring tokens have their pairs swapped, so that the eight lanes that read together read from all banks.
  BITFOLD_DEVICE static int place(int token, int pair) { return kPairs % 2 == 0 ? pair ^ (token & 1) : pair; }

  // Pieces [first, first + pieces) of all tokens to x, by all threads of the block: as they are, in order, each where
  // its quads are to lie, and from there to their places as fp16. Begins and ends with a barrier.
  BITFOLD_DEVICE static void stage(const TokensArgs& args, int64_t first, int pieces, uint4* x, TokenScales& scales) {
    const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < kTokens) scales.peak[thread] = 0;
    ptx::sync_block();
    if (args.aligned) copy_rows(args, first, pieces, x, scales);
    else copy_elements(args, first, pieces, x, scales);
    ptx::sync_block();
    if (thread < kTokens) {
      scales.finite[thread] = scales.peak[thread] < (args.bf16 ? 0x7f80u : 0x7c00u);
      scales.unit[thread] = power_of_two(-exponent_to_fp16(scales.peak[thread], args.bf16));
    }
    if constexpr (Source::kMins > 0) {
      auto* sums = reinterpret_cast<uint16_t*>(mins(x, pieces, args.m));
      for (int i = thread; i < pieces * args.m * Source::kMins; i += threads) {
        const int block = i / Source::kMins;
        stage_sum(args, halves_of(x, block), scale_of(args, scales, block % args.m), i % Source::kMins,
                  sums + block * 4 * kMinWords * 2);
      }
      ptx::sync_block();
    }
    // A warp takes as many blocks of x, pieces of one token, as its lanes have quads of.
    static_assert(kWarp % kQuads == 0);
    const int quad = thread % kQuads, t = quad % 4;
#pragma unroll 1
    for (int begin = thread / kWarp * (kWarp / kQuads); begin < pieces * args.m; begin += threads / kQuads) {
      const int block = begin + thread % kWarp / kQuads;
      const bool there = block < pieces * args.m;
      const int token = block % args.m;
      uint4 numbers{};
      if (there) {
        numbers = load_quad(halves_of(x, block), quad / 4, t);
        const float scale = scale_of(args, scales, token);
        const auto convert = [&](uint32_t two, int step, int r) {
          return to_halves(two, args.bf16, scale * power_of_two(-Source::down(2 * (quad / 4) + step, r)));
        };
        numbers = {convert(numbers.x, 0, 0), convert(numbers.y, 0, 1), convert(numbers.z, 1, 0),
                   convert(numbers.w, 1, 1)};
      }
      ptx::sync_warp();  // all of a block is read before any of it is written
      if (there) x[block * kQuads + place(token, quad / 4) * 4 + t] = numbers;
      if constexpr (kSums) {
        const float sum = sum_of_section(numbers, quad / 4);
        constexpr int kEach = kQuads / Source::kSums;
        if (there && quad % kEach == 0) sums(x, pieces, args.m)[4 * block + quad / kEach] = sum;
      }
    }
    ptx::sync_block();
  }

  // A section's sum of what codes are multiplied with, in units of 2^-24, as the codes are: of its lanes' quads the
  // first one's lane has it. By all lanes of a warp.
  BITFOLD_DEVICE static float sum_of_section(const uint4& numbers, int pair) {
    float sum = 0.0f;
    const auto add = [&](uint32_t two, int step, int r) {
      const float2 both = ptx::halves_to_floats(two);
      sum = ptx::fma(ptx::add(both.x, both.y), power_of_two(Source::down(2 * pair + step, r) - 24), sum);
    };
    add(numbers.x, 0, 0), add(numbers.y, 0, 1), add(numbers.z, 1, 0), add(numbers.w, 1, 1);
#pragma unroll
    for (int other = 1; other < kQuads / larger(Source::kSums, 1); other *= 2) {
      sum = ptx::add(sum, ptx::shuffle_xor(sum, other));
    }
    return sum;
  }
  // Where they are: four for each piece of one token.
  template <class Quad>
  BITFOLD_DEVICE static auto* sums(Quad* x, int pieces, int m) {
    using Number = std::conditional_t<std::is_const_v<Quad>, const float, float>;
    return reinterpret_cast<Number*>(x + pieces * m * kQuads);
  }
  // Whether all m tokens of a slice are numbers.
  BITFOLD_DEVICE static bool finite(const TokensArgs& args, const TokenScales& scales) {
    bool all = true;
    for (int token = 0; token < args.m; ++token) all = all && scales.finite[token] != 0;
    return all;
  }

  // Where the sums over sub-blocks of `pieces` pieces of m tokens begin.
  template <class Quad>
  BITFOLD_DEVICE static auto* mins(Quad* x, int pieces, int m) {
    using Word = std::conditional_t<std::is_const_v<Quad>, const uint32_t, uint32_t>;
    return reinterpret_cast<Word*>(x + pieces * m * kQuads);
  }

 private:
  // Of a piece of one token; what x has of it before it is in order.
  BITFOLD_DEVICE static uint16_t* halves_of(uint4* x, int block) {
    return reinterpret_cast<uint16_t*>(x + block * kQuads);
  }
  BITFOLD_DEVICE static float scale_of(const TokensArgs& args, const TokenScales& scales, int token) {
    return power_of_two(exponent_to_fp16(scales.peak[token], args.bf16));
  }

  // The magnitudes' largest.
  BITFOLD_DEVICE static uint32_t peak_of(uint32_t two) { return larger(two & 0x7fffu, two >> 16 & 0x7fffu); }
  BITFOLD_DEVICE static uint32_t peak_of(const uint4& eight) {
    return larger(larger(peak_of(eight.x), peak_of(eight.y)), larger(peak_of(eight.z), peak_of(eight.w)));
  }

  // A warp takes 32 times eight columns of a token in turn, and many of those at once.
  BITFOLD_DEVICE static void copy_rows(const TokensArgs& args, int64_t first, int pieces, uint4* x,
                                       TokenScales& scales) {
    constexpr int kEights = Source::kColumns / 8, kTogether = 7;
    const int count = pieces * kEights, turns = ceil_div(count, kWarp), warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll 1
    for (int begin = ptx::warp_id(); begin < turns * args.m; begin += kTogether * warps) {
      uint4 loaded[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int turn = begin + j * warps, token = turn / turns, i = turn % turns * kWarp + ptx::lane_id();
        loaded[j] = {};
        if (token < args.m && i < count) {
          loaded[j] = ptx::load16(args.data + token * args.row_stride + first * Source::kColumns + 8 * i);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int turn = begin + j * warps, token = turn / turns, i = turn % turns * kWarp + ptx::lane_id();
        if (token >= args.m) break;
        if (i < count) x[(i / kEights * args.m + token) * kQuads + i % kEights] = loaded[j];
        add_peak(scales.peak[token], peak_of(loaded[j]));
      }
    }
  }

  // The same where columns are anywhere in memory, and where k ends within a piece.
  BITFOLD_DEVICE static void copy_elements(const TokensArgs& args, int64_t first, int pieces, uint4* x,
                                           TokenScales& scales) {
    const int count = pieces * Source::kColumns;
    for (int token = 0; token < args.m; ++token) {
      uint32_t peak = 0;
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        const int64_t column = first * Source::kColumns + i;
        uint16_t number = 0;
        if (column < args.k) number = ptx::load2(args.data + token * args.row_stride + column * args.column_stride);
        halves_of(x, i / Source::kColumns * args.m + token)[i % Source::kColumns] = number;
        peak = larger(peak, number & 0x7fffu);
      }
      add_peak(scales.peak[token], peak);
    }
  }

  // By all lanes of a warp.
  BITFOLD_DEVICE static void add_peak(uint32_t& all, uint32_t peak) {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
    if (ptx::lane_id() == 0) ptx::atomic_max(&all, peak);
  }

  // The quad's eight numbers, of a piece whose columns are in order.
  BITFOLD_DEVICE static uint4 load_quad(const uint16_t* piece, int pair, int t) {
    const int step = 2 * pair;
    const auto four = [&](int column) { return *reinterpret_cast<const uint2*>(piece + column); };
    if constexpr (kRuns == Runs::Sequential) {
      const uint2 a = four(Source::column(step, t, 0)), b = four(Source::column(step + 1, t, 0));
      return {a.x, a.y, b.x, b.y};
    } else if constexpr (kRuns == Runs::Interleaved) {
      const uint2 a = four(Source::column(step, t, 0)), b = four(Source::column(step, t, 1));
      return {ptx::prmt(a.x, b.x, 0x5410), ptx::prmt(a.x, b.x, 0x7632), ptx::prmt(a.y, b.y, 0x5410),
              ptx::prmt(a.y, b.y, 0x7632)};
    } else {
      const auto two = [&](int at, int half) {
        return piece[Source::column(at, t, half)] | static_cast<uint32_t>(piece[Source::column(at, t, half + 1)]) << 16;
      };
      return {two(step, 0), two(step, 2), two(step + 1, 0), two(step + 1, 2)};
    }
  }

  // The sum of a sub-block of a piece whose columns are in order.
  BITFOLD_DEVICE static void stage_sum(const TokensArgs& args, const uint16_t* piece, float scale, int block,
                                       uint16_t* halves) {
    constexpr int kWidth = Source::kColumns / larger(Source::kMins, 1);
    float sum = 0.0f;
    const auto add = [&](uint32_t two) {
      const float2 numbers = ptx::halves_to_floats(to_halves(two, args.bf16, scale));
      sum = ptx::add(ptx::add(sum, numbers.x), numbers.y);
    };
#pragma unroll
    for (int c = 0; c < kWidth; c += 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(piece + block * kWidth + c);
      add(eight.x), add(eight.y), add(eight.z), add(eight.w);
    }
    sum *= 1.0f / 32.0f;
    const uint16_t high = ptx::float_to_half(sum);
    uint16_t* mine = halves + 2 * (block % 8 / 2 * kMinWords + block / 8) + block % 2;
    mine[0] = high;
    mine[Source::kMins / 4] = ptx::float_to_half(sum - ptx::half_to_float(high));
  }

  BITFOLD_DEVICE static uint32_t to_halves(uint32_t bits, bool bf16, float scale) {
    const float2 two = bf16 ? ptx::bf16s_to_floats(bits) : ptx::halves_to_floats(bits);
    return ptx::floats_to_halves(two.x * scale, two.y * scale);
  }
};

}  // namespace bitfold::cuda
