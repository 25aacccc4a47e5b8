// Attention to blocks of 64 tokens and heads of 64 or 128 numbers by the units for matrices: what the packed cache
// makes by default, of most models.
//
// A warp has a block's keys and values to itself: a quarter of the chunk's blocks, one after the other. Both halves of
// a block come to its own shared memory by asynchronous copies, the next block's keys while it is at work on this one's
// values, so that no warp waits for another until the chunk is done.
//
// Codes are the operand A of mma.m16n8k16, whose rows are tokens (of keys) or channels (of values) and whose columns
// are those that are summed over. Of both, numbers lie in memory with those that are summed over the furthest apart, so
// a lane takes eight neighbours of four such rows and pairs their bytes by moves. A whole number below 256 is the
// subnormal half of its bits, 2^-24 of it; 2^24 comes to the sums. As the order of sums is no matter, a step of mma
// has 16 rows on end, of which the lanes t have four each.
//
// B has a query in two columns: each of its numbers times the key's step (each weight times the value's step) is the
// sum of two halves, 22 bits of it. A power of two, by which the largest of a query and a block is divided before, is
// taken back from the sums, so that nothing overflows; offsets are fp32 from the first to the last.
// The lanes of a column have query t in both of their columns: its largest score, its weights' sum, its values' sums.
#pragma once

#include "cuda/kv_chunk.hpp"

namespace bitfold::cuda {

template <KvFormat Format, int Head>
class PackedAttention {
  static constexpr int kBits = kKvFormats[static_cast<int>(Format)].bits;  // and bytes of a word
  static constexpr bool kOffsets = kKvFormats[static_cast<int>(Format)].offsets;
  static constexpr int kTokens = static_cast<int>(kKvPackedGroup);
  static constexpr int kParts = Head / 64;  // of a row of values: what eight lanes take of it
  static constexpr int kKeySteps = Head / 16, kValueSteps = kTokens / 16;
  static constexpr int kKeyRow = kTokens * kBits / 8, kValueRow = Head * kBits / 8;  // bytes
  static constexpr int kKeyCodes = Head * kKeyRow, kValueCodes = kTokens * kValueRow;
  static constexpr int kFloats = kOffsets ? 8 : 4;  // bytes of a step and its offset
  static constexpr int kKeyBytes = kKeyCodes + Head * kFloats;
  static constexpr int kValueBytes = kValueCodes + kParts * kTokens * kFloats;
  static constexpr float kCode = Format == KvFormat::Fp8 ? 1.0f : 0x1p24f;
  static constexpr float kOdd = Format == KvFormat::Int4 ? kCode / 16 : kCode;  // the high half of a byte as it lies
  using Word = KvWord<Format>;

  struct Result {
    float most[kKvPackedTile], sum[kKvPackedTile], sums[kKvPackedTile][Head];
  };
  struct alignas(16) Own {  // a warp's
    union {
      struct {
        alignas(16) uint8_t keys[kKeyBytes];
        alignas(16) uint8_t values[kValueBytes];
      } block;
      Result result;
    };
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
        blocks_(job, place.head) {}

