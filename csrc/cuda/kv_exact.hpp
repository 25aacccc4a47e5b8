// Attention to exact tokens of 16 bits that come after blocks of 64 (kv_packed.hpp): a block of threads has at most 64.
//
// A thread has a word of eight channels of every eighth (or sixteenth) token, of keys and of values. It asks for all of
// them at once, into shared memory, where nobody else reads them: they wait there as in so many registers.
#pragma once

#include "cuda/kv_chunk.hpp"

namespace bitfold::cuda {

template <int Head>
class ExactAttention {
  static constexpr int kWords = Head / kKvWord;       // of a row
  static constexpr int kLanes = kKvThreads / kWords;  // that share the tokens
  static constexpr int kTokens = static_cast<int>(kKvPackedGroup);

 public:
  struct Room {
    uint4 values[kTokens][kWords];
    union {
      uint4 keys[kTokens][kWords];
      float sums[kLanes][kKvPackedTile][Head];
    };
    float query[kKvPackedTile][Head];
    float4 weights[kTokens];  // of the four queries; scores first
  };

  BITFOLD_DEVICE ExactAttention(const KvJob& job, const KvPlace& place)
      : job_(job),
        place_(place),
        room_(shared<Room>()),
        word_(static_cast<int>(threadIdx.x) % kWords),
        lane_(static_cast<int>(threadIdx.x) / kWords),
        token_((place.chunk - job.packed_chunks) * job.exact_tokens),
        count_(static_cast<int>(smaller(job.exact_tokens, job.recent - token_))) {}

  BITFOLD_DEVICE void run() const {
    fetch(job_.keys, job_.key_strides, room_.keys);
    fetch(job_.values, job_.value_strides, room_.values);
    kv_read_queries(job_, place_, room_.query);
    ptx::sync_block();
    score();
    ptx::sync_block();
    weigh(ptx::warp_id());
    ptx::sync_block();
    add_values();
    ptx::sync_block();
    leave(ptx::warp_id());
  }

 private:
  BITFOLD_DEVICE void fetch(const MatrixIn& in, const int64_t (&strides)[3], uint4 (&to)[kTokens][kWords]) const {
    const auto* numbers = static_cast<const uint16_t*>(in.data) + word_ * kKvWord;
    for (int t = lane_; t < count_; t += kLanes)
      ptx::cp_async<16>(&to[t][word_], numbers + kv_number(job_, place_.head, strides, token_ + t));
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void numbers_of(const uint4& word, float (&out)[kKvWord]) const {
    floats_of_pairs(word, job_.keys.dtype, out);
  }

  BITFOLD_DEVICE void score() const {
    float query[kKvPackedTile][kKvWord];
#pragma unroll
    for (int q = 0; q < kKvPackedTile; ++q) kv_get(&room_.query[q][word_ * kKvWord], query[q]);
    ptx::cp_async_wait<1>();
#pragma unroll 1
    for (int begin = 0; begin < count_; begin += kLanes) {  // the lanes of a warp alike
      const int t = begin + lane_;
      float numbers[kKvWord] = {}, dots[kKvPackedTile] = {};
      if (t < count_) numbers_of(room_.keys[t][word_], numbers);
#pragma unroll
      for (int q = 0; q < kKvPackedTile; ++q) {
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) dots[q] = ptx::fma(query[q][i], numbers[i], dots[q]);
      }
      const float sum = sum_of_words(dots);
      if (word_ < kKvPackedTile && t < count_) scores()[t * kKvPackedTile + query_of(word_)] = sum;
    }
  }
  // Sums over a token's words, in all of their lanes: of query query_of(word).
  BITFOLD_DEVICE float sum_of_words(const float (&x)[kKvPackedTile]) const {
    const bool odd = word_ % 2 != 0, upper = word_ / 2 % 2 != 0;
    const float first = (odd ? x[2] : x[0]) + ptx::shuffle_xor(odd ? x[0] : x[2], 1);
    const float second = (odd ? x[3] : x[1]) + ptx::shuffle_xor(odd ? x[1] : x[3], 1);
    float sum = (upper ? second : first) + ptx::shuffle_xor(upper ? first : second, 2);
#pragma unroll
    for (int mask = kKvPackedTile; mask < kWords; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
    return sum;
  }
  BITFOLD_DEVICE static int query_of(int word) { return word % 2 * 2 + word / 2 % 2; }
  BITFOLD_DEVICE float* scores() const { return reinterpret_cast<float*>(room_.weights); }

  // A warp has a query: its scores become weights.
  BITFOLD_DEVICE void weigh(int q) const {
    constexpr int kEach = kTokens / kWarp;
    const int64_t key = job_.blocks_end * job_.shape.group - job_.first + token_;
    float x[kEach], most = kKvLowest, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = ptx::lane_id() + i * kWarp;
      x[i] = kKvHidden;
      if (t < count_)
        x[i] = scores()[t * kKvPackedTile + q] + kv_bias(job_, place_.head, place_.first_query + q, key + t);
      most = x[i] > most ? x[i] : most;
    }
    most = kv_most_of_warp(most);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = ptx::lane_id() + i * kWarp;
      const float weight = expf(x[i] - most);
      if (t < count_) scores()[t * kKvPackedTile + q] = weight;
      sum += weight;
    }
    sum = kv_sum_of_warp(sum);
    if (ptx::lane_id() == 0 && place_.first_query + q < job_.queries) {
      float* part = kv_part(job_, place_, place_.first_query + q);
      part[0] = most, part[1] = sum;
    }
  }

  BITFOLD_DEVICE void add_values() const {
    float sums[kKvPackedTile][kKvWord] = {};
    ptx::cp_async_wait<0>();
#pragma unroll 1
    for (int t = lane_; t < count_; t += kLanes) {
      float numbers[kKvWord];
      numbers_of(room_.values[t][word_], numbers);
      const float4 four = room_.weights[t];
      const float weights[kKvPackedTile] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int q = 0; q < kKvPackedTile; ++q) {
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) sums[q][i] = ptx::fma(weights[q], numbers[i], sums[q][i]);
      }
    }
#pragma unroll
    for (int q = 0; q < kKvPackedTile; ++q) {
      kv_put(sums[q], &room_.sums[lane_][q][word_ * kKvWord]);
    }
  }

  // A warp has a query, whose sums meet in the order of lanes.
  BITFOLD_DEVICE void leave(int q) const {
    if (place_.first_query + q >= job_.queries) return;
    float* part = kv_part(job_, place_, place_.first_query + q);
#pragma unroll
    for (int c = ptx::lane_id(); c < Head; c += kWarp) {
      float sum = 0.0f;
#pragma unroll
      for (int l = 0; l < kLanes; ++l) sum += room_.sums[l][q][c];
      part[2 + c] = sum;
    }
  }

  const KvJob& job_;
  const KvPlace& place_;
  Room& room_;
  const int word_, lane_;
  const int64_t token_;  // the first
  const int count_;
};

}  // namespace bitfold::cuda
