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

// What is known of a slice.
struct TokenScales {
  uint32_t finite[kTokens];  // whether there is neither an infinity nor a NaN
  float unit[kTokens];       // of what lies in shared memory
};

// How the eight columns of a quad (b0, b1 of an even step and of the next) lie in x: two runs of four columns, one
// after the other, so or with the two in their middle changed, or in turns, or in no way that is known here.
enum class Runs : uint8_t { Sequential, Crossed, Interleaved, None };

template <class Source>
constexpr Runs runs_of_quads() {
  bool sequential = true, crossed = true, interleaved = true;
  for (int step = 0; step < Source::kSteps; step += 2) {
    for (int t = 0; t < 4; ++t) {
      for (int i = 0; i < 8; ++i) {
        const int at = Source::column(step + i / 4, t, i % 4);
        sequential = sequential && at == Source::column(step + i / 4, t, 0) + i % 4;
        crossed = crossed && at == Source::column(step + i / 4, t, 0) + i % 4 / 2 + i % 2 * 2;
        interleaved = interleaved && at == Source::column(step, t, i % 2) + i / 2;
      }
      const bool whole = Source::column(step, t, 0) % 4 == 0 && Source::column(step + 1, t, 0) % 4 == 0;
      sequential = sequential && whole;
      crossed = crossed && whole;
      interleaved = interleaved && Source::column(step, t, 0) % 4 == 0 && Source::column(step, t, 1) % 4 == 0;
    }
  }
  return sequential ? Runs::Sequential : crossed ? Runs::Crossed : interleaved ? Runs::Interleaved : Runs::None;
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
  // Quads that a lane of a warp has in its registers at once, and the pieces that all lanes have a quad of.
  static constexpr int kTogether = 8, kTurn = kWarp / kQuads;
  static_assert(kWarp % kQuads == 0);
  static constexpr int64_t kPieceBytes = 16 * kQuads + 16 * kMinWords + (kSums ? 16 : 0);

  // Where the second of a quad's two runs of four columns begins.
  BITFOLD_HOST_DEVICE static constexpr int second_run(int pair, int t) {
    return kRuns == Runs::Interleaved ? Source::column(2 * pair, t, 1) : Source::column(2 * pair + 1, t, 0);
  }
  // Whether all quads are eight columns on end.
  static constexpr bool kOnEnd = [] {
    bool all = kRuns != Runs::None;
    for (int quad = 0; quad < kQuads; ++quad) {
      const int first = Source::column(quad / 4 * 2, quad % 4, 0);
      all = all && first % 8 == 0 && second_run(quad / 4, quad % 4) == first + 4;
    }
    return all;
  }();
  // Whether the quads of a pair are a sub-block with a minimum.
  static constexpr bool kMinsOfPairs = [] {
    bool all = kOnEnd && Source::kMins == kPairs;
    for (int quad = 0; quad < kQuads; ++quad) {
      all = all && Source::column(quad / 4 * 2, quad % 4, 0) / (Source::kColumns / kPairs) == quad / 4;
    }
    return all;
  }();

  // Neighbouring tokens have their pairs swapped, so that the eight lanes that read together read from all banks.
  BITFOLD_DEVICE static int place(int token, int pair) { return kPairs % 2 == 0 ? pair ^ (token & 1) : pair; }

  // What a lane has loaded of pieces of a token, to be brought to its place: quads of x that are eight columns on end.
  struct Eights {
    uint4 of[kTogether];
  };
  BITFOLD_DEVICE static bool at_once(const TokensArgs& args) { return kOnEnd && args.aligned; }
  // Pieces [first, first + pieces), at most kTogether * kTurn, by a warp.
  BITFOLD_DEVICE static void load(const TokensArgs& args, int64_t first, int pieces, int token, Eights& eights) {
    const int quad = ptx::lane_id() % kQuads, piece = ptx::lane_id() / kQuads;
    const uint16_t* from = args.data + token * args.row_stride + (first + piece) * Source::kColumns +
                           Source::column(quad / 4 * 2, quad % 4, 0);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      eights.of[j] = {};
      if (j * kTurn + piece < pieces) eights.of[j] = ptx::load_fresh16(from + j * (kTurn * Source::kColumns));
    }
  }
  // What was loaded to a slice that has room for `room` pieces of all tokens.
  BITFOLD_DEVICE static void stage(const TokensArgs& args, const Eights& eights, int pieces, int token, uint4* x,
                                   int room, TokenScales& scales) {
    uint32_t peak = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) peak = peaks(peak, eights.of[j]);
    const int exponent = open(args, larger(peak & 0xffffu, peak >> 16), token, scales);
    if (args.bf16) arrange<true>(args, eights, pieces, token, x, room, power_of_two(exponent));
    else arrange<false>(args, eights, pieces, token, x, room, power_of_two(exponent));
  }

  // The same of any x, by way of the slice: pieces as they are, in order, each where its quads are to lie, and from
  // there to their places.
  BITFOLD_DEVICE static void stage(const TokensArgs& args, int64_t first, int pieces, int token, uint4* x, int room,
                                   TokenScales& scales) {
    const uint32_t peak =
        args.aligned ? copy_row(args, first, pieces, token, x) : copy_elements(args, first, pieces, token, x);
    const int exponent = open(args, peak, token, scales);
    ptx::sync_warp();
    if (args.bf16) arrange<true>(args, pieces, token, x, room, power_of_two(exponent));
    else arrange<false>(args, pieces, token, x, room, power_of_two(exponent));
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
  // Whether all m tokens of a slice are numbers. By all lanes of a warp.
  BITFOLD_DEVICE static bool finite(const TokensArgs& args, const TokenScales& scales) {
    const int token = ptx::lane_id();
    return !ptx::any(token < args.m && scales.finite[token] == 0);
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
  // Of the largest magnitude that each lane saw: the exponent of what x is multiplied with.
  BITFOLD_DEVICE static int open(const TokensArgs& args, uint32_t peak, int token, TokenScales& scales) {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
    const int exponent = exponent_to_fp16(peak, args.bf16);
    if (ptx::lane_id() == 0) {
      scales.finite[token] = is_finite(peak, args.bf16) ? 1 : 0;
      scales.unit[token] = power_of_two(-exponent);
    }
    return exponent;
  }

  // A lane's quads of all pieces that it has: the same one of each.
  template <bool Bf16>
  class Arranged {
   public:
    BITFOLD_DEVICE Arranged(const TokensArgs& args, int pieces, int token, uint4* x, int room, float scale)
        : m_(args.m), pieces_(pieces), token_(token), x_(x), room_(room) {
#pragma unroll
      for (int i = 0; i < 4; ++i) factors_[i] = scale * power_of_two(-Source::down(2 * (quad_ / 4) + i / 2, i % 2));
    }
    BITFOLD_DEVICE int quad() const { return quad_; }
    // The quad of a piece, from x's numbers in the order of its operands. By all lanes, of pieces that aren't there
    // too.
    BITFOLD_DEVICE void leave(int piece, const uint4& raw) const {
      const uint4 numbers = {to_halves<Bf16>(raw.x, factors_[0]), to_halves<Bf16>(raw.y, factors_[1]),
                             to_halves<Bf16>(raw.z, factors_[2]), to_halves<Bf16>(raw.w, factors_[3])};
      const int block = piece * m_ + token_;
      const bool there = piece < pieces_;
      if (there) x_[block * kQuads + place(token_, quad_ / 4) * 4 + quad_ % 4] = numbers;
      if constexpr (kSums) {
        const float sum = sum_of_section(numbers, quad_ / 4);
        constexpr int kEach = kQuads / Source::kSums;
        if (there && quad_ % kEach == 0) sums(x_, room_, m_)[4 * block + quad_ / kEach] = sum;
      }
      if constexpr (kMinsOfPairs) {
        const float sum = sum_of_pair(numbers);
        auto* all = reinterpret_cast<uint16_t*>(mins(x_, room_, m_));
        if (there && quad_ % 4 == 0) leave_sum(sum, quad_ / 4, all + block * 4 * kMinWords * 2);
      }
    }

   private:
    const int m_, pieces_, token_, quad_ = ptx::lane_id() % kQuads;
    uint4* const x_;
    const int room_;
    float factors_[4];
  };

  template <bool Bf16>
  BITFOLD_DEVICE static void arrange(const TokensArgs& args, const Eights& eights, int pieces, int token, uint4* x,
                                     int room, float scale) {
    const Arranged<Bf16> arranged(args, pieces, token, x, room, scale);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {  // those that aren't there too: nothing to jump over, all of them in turns
      const uint4& eight = eights.of[j];
      arranged.leave(j * kTurn + ptx::lane_id() / kQuads, ordered({eight.x, eight.y}, {eight.z, eight.w}));
    }
  }

  template <bool Bf16>
  BITFOLD_DEVICE static void arrange(const TokensArgs& args, int pieces, int token, uint4* x, int room, float scale) {
    if constexpr (Source::kMins > 0 && !kMinsOfPairs) {
      auto* all = reinterpret_cast<uint16_t*>(mins(x, room, args.m));
#pragma unroll 1
      for (int i = ptx::lane_id(); i < pieces * Source::kMins; i += kWarp) {
        const int block = i / Source::kMins * args.m + token, number = i % Source::kMins;
        leave_sum(sum_of_columns<Bf16>(halves_of(x, block), scale, number), number, all + block * 4 * kMinWords * 2);
      }
    }
    const Arranged<Bf16> arranged(args, pieces, token, x, room, scale);
#pragma unroll 1
    for (int begin = 0; begin < pieces; begin += kTurn) {
      const int piece = begin + ptx::lane_id() / kQuads, quad = arranged.quad();
      uint4 raw{};
      if (piece < pieces) raw = load_quad(halves_of(x, piece * args.m + token), quad / 4, quad % 4);
      ptx::sync_warp();  // all of a block is read before any of it is written
      arranged.leave(piece, raw);
    }
  }

  // The larger magnitudes of halfwords, and the largest of eight.
  BITFOLD_DEVICE static uint32_t peaks(uint32_t peak, const uint4& eight) {
    for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w}) peak = ptx::max_u16x2(peak, two & 0x7fff7fffu);
    return peak;
  }

  // Eight columns to a lane, and many of those at once; the largest magnitude that the lane saw.
  BITFOLD_DEVICE static uint32_t copy_row(const TokensArgs& args, int64_t first, int pieces, int token, uint4* x) {
    constexpr int kEights = Source::kColumns / 8, kTogether = 8;
    const int count = pieces * kEights, lane = ptx::lane_id();
    const uint16_t* from = args.data + token * args.row_stride + first * Source::kColumns + 8 * lane;
    uint32_t peak = 0;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kTogether * kWarp) {
      uint4 loaded[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        loaded[j] = {};
        if (begin + j * kWarp + lane < count) loaded[j] = ptx::load_fresh16(from + 8 * (begin + j * kWarp));
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = begin + j * kWarp + lane;
        if (i < count) x[(i / kEights * args.m + token) * kQuads + i % kEights] = loaded[j];
        peak = peaks(peak, loaded[j]);
      }
    }
    return larger(peak & 0xffffu, peak >> 16);
  }

  // The same where columns are anywhere in memory, and where k ends within a piece.
  BITFOLD_DEVICE static uint32_t copy_elements(const TokensArgs& args, int64_t first, int pieces, int token, uint4* x) {
    const int count = pieces * Source::kColumns;
    uint32_t peak = 0;
#pragma unroll 4
    for (int i = ptx::lane_id(); i < count; i += kWarp) {
      const int64_t column = first * Source::kColumns + i;
      uint16_t number = 0;
      if (column < args.k) number = ptx::load_fresh2(args.data + token * args.row_stride + column * args.column_stride);
      halves_of(x, i / Source::kColumns * args.m + token)[i % Source::kColumns] = number;
      peak = larger(peak, number & 0x7fffu);
    }
    return peak;
  }

  // The quad's eight numbers, of a piece whose columns are in order.
  BITFOLD_DEVICE static uint4 load_quad(const uint16_t* piece, int pair, int t) {
    const int step = 2 * pair;
    if constexpr (kRuns != Runs::None) {
      const auto four = [&](int column) { return *reinterpret_cast<const uint2*>(piece + column); };
      return ordered(four(Source::column(step, t, 0)), four(second_run(pair, t)));
    } else {
      const auto two = [&](int at, int half) {
        return piece[Source::column(at, t, half)] | static_cast<uint32_t>(piece[Source::column(at, t, half + 1)]) << 16;
      };
      return {two(step, 0), two(step, 2), two(step + 1, 0), two(step + 1, 2)};
    }
  }
  // Both of its runs in the order of operands.
  BITFOLD_DEVICE static uint4 ordered(const uint2& a, const uint2& b) {
    if constexpr (kRuns == Runs::Crossed) {
      return {ptx::prmt(a.x, a.y, 0x5410), ptx::prmt(a.x, a.y, 0x7632), ptx::prmt(b.x, b.y, 0x5410),
              ptx::prmt(b.x, b.y, 0x7632)};
    } else if constexpr (kRuns == Runs::Interleaved) {
      return {ptx::prmt(a.x, b.x, 0x5410), ptx::prmt(a.x, b.x, 0x7632), ptx::prmt(a.y, b.y, 0x5410),
              ptx::prmt(a.y, b.y, 0x7632)};
    } else {
      return {a.x, a.y, b.x, b.y};
    }
  }

  // The sum of a sub-block that is a pair's quads, by the lanes that have them.
  BITFOLD_DEVICE static float sum_of_pair(const uint4& numbers) {
    float sum = 0.0f;
    for (const uint32_t two : {numbers.x, numbers.y, numbers.z, numbers.w}) {
      const float2 both = ptx::halves_to_floats(two);
      sum = ptx::add(ptx::add(sum, both.x), both.y);
    }
    sum = ptx::add(sum, ptx::shuffle_xor(sum, 1));
    return ptx::add(sum, ptx::shuffle_xor(sum, 2));
  }
  // The sum of a sub-block of a piece whose columns are in order.
  template <bool Bf16>
  BITFOLD_DEVICE static float sum_of_columns(const uint16_t* piece, float scale, int block) {
    constexpr int kWidth = Source::kColumns / larger(Source::kMins, 1);
    float sum = 0.0f;
    const auto add = [&](uint32_t two) {
      const float2 numbers = ptx::halves_to_floats(to_halves<Bf16>(two, scale));
      sum = ptx::add(ptx::add(sum, numbers.x), numbers.y);
    };
#pragma unroll
    for (int c = 0; c < kWidth; c += 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(piece + block * kWidth + c);
      add(eight.x), add(eight.y), add(eight.z), add(eight.w);
    }
    return sum;
  }
  // It to its place among those of a piece, as two halves.
  BITFOLD_DEVICE static void leave_sum(float sum, int block, uint16_t* halves) {
    sum *= 1.0f / 32.0f;
    const uint16_t high = ptx::float_to_half(sum);
    uint16_t* mine = halves + 2 * (block % 8 / 2 * kMinWords + block / 8) + block % 2;
    mine[0] = high;
    mine[Source::kMins / 4] = ptx::float_to_half(sum - ptx::half_to_float(high));
  }

  template <bool Bf16>
  BITFOLD_DEVICE static uint32_t to_halves(uint32_t bits, float scale) {
    const float2 two = Bf16 ? ptx::bf16s_to_floats(bits) : ptx::halves_to_floats(bits);
    return ptx::floats_to_halves(two.x * scale, two.y * scale);
  }
};

}  // namespace bitfold::cuda
