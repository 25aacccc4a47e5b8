// Attention to blocks of 64 tokens and heads of 64 or 128 numbers by the units for matrices (kv_units.hpp): what the
// packed cache makes by default, of most models.
//
// A warp has a block's keys and values to itself: a quarter of the chunk's blocks, one after the other. They come to
// its own shared memory by asynchronous copies, in pieces of 32 rows of 64 numbers. A piece of keys, once used, makes
// room for one of the same block's values, and that for one of the next block's keys: so half a block is on its way to
// each of a multiprocessor's sixteen warps at any time, and none waits for another until the chunk is done. Keys and
// values pass through one loop, which is not unrolled: warps are at different places of the code, all of which has to
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
  static constexpr int kParts = Head / 64;  // of a row of values
  static constexpr int kKeySteps = Head / kStep, kValueSteps = kTokens / kStep;
  static constexpr int kPieces = kKeySteps;  // of keys, and of values
  static_assert(kPieces == kParts * kValueSteps);
  static constexpr int kRow = 64 * kBits / 8, kPiece = kStep * kRow, kValueRow = kParts * kRow;  // bytes
  static constexpr int kCodes = kPieces * kPiece;
  static constexpr int kFloats = kOffsets ? 8 : 4;  // bytes of a step and its offset
  static constexpr int kKeyFloats = Head * kFloats, kValueFloats = kParts * kTokens * kFloats;  // at most
  using Word = KvWord<Format>;
  using Sums = KvSums<Format>;

  struct Result {
    float most[kKvPackedTile], sum[kKvPackedTile], sums[kKvPackedTile][Head];
  };
  struct alignas(16) Own {  // a warp's
    union {
      alignas(16) uint8_t pieces[kPieces][kPiece];
      Result result;
    };
    alignas(16) uint8_t key_floats[kKeyFloats];
    alignas(16) uint8_t value_floats[kValueFloats];
    alignas(16) uint32_t b[kPieces][4 * kWarp];
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
    int64_t number = begin + ptx::shuffle(ptx::warp_id(), 0);  // so the compiler knows that all lanes have the same
    const uint8_t* block = number < end ? blocks_.at(number) : nullptr;
    fetch_key_floats(block);
#pragma unroll 1
    for (int i = 0; i < kPieces; ++i) fetch_keys(block, i);
    kv_read_queries(job_, place_, room_.query);
    ptx::sync_block();
#pragma unroll 1
    for (; number < end; number += kKvWarps) {
      const uint8_t* next = number + kKvWarps < end ? blocks_.at(number + kKvWarps) : nullptr;
      attend(number, block, next);
      block = next;
    }
    leave();
  }

 private:
  // ---- shared memory ----

  // Rows 4 t + i, which the lanes of a g read together, and the words of all g lie in different banks: runs of 32 bytes
  // change places by t.
  BITFOLD_DEVICE static int place_of(int byte) {
    constexpr int kShift = std::bit_width(static_cast<unsigned>(kRow)) + 1;  // byte >> kShift: row / 4
    return byte ^ (byte >> kShift & 3) << 5;
  }
  // A piece, whose rows are RowBytes apart: a group of copies, of none where there is no block.
  template <int RowBytes>
  BITFOLD_DEVICE void fetch(int piece, const uint8_t* block, int first) const {
    constexpr int kLanes = kRow / 16, kRows = kWarp / kLanes;  // of a row; that all lanes have at once
    if (block != nullptr) {
      uint8_t* to = own_.pieces[piece];
      const uint8_t* from = block + first + ptx::lane_id() / kLanes * RowBytes + ptx::lane_id() % kLanes * 16;
      const int place = place_of(16 * ptx::lane_id());
#pragma unroll
      for (int i = 0; i < kLanes; ++i)  // the bits of both places are disjoint
        ptx::cp_async<16>(to + (place ^ place_of(i * kRows * kRow)), from + i * kRows * RowBytes);
    }
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void fetch_keys(const uint8_t* block, int piece) const { fetch<kRow>(piece, block, piece * kPiece); }
  // The rows of a part of values, and then those of the next.
  BITFOLD_DEVICE void fetch_values(const uint8_t* block, int piece) const {
    const int part = piece / kValueSteps, step = piece % kValueSteps;
    fetch<kValueRow>(piece, block, kValues + step * kStep * kValueRow + part * kRow);
  }
  template <int Bytes>
  BITFOLD_DEVICE static void fetch_floats(uint8_t* to, const uint8_t* from, int bytes = Bytes) {
    if (from != nullptr) {
#pragma unroll
      for (int first = 0; first < Bytes; first += 16 * kWarp) {
        const int at = first + 16 * ptx::lane_id();
        if (at < bytes) ptx::cp_async<16>(to + at, from + at);
      }
    }
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void fetch_key_floats(const uint8_t* block) const {
    fetch_floats<kKeyFloats>(own_.key_floats, block == nullptr ? block : block + kCodes);
  }
  BITFOLD_DEVICE void fetch_value_floats(const uint8_t* block) const {
    fetch_floats<kValueFloats>(own_.value_floats, block + kValues + kCodes, groups_ * kTokens * kFloats);
  }
  static constexpr int kValues = kCodes + kKeyFloats;  // where values begin

  // Copies come in the order in which they are used: keys' floats, keys, values' floats, values. When one has been
  // used, that kPieces + 1 places later is asked for, so that this waits for the one that is next. It is where lanes
  // meet, too: what they write to shared memory (operands, weights) the others read after the next wait.
  BITFOLD_DEVICE static void wait() {
    ptx::cp_async_wait<kPieces>();
    ptx::sync_warp();
  }
  BITFOLD_DEVICE void words(int piece, Word (&out)[8]) const {
    const uint8_t* codes = own_.pieces[piece];
    const int first = place_of(4 * t_ * kRow + g_ * kBits);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] = *reinterpret_cast<const Word*>(codes + i / 4 * 16 * kRow + (first ^ i % 4 * kRow));
  }
  // Four floats of those rows of which a lane makes B: i = 0 is the first half of its first step, 1 the second half.
  BITFOLD_DEVICE float4 four(const void* floats, int i) const {
    return static_cast<const float4*>(floats)[16 * (i / 2) + 8 * columns_.step + 4 * (i % 2) + t_];
  }
  template <int Count>
  BITFOLD_DEVICE void write(int first_step, const float4 (&x)[Count], float inverse) {
#pragma unroll
    for (int i = 0; i < Count; i += 2)
      Sums::write(columns_, own_.b[first_step + i + columns_.step], x[i], x[i + 1], inverse);
  }
  BITFOLD_DEVICE uint4 operand(int step) const {
    return *reinterpret_cast<const uint4*>(&own_.b[step][4 * ptx::lane_id()]);
  }

  // ---- the query ----

  BITFOLD_DEVICE float4 query(int i) const { return four(room_.query[columns_.query], i); }
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

  BITFOLD_DEVICE void attend(int64_t number, const uint8_t* block, const uint8_t* next) {
    const auto hidden = static_cast<int>(larger<int64_t>(0, job_.first - number * kTokens));
    float shrunk, unit = fold(block), units[kParts];
#pragma unroll 1
    for (int part = -1; part < kParts; ++part) {  // keys, and the parts of values
      const bool keys = part < 0;
      const int first = keys ? 0 : part * kValueSteps, end = keys ? kPieces : first + kValueSteps;
      const int operands = keys || groups_ > 1 ? first : 0;
      Sums sums;
#pragma unroll 1
      for (int piece = first; piece < end; ++piece) {
        wait();
        Word codes[8];
        words(piece, codes);
        sums.add(codes, operand(operands + piece - first));
        ptx::sync_warp();
        if (keys) fetch_values(block, piece);
        else fetch_keys(next, piece);
      }
      if (keys) {
        shrunk = weigh(sums, unit, hidden, number * kTokens - job_.first);
        fold_values(shrunk, hidden, next, units);
      } else {
        add(sums, units, shrunk);
      }
    }
  }

  // The steps of the keys go into the queries, B; returns the unit of scores. constant_ becomes the query's sum of
  // offsets.
  BITFOLD_DEVICE float fold(const uint8_t* block) {
    wait();
    const uint8_t *steps = own_.key_floats, *offsets = steps + 4 * Head;
    float4 x[kKeySteps];
    float constant = 0.0f;
    uint32_t largest = 0;
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
      x[s] = products(four(steps, s), query(s), largest);
      if constexpr (kOffsets) constant = dot(four(offsets, s), query(s), constant);
    }
    const typename Sums::Power power(largest_of(largest));
    write(0, x, power.inverse);
    if constexpr (kOffsets) constant_ = of_query(sum_of(constant));
    fetch_value_floats(block);
    return of_query(power.unit);
  }

  // Scores, sums of the codes of tokens 8 g + 2 i (+ 1) times the query t, become weights, in shared memory; returns
  // what sums of earlier blocks shrink by. `key` is the place of the block's first token among those that count.
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
    kv_put(x, &own_.weights[t_][8 * g_]);
    return shrunk;
  }

  // The steps of the values go into the weights, B; units: of the sums of parts.
  BITFOLD_DEVICE void fold_values(float shrunk, int hidden, const uint8_t* next, float (&units)[kParts]) {
    wait();
    if (hidden > 0) hide(smaller(hidden, kTokens));
    const auto* steps = reinterpret_cast<const float*>(own_.value_floats);
    const float* offsets = steps + groups_ * kTokens;
    const float of_columns = ptx::shuffle(shrunk, columns_.query);
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
    fetch_key_floats(next);
  }
  // Sums of a part, which are the first ones of sums_ as of units, and become the last.
  BITFOLD_DEVICE void add(const Sums& sums, float (&units)[kParts], float shrunk) {
    const float unit = units[0];
    float added[kKvWord];
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) added[i] = sums.sum(i, unit, sums_[0][i] * shrunk);
#pragma unroll
    for (int p = 1; p < kParts; ++p) {
      units[p - 1] = units[p];
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) sums_[p - 1][i] = sums_[p][i];
    }
    units[kParts - 1] = unit;
