// What a block of threads that attends to a chunk of tokens asks of its job (kv_attention.hpp), however it attends.
#pragma once

#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {

inline constexpr float kKvHidden = std::bit_cast<float>(0xff800000u);  // the score of a token that doesn't count

// Which chunk and which queries of which head: the chunks of exact tokens, which may take longest, begin first.
struct KvPlace {
  int first_query, slice, chunk, head;  // head: of all batches

  BITFOLD_DEVICE explicit KvPlace(const KvJob& job) {
    const auto tiles = static_cast<unsigned>(job.tiles), beside = tiles * static_cast<unsigned>(job.slices);
    const auto chunks = static_cast<unsigned>(job.launch_chunks);
    first_query = static_cast<int>(blockIdx.x % tiles) * job.tile;
    slice = static_cast<int>(blockIdx.x % beside / tiles * kKvWide);
    chunk = static_cast<int>((blockIdx.x / beside + static_cast<unsigned>(job.packed_chunks)) % chunks);
    head = static_cast<int>(blockIdx.x / beside / chunks);
  }
};

// Blocks of a head, which are asked for in ascending order.
class KvBlocks {
 public:
  BITFOLD_DEVICE KvBlocks(const KvJob& job, int head) : job_(job), head_(head) {}
  BITFOLD_DEVICE const uint8_t* at(int64_t block) {
    run_ = kv_run(job_, block, run_);
    return kv_block(job_, head_, block, run_);
  }

 private:
  const KvJob& job_;
  const int head_;
  int run_ = 0;
};

// A head of all batches, and a query of a key-value head, as a batch's own. (Divisions of 64 bits are a hundred
// instructions each.)
struct KvHead {
  int batch, head;
  BITFOLD_DEVICE KvHead(const KvJob& job, int of_all)
      : batch(of_all / static_cast<int>(job.heads)), head(of_all % static_cast<int>(job.heads)) {}
};
struct KvQuery {
  int64_t query_head;
  int row;
  BITFOLD_DEVICE KvQuery(const KvJob& job, const KvHead& of, int64_t r) {
    const int rows = static_cast<int>(job.rows), of_head = static_cast<int>(r);
    query_head = of.head * job.shared + of_head / rows;
    row = of_head % rows;
  }
};

// What the mask adds to the score of query r of a head. key: the token's place among those that count.
BITFOLD_DEVICE float kv_bias(const KvJob& job, int head, int64_t r, int64_t key) {
  if (job.mask == KvMask::None || r >= job.queries) return 0.0f;
  const KvHead of(job, head);
  const KvQuery query(job, of, r);
  const int64_t at = of.batch * job.mask_strides[0] + query.query_head * job.mask_strides[1] +
                     query.row * job.mask_strides[2] + key * job.mask_strides[3];
  if (job.mask == KvMask::Float) return read_float(job.bias, at);
  return static_cast<const uint8_t*>(job.bias.data)[at] != 0 ? 0.0f : kKvHidden;
}

// Where query r of a head begins.
BITFOLD_DEVICE int64_t kv_query(const KvJob& job, int head, int64_t r) {
  const KvHead of(job, head);
  const KvQuery query(job, of, r);
  return of.batch * job.query_strides[0] + query.query_head * job.query_strides[1] + query.row * job.query_strides[2];
}

// Where packed blocks have their own way: a warp brings a query times the scale, or zeros where there is none.
template <int Head>
BITFOLD_DEVICE void kv_read_queries(const KvJob& job, const KvPlace& place, float (&to)[kKvPackedTile][Head]) {
  static_assert(kKvWarps == kKvPackedTile);
  constexpr int kEach = Head / kWarp;
  const int q = ptx::warp_id(), lane = ptx::lane_id();
  const int64_t r = place.first_query + q;
  float numbers[kEach] = {};
  if (r < job.queries) read_floats(job.query, kv_query(job, place.head, r) + lane, kWarp, kEach, numbers);
#pragma unroll
  for (int i = 0; i < kEach; ++i) to[q][lane + i * kWarp] = numbers[i] * job.scale;
}

// What the lanes of a warp have together. (A NaN is not larger than anything.)
BITFOLD_DEVICE float kv_sum_of_warp(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
  return x;
}
BITFOLD_DEVICE float kv_most_of_warp(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = ptx::shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// Eight floats to and from memory, 16 bytes at a time.
BITFOLD_DEVICE void kv_get(const float* from, float (&to)[kKvWord]) {
  const auto* fours = reinterpret_cast<const float4*>(from);
  const float4 low = fours[0], high = fours[1];
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
BITFOLD_DEVICE void kv_put(const float (&from)[kKvWord], float* to) {
  auto* fours = reinterpret_cast<float4*>(to);
  fours[0] = {from[0], from[1], from[2], from[3]};
  fours[1] = {from[4], from[5], from[6], from[7]};
}

// Where a head's exact token begins.
BITFOLD_DEVICE int64_t kv_number(const KvJob& job, int head, const int64_t (&strides)[3], int64_t token) {
  const KvHead of(job, head);
  return of.batch * strides[0] + of.head * strides[1] + token * strides[2];
}

// What a chunk leaves of query r: the largest score, the sum of weights, sums of values.
BITFOLD_DEVICE float* kv_part(const KvJob& job, const KvPlace& place, int64_t r) {
  return job.parts +
         ((place.head * job.chunks + job.chunk_begin + place.chunk) * job.queries + r) * (job.shape.head + 2);
}

}  // namespace bitfold::cuda
