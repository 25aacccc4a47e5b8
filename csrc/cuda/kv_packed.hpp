// Attention to blocks of 64 tokens and heads of 64 or 128 numbers by the units for matrices (kv_units.hpp): what the
// packed cache makes by default, of most models.
//
// A warp has a block's keys and values to itself: a quarter of the chunk's blocks, one after the other. They come to
// its own shared memory by asynchronous copies, in pieces: as soon as a piece has been used, the next block's takes its
// place, so that nearly a whole block is on its way to each warp at any time, and none waits for another until the
// chunk is done. The loops over pieces are not unrolled: warps are at different places of the code, all of which has to
// stay in the cache of instructions.
//
// Numbers of the queries times the keys' steps (weights times the values' steps) are made by all lanes, eight to a
// query, and meet in shared memory as the operand B. Offsets are fp32 from the first to the last.
// The lanes t of a column have query t in both of their columns: its largest score, its weights' sum, its values' sums.
#pragma once

#include "cuda/kv_units.hpp"

namespace bitfold::cuda {

template <KvFormat Format, int Head>
class PackedAttention {
  static constexpr int kBits = kKvFormats[static_cast<int>(Format)].bits;  // and bytes of a word
  static constexpr bool kOffsets = kKvFormats[static_cast<int>(Format)].offsets;
  static constexpr int kTokens = static_cast<int>(kKvPackedGroup);
  static constexpr int kStep = 32;          // rows of codes that are summed over at once
  static constexpr int kParts = Head / 64;  // of a row of values: what eight lanes take of it
  static constexpr int kKeySteps = Head / kStep, kValueSteps = kTokens / kStep;
  static constexpr int kKeyRow = kTokens * kBits / 8, kValueRow = Head * kBits / 8;  // bytes
  static constexpr int kPart = 8 * kBits;                                            // bytes of a part of a row
  static constexpr int kKeyCodes = Head * kKeyRow, kValueCodes = kTokens * kValueRow;
  static constexpr int kFloats = kOffsets ? 8 : 4;  // bytes of a step and its offset
  static constexpr int kKeyFloats = Head * kFloats, kValueFloats = kParts * kTokens * kFloats;  // at most
  // Groups of copies of a block: steps and offsets before codes, keys before values.
  static constexpr int kGroups = 1 + kKeySteps + 1 + kParts * kValueSteps;
  using Word = KvWord<Format>;
  using Sums = KvSums<Format>;

  struct Result {
    float most[kKvPackedTile], sum[kKvPackedTile], sums[kKvPackedTile][Head];
  };
  struct alignas(16) Own {  // a warp's
    union {
      struct {
        alignas(16) uint8_t keys[kKeyCodes + kKeyFloats];
        alignas(16) uint8_t values[kValueCodes + kValueFloats];
      } block;
      Result result;
    };
    alignas(16) uint32_t b[Head / kStep][4 * kWarp];
    float weights[kKvPackedTile][kTokens + 4];  // no two queries' in the same banks
  };

 public:
  struct Room {
    Own own[kKvWarps];
    float query[kKvPackedTile][Head];
  };

  BITFOLD_DEVICE PackedAttention(const KvJob& job, const KvPlace& place)
      : job_(job),
        place_(place),
        room_(shared<Room>()),
        own_(room_.own[ptx::warp_id()]),
        g_(ptx::lane_id() / 4),
        t_(ptx::lane_id() % 4),
        groups_(static_cast<int>(job.value_groups)),
        blocks_(job, place.head) {}

  BITFOLD_DEVICE void run() {
    const int64_t begin = job_.block_begin + place_.chunk * job_.chunk_blocks;
    const int64_t end = smaller(begin + job_.chunk_blocks, job_.block_end);
    int64_t number = begin + ptx::warp_id();
    const uint8_t* block = number < end ? blocks_.at(number) : nullptr;
    fetch_key_floats(block);
    for (int s = 0; s < kKeySteps; ++s) fetch_keys(block, s);
    fetch_value_floats(block);
    for (int i = 0; i < kParts * kValueSteps; ++i) fetch_values(block, i / kValueSteps, i % kValueSteps);
    read_query();
#pragma unroll 1
    for (; number < end; number += kKvWarps) {
      const uint8_t* next = number + kKvWarps < end ? blocks_.at(number + kKvWarps) : nullptr;
      const auto hidden = static_cast<int>(larger<int64_t>(0, job_.first - number * kTokens));
      Sums scores;
      const float unit = score(scores, next);
      const float shrunk = weigh(scores, unit, hidden, number * kTokens - job_.first);
      add_values(shrunk, hidden, next);
    }
    leave();
  }

