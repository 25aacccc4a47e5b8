// What a block of threads that attends to a chunk of tokens asks of its job (kv_attention.hpp), however it attends.
#pragma once

#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {

inline constexpr float kKvHidden = std::bit_cast<float>(0xff800000u);  // the score of a token that doesn't count

// Which chunk and which queries of which head: the chunks of exact tokens, which take longest, begin first.
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
    while (run_ + 1 < job_.run_count && job_.runs[run_ + 1].begin <= block) ++run_;
    const KvRun& run = job_.runs[run_];
    return run.data + head_ * run.head_stride + (block - run.begin) * job_.at.bytes;
  }

 private:
  const KvJob& job_;
  const int head_;
  int run_ = 0;
};

// What the mask adds to the score of query r of a head. key: the token's place among those that count.
BITFOLD_DEVICE float kv_bias(const KvJob& job, int head, int64_t r, int64_t key) {
  if (job.mask == KvMask::None || r >= job.queries) return 0.0f;
  const int64_t query_head = head % job.heads * job.shared + r / job.rows;
  const int64_t at = head / job.heads * job.mask_strides[0] + query_head * job.mask_strides[1] +
                     r % job.rows * job.mask_strides[2] + key * job.mask_strides[3];
  if (job.mask == KvMask::Float) return read_float(job.bias, at);
  return static_cast<const uint8_t*>(job.bias.data)[at] != 0 ? 0.0f : kKvHidden;
}

// Where query r of a head begins.
BITFOLD_DEVICE int64_t kv_query(const KvJob& job, int head, int64_t r) {
  const auto heads = static_cast<int>(job.heads), rows = static_cast<int>(job.rows), row = static_cast<int>(r);
  const int64_t query_head = head % heads * job.shared + row / rows;
  return head / heads * job.query_strides[0] + query_head * job.query_strides[1] + row % rows * job.query_strides[2];
}

// What a chunk leaves of query r: the largest score, the sum of weights, sums of values.
BITFOLD_DEVICE float* kv_part(const KvJob& job, const KvPlace& place, int64_t r) {
  return job.parts +
         ((place.head * job.chunks + job.chunk_begin + place.chunk) * job.queries + r) * (job.shape.head + 2);
}

}  // namespace bitfold::cuda