  BITFOLD_DEVICE void run() {
    const int64_t begin = job_.block_begin + place_.chunk * job_.chunk_blocks;
    const int64_t end = smaller(begin + job_.chunk_blocks, job_.block_end);
    int64_t number = begin + ptx::warp_id();
    const uint8_t* block = number < end ? blocks_.at(number) : nullptr;
    fetch_keys(block);
    fetch_values(block);
    read_query();
    for (; number < end; number += kKvWarps) {
      const uint8_t* next = number + kKvWarps < end ? blocks_.at(number + kKvWarps) : nullptr;
      const auto hidden = static_cast<int>(larger<int64_t>(0, job_.first - number * kTokens));
      ptx::cp_async_wait<1>();
      ptx::sync_warp();
      float scores[4][4] = {};
      const float unit = score(scores);
      const float shrunk = weigh(scores, unit, hidden, number * kTokens - job_.first);
      ptx::sync_warp();  // the keys have been read, the weights are written
      fetch_keys(next);
      ptx::cp_async_wait<1>();
      ptx::sync_warp();
      add_values(shrunk, hidden);
      ptx::sync_warp();
      fetch_values(next);
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
  // A half of a block, as it lies but for the places of codes. A group of copies, of none where there is no block.
  template <int RowBytes, int Codes, int Bytes>
  BITFOLD_DEVICE static void fetch(uint8_t* to, const uint8_t* from, int bytes) {
    if (from != nullptr) {
#pragma unroll
      for (int i = 0; i < Bytes; i += 16 * kWarp) {
        const int at = i + 16 * ptx::lane_id();
        if (i + 16 * kWarp <= Codes) ptx::cp_async<16>(to + place_of<RowBytes>(at), from + at);
        else if (at < bytes) ptx::cp_async<16>(to + (at < Codes ? place_of<RowBytes>(at) : at), from + at);
      }
    }
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void fetch_keys(const uint8_t* block) {
    fetch<kKeyRow, kKeyCodes, kKeyBytes>(own_.block.keys, block, kKeyBytes);
  }
  BITFOLD_DEVICE void fetch_values(const uint8_t* block) {
    const auto bytes = kValueCodes + static_cast<int>(job_.value_groups) * kTokens * kFloats;
    fetch<kValueRow, kValueCodes, kValueBytes>(own_.block.values,
                                               block == nullptr ? block : block + job_.at.value_codes, bytes);
  }
  template <int RowBytes>
  BITFOLD_DEVICE static Word word(const uint8_t* codes, int row, int byte) {
    return *reinterpret_cast<const Word*>(codes + place_of<RowBytes>(row * RowBytes + byte));
  }
  // Four floats of rows 16 step + 4 t ...
  BITFOLD_DEVICE float4 four(const void* floats, int step) const {
    return static_cast<const float4*>(floats)[4 * step + t_];
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
    for (int s = 0; s < kKeySteps; ++s) query_[s] = four(room_.query[g_ / 2], s);
  }

  // What numbers that become halves are divided by, a power of two: the largest of them is below 2^15 then.
  struct Power {
    float unit, inverse;
    BITFOLD_DEVICE explicit Power(uint32_t largest) {
      const int exponent = smaller(larger(static_cast<int>(largest >> 23), 15), 252);
      unit = ptx::uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
      inverse = ptx::uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
    }
  };
  BITFOLD_DEVICE static float4 products(const float4& x, const float4& y, uint32_t& largest) {
    const float4 p{x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
    largest = larger(larger(larger(largest, bits_of(p.x)), larger(bits_of(p.y), bits_of(p.z))), bits_of(p.w));
    return p;
  }
  BITFOLD_DEVICE static uint32_t bits_of(float x) { return ptx::float_as_uint(x) & 0x7fffffffu; }
  // The largest of all lanes t: of query g / 2.
  BITFOLD_DEVICE static uint32_t of_rows(uint32_t largest) {
    largest = larger(largest, ptx::shuffle_xor(largest, 1));
    return larger(largest, ptx::shuffle_xor(largest, 2));
  }
  // What lanes of query g / 2 have, of query t.
  BITFOLD_DEVICE float of_query(float x) const { return ptx::shuffle(x, 8 * t_); }

  // Columns of B: the even one of a query has its numbers as halves, the odd one what is left of them.
  BITFOLD_DEVICE uint32_t halves(float low, float high) const {
    const uint32_t rounded = ptx::floats_to_halves(low, high);
    const float2 back = ptx::halves_to_floats(rounded);
    const uint32_t rest = ptx::floats_to_halves(low - back.x, high - back.y);
    return g_ % 2 == 0 ? rounded : rest;
  }
  BITFOLD_DEVICE void columns(const float4& x, float inverse, uint32_t (&b)[2]) const {
    b[0] = halves(x.x * inverse, x.y * inverse);
    b[1] = halves(x.z * inverse, x.w * inverse);
  }

  // ---- codes ----

  // Words of eight numbers in rows 4 t ... 4 t + 3 to operands: A of tile i has numbers 2 i (rows g) and 2 i + 1 (rows
  // g + 8).
  BITFOLD_DEVICE static void operands(const Word (&words)[4], uint32_t (&a)[4][4]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const Word &first = words[2 * pair], &second = words[2 * pair + 1];
      if constexpr (Format == KvFormat::Int4) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          const uint32_t both = ptx::prmt(first, second, i * 0x11u | (4 + i) * 0x1100u);
          a[i][2 * pair] = both & 0x000f000fu;
          a[i][2 * pair + 1] = both & 0x00f000f0u;
        }
      } else {
        operands_of_bytes(first.x, second.x, a[0], a[1], 2 * pair);
        operands_of_bytes(first.y, second.y, a[2], a[3], 2 * pair);
      }
    }
  }
  BITFOLD_DEVICE static void operands_of_bytes(uint32_t first, uint32_t second, uint32_t (&low)[4], uint32_t (&high)[4],
                                               int place) {
    const uint32_t two = ptx::prmt(first, second, 0x5140u), more = ptx::prmt(first, second, 0x7362u);
    low[place] = operand<0>(two), low[place + 1] = operand<1>(two);
    high[place] = operand<0>(more), high[place + 1] = operand<1>(more);
  }
  template <int Half>
  BITFOLD_DEVICE static uint32_t operand(uint32_t bytes) {
    if constexpr (Format == KvFormat::Fp8) return ptx::e4m3s_to_halves(bytes >> 16 * Half & 0xffffu);
    else return ptx::prmt(bytes, 0u, Half == 0 ? 0x4140u : 0x4342u);
  }

  // ---- a block ----

  // Sums of the codes of tokens 8 g + 2 i (+ 1) times the query t, in both of its columns; returns what B was divided
  // by. constant_ becomes the query's sum of offsets.
  BITFOLD_DEVICE float score(float (&scores)[4][4]) {
    const uint8_t* codes = own_.block.keys;
    const uint8_t *steps = codes + kKeyCodes, *offsets = steps + 4 * Head;
    float4 x[kKeySteps];
    float constant = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
      const float4& q = query_[s];
      x[s] = products(four(steps, s), q, largest);
      if constexpr (kOffsets) {
        const float4 offset = four(offsets, s);
        constant = ptx::fma(offset.x, q.x, ptx::fma(offset.y, q.y, constant));
        constant = ptx::fma(offset.z, q.z, ptx::fma(offset.w, q.w, constant));
      }
    }
    const Power power(of_rows(largest));
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
      uint32_t a[4][4], b[2];
      columns(x[s], power.inverse, b);
      Word words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = word<kKeyRow>(codes, 16 * s + 4 * t_ + j, g_ * kBits);
      operands(words, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::mma_f16(scores[i], a[i], b);
    }
    if constexpr (kOffsets) {
      constant += ptx::shuffle_xor(constant, 1);
      constant += ptx::shuffle_xor(constant, 2);
      constant_ = of_query(constant);
    }
    return of_query(power.unit);
  }