 private:
  // ---- shared memory ----

  // Rows 4 t + i, which the lanes of a g read together, and the words of all g lie in different banks: pieces of 16
  // bytes change places by t.
  template <int RowBytes>
  BITFOLD_DEVICE static int place_of(int byte) {
    constexpr int kShift = std::bit_width(static_cast<unsigned>(RowBytes)) + 1;  // byte >> kShift: row / 4
    return byte ^ (byte >> kShift & 3) << 5;
  }
  // A part of the 32 rows of a step: a group of copies, of none where there is no block.
  template <int RowBytes>
  BITFOLD_DEVICE static void fetch(uint8_t* to, const uint8_t* from, int part, int step) {
    constexpr int kPieces = kPart / 16;  // of a row
    if (from != nullptr) {
      to += step * kStep * RowBytes;
      from += step * kStep * RowBytes + part * kPart;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int row = i * (kWarp / kPieces) + ptx::lane_id() / kPieces;
        const int at = row * RowBytes + ptx::lane_id() % kPieces * 16;
        ptx::cp_async<16>(to + (place_of<RowBytes>(at) ^ part * kPart), from + at);
      }
    }
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE static void fetch_floats(uint8_t* to, const uint8_t* from, int bytes) {
    if (from != nullptr) {
      for (int at = 16 * ptx::lane_id(); at < bytes; at += 16 * kWarp) ptx::cp_async<16>(to + at, from + at);
    }
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void fetch_key_floats(const uint8_t* block) {
    fetch_floats(own_.block.keys + kKeyCodes, block == nullptr ? block : block + kKeyCodes, kKeyFloats);
  }
  BITFOLD_DEVICE void fetch_keys(const uint8_t* block, int step) { fetch<kKeyRow>(own_.block.keys, block, 0, step); }
  BITFOLD_DEVICE void fetch_value_floats(const uint8_t* block) {
    fetch_floats(own_.block.values + kValueCodes, block == nullptr ? block : block + kValues + kValueCodes,
                 groups_ * kTokens * kFloats);
  }
  BITFOLD_DEVICE void fetch_values(const uint8_t* block, int part, int step) {
    fetch<kValueRow>(own_.block.values, block == nullptr ? block : block + kValues, part, step);
  }
  static constexpr int kValues = kKeyCodes + kKeyFloats;  // where values begin

  // Waits for the group that was begun a block ago, just before those that come after it in a block.
  BITFOLD_DEVICE static void wait() {
    ptx::cp_async_wait<kGroups - 1>();
    ptx::sync_warp();
  }
  // The words of a part of the rows of a step.
  template <int RowBytes>
  BITFOLD_DEVICE void words(const uint8_t* codes, int part, int step, Word (&out)[8]) const {
    codes += step * kStep * RowBytes;
    const int first = place_of<RowBytes>(4 * t_ * RowBytes + g_ * kBits) ^ part * kPart;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] = *reinterpret_cast<const Word*>(codes + i / 4 * 16 * RowBytes + (first ^ i % 4 * RowBytes));
  }
  // Four floats of rows 32 step + 4 u ..., u: which of its query's eight lanes a lane is.
  BITFOLD_DEVICE static float4 four(const void* floats, int step) {
    return static_cast<const float4*>(floats)[8 * step + ptx::lane_id() % 8];
  }
  BITFOLD_DEVICE uint4 operand(int step) const {
    return *reinterpret_cast<const uint4*>(&own_.b[step][4 * ptx::lane_id()]);
  }

  // ---- the query ----