#pragma unroll
    for (int i = 0; i < kKvWord; ++i) sums_[kParts - 1][i] = added[i];
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
    write(group * kValueSteps, x, power.inverse);
    return of_query(power.unit);
  }
  // Tokens that are hidden don't count, whatever their values are.
  BITFOLD_DEVICE void hide(int hidden) {
    ptx::cp_async_wait<0>();
    ptx::sync_warp();
    auto* floats = reinterpret_cast<float*>(own_.value_floats);
    for (int i = ptx::lane_id(); i < groups_ * kTokens * kFloats / 4; i += kWarp) {
      if (i % kTokens < hidden) floats[i] = 0.0f;
    }
    if constexpr (Format == KvFormat::Fp8) {
      for (int piece = 0; piece < kPieces; ++piece) {
        const int rows = hidden - piece % kValueSteps * kStep;
        for (int at = 16 * ptx::lane_id(); at < smaller(rows, kStep) * kRow; at += 16 * kWarp)
          *reinterpret_cast<uint4*>(own_.pieces[piece] + place_of(at)) = {0, 0, 0, 0};
      }
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
    Result& mine = own_.result;  // where pieces were: all lanes have used them, and nothing is on its way
    if (g_ == 0) mine.most[t_] = most_, mine.sum[t_] = sum;
    float offsets[kParts] = {};
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (kOffsets) offsets[p] = is_as_before(p) ? offsets[0] : of_query(sum_of(offset_sums_[p]));
      float with_offset[kKvWord];
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) with_offset[i] = sums_[p][i] + offsets[p];
      kv_put(with_offset, &mine.sums[t_][64 * p + 8 * g_]);
    }
    ptx::sync_block();
    put_together(ptx::warp_id());
  }
  // A warp has a query.
  BITFOLD_DEVICE void put_together(int q) const {
    if (place_.first_query + q >= job_.queries) return;
    float most = kKvLowest, total = 0.0f, share[kKvWarps];
#pragma unroll
    for (int w = 0; w < kKvWarps; ++w) most = larger(room_.own[w].result.most[q], most);
#pragma unroll
    for (int w = 0; w < kKvWarps; ++w) {
      share[w] = expf(room_.own[w].result.most[q] - most);
      total = ptx::fma(room_.own[w].result.sum[q], share[w], total);
    }
    float* part = kv_part(job_, place_, place_.first_query + q);
#pragma unroll
    for (int c = ptx::lane_id(); c < Head; c += kWarp) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kKvWarps; ++w) value = ptx::fma(room_.own[w].result.sums[q][c], share[w], value);
      part[2 + c] = value;
    }
    if (ptx::lane_id() == 0) part[0] = most, part[1] = total;
  }

  const KvJob& job_;
  const KvPlace& place_;
  Room& room_;
  Own& own_;
  const int g_, t_;
  const int groups_;  // of values' steps
  const KvColumns columns_;
  KvBlocks blocks_;
  float constant_ = 0.0f;                // of query t
  float most_ = kKvLowest, sum_ = 0.0f;  // of query t; sum_: this lane's tokens
  float sums_[kParts][kKvWord] = {};     // of query t, channels 64 p + 8 g ...
  float offset_sums_[kParts] = {};       // of query columns_.query and this lane's tokens
};

}  // namespace bitfold::cuda