  // Scores become weights, in shared memory; returns what sums of earlier blocks shrink by. `key` is the place of the
  // block's first token among those that count.
  BITFOLD_DEVICE float weigh(const float (&scores)[4][4], float unit, int hidden, int64_t key) {
    float x[kKvWord], most = most_;
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) {
      const float two = scores[i / 2][i % 2 * 2] + scores[i / 2][i % 2 * 2 + 1];
      x[i] = ptx::fma(two * (i % 2 == 0 ? kCode : kOdd), unit, constant_);
    }
    if (job_.mask != KvMask::None) {
#pragma unroll
      for (int i = 0; i < kKvWord; ++i)
        x[i] += kv_bias(job_, place_.head, place_.first_query + t_, key + larger(8 * g_ + i, hidden));
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
    for (int p = 0; p < kParts && kOffsets; ++p) offset_sums_[p] *= shrunk;
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) weights_[i] = x[i];
    return shrunk;
  }

  BITFOLD_DEVICE void add_values(float shrunk, int hidden) {
    const uint8_t* codes = own_.block.values;
    const auto* steps = reinterpret_cast<const float*>(codes + kValueCodes);
    const float* offsets = steps + job_.value_groups * kTokens;
    uint32_t b[kValueSteps][2];
    float unit = 0.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int group = job_.value_groups == 1 ? 0 : p;
      if (p == 0 || job_.value_groups > 1) unit = weighted_steps(steps + group * kTokens, hidden, b);
      if constexpr (kOffsets) {
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) {
          const int token = 8 * g_ + i;
          const float offset = token < hidden ? 0.0f : offsets[group * kTokens + token];
          offset_sums_[p] = ptx::fma(weights_[i], offset, offset_sums_[p]);
        }
      }
      float sums[4][4] = {};
#pragma unroll
      for (int s = 0; s < kValueSteps; ++s) {
        Word words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = 16 * s + 4 * t_ + j;
          words[j] = word<kValueRow>(codes, token, 8 * p * kBits + g_ * kBits);
          if (Format == KvFormat::Fp8 && token < hidden) words[j] = Word{};  // it may be no number
        }
        uint32_t a[4][4];
        operands(words, a);
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::mma_f16(sums[i], a[i], b[s]);
      }
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) {
        const float two = sums[i / 2][i % 2 * 2] + sums[i / 2][i % 2 * 2 + 1];
        sums_[p][i] = ptx::fma(two * (i % 2 == 0 ? kCode : kOdd), unit, sums_[p][i] * shrunk);
      }
    }
  }
  // The weights of tokens times their steps as B; returns what they were divided by.
  BITFOLD_DEVICE float weighted_steps(const float* steps, int hidden, uint32_t (&b)[kValueSteps][2]) const {
    float4 x[kValueSteps];
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kValueSteps; ++s) {
      float4 step = four(steps, s);
      const int token = 16 * s + 4 * t_;
      if (token < hidden) step.x = 0.0f;
      if (token + 1 < hidden) step.y = 0.0f;
      if (token + 2 < hidden) step.z = 0.0f;
      if (token + 3 < hidden) step.w = 0.0f;
      x[s] = products(step, four(own_.weights[g_ / 2], s), largest);
    }
    const Power power(of_rows(largest));
#pragma unroll
    for (int s = 0; s < kValueSteps; ++s) columns(x[s], power.inverse, b[s]);
    return of_query(power.unit);
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
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const float offsets = kOffsets ? of_tokens(offset_sums_[p]) : 0.0f;
      auto* to = reinterpret_cast<float4*>(&mine.sums[t_][64 * p + 8 * g_]);
      to[0] = {sums_[p][0] + offsets, sums_[p][1] + offsets, sums_[p][2] + offsets, sums_[p][3] + offsets};
      to[1] = {sums_[p][4] + offsets, sums_[p][5] + offsets, sums_[p][6] + offsets, sums_[p][7] + offsets};
    }
    ptx::sync_block();
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
  KvBlocks blocks_;
  float4 query_[kKeySteps];              // of query g / 2, channels 16 s + 4 t ...
  float constant_ = 0.0f;                // of query t
  float most_ = kKvLowest, sum_ = 0.0f;  // of query t; sum_: this lane's tokens
  float weights_[kKvWord];               // of query t, tokens 8 g ...
  float sums_[kParts][kKvWord] = {};     // of query t, channels 64 p + 8 g ...
  float offset_sums_[kParts] = {};       // of query t and this lane's tokens
};

}  // namespace bitfold::cuda