  BITFOLD_DEVICE void read_query() {
    constexpr int kWords = Head / kKvWord;
    for (auto i = static_cast<int>(threadIdx.x); i < kKvPackedTile * kWords; i += kKvThreads) {
      const int q = i / kWords, d = i % kWords * kKvWord;
      const int64_t r = place_.first_query + q;
      float numbers[kKvWord] = {};
      if (r < job_.queries) read_floats(job_.query, kv_query(job_, place_.head, r) + d, 1, kKvWord, numbers);
#pragma unroll
      for (int j = 0; j < kKvWord; ++j) room_.query[q][d + j] = numbers[j] * job_.scale;
    }
    ptx::sync_block();
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) query_[s] = four(room_.query[columns_.query], s);
  }
  BITFOLD_DEVICE static float4 products(const float4& x, const float4& y, uint32_t& largest) {
    const float4 p{x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
    largest = larger(larger(larger(largest, bits_of(p.x)), larger(bits_of(p.y), bits_of(p.z))), bits_of(p.w));
    return p;
  }
  BITFOLD_DEVICE static uint32_t bits_of(float x) { return ptx::float_as_uint(x) & 0x7fffffffu; }
  BITFOLD_DEVICE static float dot(const float4& x, const float4& y, float sum) {
    return ptx::fma(x.x, y.x, ptx::fma(x.y, y.y, ptx::fma(x.z, y.z, ptx::fma(x.w, y.w, sum))));
  }
  // What its query's eight lanes have together.
  BITFOLD_DEVICE static uint32_t largest_of(uint32_t x) {
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) x = larger(x, ptx::shuffle_xor(x, mask));
    return x;
  }
  BITFOLD_DEVICE static float sum_of(float x) {
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) x += ptx::shuffle_xor(x, mask);
    return x;
  }
  // What the eight lanes of query t have.
  BITFOLD_DEVICE float of_query(float x) const { return ptx::shuffle(x, 8 * t_); }

  // ---- a block ----

  // Sums of the codes of tokens 8 g + 2 i (+ 1) times the query t; returns their unit. constant_ becomes the query's
  // sum of offsets.
  BITFOLD_DEVICE float score(Sums& scores, const uint8_t* next) {
    wait();
    const uint8_t *steps = own_.block.keys + kKeyCodes, *offsets = steps + 4 * Head;
    float4 x[kKeySteps];
    float constant = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
      x[s] = products(four(steps, s), query_[s], largest);
      if constexpr (kOffsets) constant = dot(four(offsets, s), query_[s], constant);
    }
    const typename Sums::Power power(largest_of(largest));
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) Sums::write(columns_, own_.b[s], x[s], power.inverse);
    if constexpr (kOffsets) constant_ = of_query(sum_of(constant));
    ptx::sync_warp();
    fetch_key_floats(next);
#pragma unroll 1
    for (int s = 0; s < kKeySteps; ++s) {
      wait();
      Word codes[8];
      words<kKeyRow>(own_.block.keys, 0, s, codes);
      scores.add(codes, operand(s));
      ptx::sync_warp();
      fetch_keys(next, s);
    }
    return of_query(power.unit);
  }

  // Scores become weights, in shared memory; returns what sums of earlier blocks shrink by. `key` is the place of the
  // block's first token among those that count.
  BITFOLD_DEVICE float weigh(const Sums& scores, float unit, int hidden, int64_t key) {
    float x[kKvWord], most = most_;
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) x[i] = scores.sum(i, unit, constant_);
    if (job_.mask != KvMask::None) {
#pragma unroll 1
      for (int i = 0; i < kKvWord; ++i) {
        const float bias = kv_bias(job_, place_.head, place_.first_query + t_, key + larger(8 * g_ + i, hidden));
#pragma unroll
        for (int j = 0; j < kKvWord; ++j) x[j] += i == j ? bias : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) {
      if (8 * g_ + i < hidden) x[i] = kKvHidden;
      most = x[i] > most ? x[i] : most;
    }
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) {
      const float other = ptx::shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    const float shrunk = expf(most_ - most);
    most_ = most;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) {
      x[i] = expf(x[i] - most);
      sum += x[i];
    }
    sum_ = ptx::fma(sum_, shrunk, sum);
    auto* to = reinterpret_cast<float4*>(&own_.weights[t_][8 * g_]);
    to[0] = {x[0], x[1], x[2], x[3]};
    to[1] = {x[4], x[5], x[6], x[7]};
    return shrunk;
  }

  BITFOLD_DEVICE void add_values(float shrunk, int hidden, const uint8_t* next) {
    wait();
    if (hidden > 0) hide(smaller(hidden, kTokens));
    const auto* steps = reinterpret_cast<const float*>(own_.block.values + kValueCodes);
    const float* offsets = steps + groups_ * kTokens;
    const float of_columns = ptx::shuffle(shrunk, columns_.query);
    float units[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (is_as_before(p)) {
        units[p] = units[0];
      } else {
        units[p] = weigh_steps(steps + p * kTokens, p);
        if constexpr (kOffsets) {
          float sum = offset_sums_[p] * of_columns;
#pragma unroll
          for (int s = 0; s < kValueSteps; ++s)
            sum = dot(four(own_.weights[columns_.query], s), four(offsets + p * kTokens, s), sum);
          offset_sums_[p] = sum;
        }
      }
    }
    ptx::sync_warp();
    fetch_value_floats(next);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      Sums sums;
#pragma unroll 1
      for (int s = 0; s < kValueSteps; ++s) {
        wait();
        Word codes[8];
        words<kValueRow>(own_.block.values, p, s, codes);
        sums.add(codes, operand((groups_ == 1 ? 0 : p) * kValueSteps + s));
        ptx::sync_warp();
        fetch_values(next, p, s);
      }
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) sums_[p][i] = sums.sum(i, units[p], sums_[p][i] * shrunk);
    }
  }
  // Whether a part of a row of values has the steps of the first one.
  BITFOLD_DEVICE bool is_as_before(int part) const { return part > 0 && groups_ == 1; }
  // The weights of tokens times their steps as B; returns their unit.
  BITFOLD_DEVICE float weigh_steps(const float* steps, int group) {
    float4 x[kValueSteps];
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kValueSteps; ++s)
      x[s] = products(four(steps, s), four(own_.weights[columns_.query], s), largest);
    const typename Sums::Power power(largest_of(largest));
#pragma unroll
    for (int s = 0; s < kValueSteps; ++s) Sums::write(columns_, own_.b[group * kValueSteps + s], x[s], power.inverse);
    return of_query(power.unit);
  }
  // Tokens that are hidden don't count, whatever their values are.
  BITFOLD_DEVICE void hide(int hidden) {
    ptx::cp_async_wait<0>();
    ptx::sync_warp();
    auto* floats = reinterpret_cast<float*>(own_.block.values + kValueCodes);
    for (int i = ptx::lane_id(); i < groups_ * kTokens * kFloats / 4; i += kWarp) {
      if (i % kTokens < hidden) floats[i] = 0.0f;
    }
    if constexpr (Format == KvFormat::Fp8) {
      for (int at = 16 * ptx::lane_id(); at < hidden * kValueRow; at += 16 * kWarp)
        *reinterpret_cast<uint4*>(own_.block.values + place_of<kValueRow>(at)) = {0, 0, 0, 0};
    }
    ptx::sync_warp();
  }

  // ---- results ----

  BITFOLD_DEVICE static float of_tokens(float x) {
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) x += ptx::shuffle_xor(x, mask);
    return x;
  }

  // What the warps found becomes one part for each query.
  BITFOLD_DEVICE void leave() {
    const float sum = of_tokens(sum_);
    ptx::sync_warp();  // the block's memory takes the result; nothing is on its way to it
    Result& mine = own_.result;
    if (g_ == 0) mine.most[t_] = most_, mine.sum[t_] = sum;
    float offsets[kParts] = {};
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (kOffsets) offsets[p] = is_as_before(p) ? offsets[0] : of_query(sum_of(offset_sums_[p]));
      auto* to = reinterpret_cast<float4*>(&mine.sums[t_][64 * p + 8 * g_]);
      const float more = offsets[p];
      to[0] = {sums_[p][0] + more, sums_[p][1] + more, sums_[p][2] + more, sums_[p][3] + more};
      to[1] = {sums_[p][4] + more, sums_[p][5] + more, sums_[p][6] + more, sums_[p][7] + more};
    }
    ptx::sync_block();
#pragma unroll 1
    for (int q = 0; q < kKvPackedTile && place_.first_query + q < job_.queries; ++q) {
      float most = kKvLowest, total = 0.0f, share[kKvWarps];
#pragma unroll
      for (int w = 0; w < kKvWarps; ++w) most = larger(room_.own[w].result.most[q], most);
#pragma unroll
      for (int w = 0; w < kKvWarps; ++w) {
        share[w] = expf(room_.own[w].result.most[q] - most);
        total = ptx::fma(room_.own[w].result.sum[q], share[w], total);
      }
      float* part = kv_part(job_, place_, place_.first_query + q);
      for (auto c = static_cast<int>(threadIdx.x); c < Head; c += kKvThreads) {
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < kKvWarps; ++w) value = ptx::fma(room_.own[w].result.sums[q][c], share[w], value);
        part[2 + c] = value;
      }
      if (threadIdx.x == 0) part[0] = most, part[1] = total;
    }
  }

  const KvJob& job_;
  const KvPlace& place_;
  Room& room_;
  Own& own_;
  const int g_, t_;
  const int groups_;  // of values' steps
  const KvColumns columns_;
  KvBlocks blocks_;
  float4 query_[kKeySteps];              // of query columns_.query, channels 32 s + 4 u ...
  float constant_ = 0.0f;                // of query t
  float most_ = kKvLowest, sum_ = 0.0f;  // of query t; sum_: this lane's tokens
  float sums_[kParts][kKvWord] = {};     // of query t, channels 64 p + 8 g ...
  float offset_sums_[kParts] = {};       // of query columns_.query and this lane's tokens
};

}  // namespace bitfold::cuda
