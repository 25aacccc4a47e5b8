// How attention to the packed KV cache is cut, what its two kernels are told, and their launchers.
#pragma once

#include <bit>

#include "cuda/cuda.hpp"
#include "cuda/kv_blocks.hpp"
#include "cuda/matrix.hpp"

namespace bitfold::cuda {

inline constexpr int kKvThreads = 128, kKvWarps = kKvThreads / kWarp;
inline constexpr int kKvSlots = kKvThreads * kKvWord;  // of sums of one query that threads have between them
inline constexpr int64_t kKvChunk = 256;               // tokens at least, as whole blocks
inline constexpr int64_t kKvChunks = 64;               // of one head, as long as a chunk may have twice as many tokens
inline constexpr int64_t kKvExact = 16;                // exact tokens of a chunk, where blocks aren't short of room
inline constexpr int64_t kKvWide = 1024;               // heads beyond this are done in slices, with one query at a time

// Blocks that units for matrices attend to (kv_packed.hpp), a warp to each.
inline constexpr int64_t kKvPackedGroup = 64;  // tokens
inline constexpr int kKvPackedTile = 4;        // queries, of whatever number
inline constexpr int64_t kKvPackedBlocks = 4;  // of threads, of a multiprocessor, whose shared memory they may fill
inline constexpr int64_t kKvPackedTurns = 8;   // of a warp in a chunk, at most

struct KvJob {
  KvShape shape;
  KvLayout at;
  int64_t value_groups, value_row;
  int64_t heads;
  int64_t shared;   // query heads of a key-value head
  int64_t rows;     // of a query head
  int64_t queries;  // of a key-value head: shared * rows, in this order
  int tile;         // queries that a block of threads has: 1, 2 or 4
  int64_t tiles, slices;
  MatrixIn query, keys, values;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch, head, token
  int64_t first, recent;
  KvMask mask;
  MatrixIn bias;
  int64_t mask_strides[4];
  float scale;
  // The blocks of this launch, their chunks among all, and whether exact tokens come after them.
  int64_t block_begin, block_end;
  int64_t blocks_end;    // of all launches
  int64_t exact_tokens;  // of a chunk
  int64_t chunk_blocks, packed_chunks, chunk_begin, launch_chunks, chunks;
  float* parts;  // [batch, heads, chunks, queries, head + 2]: the largest score, the sum of weights, sums of values
  int run_count;
  KvRun runs[kKvPages];
};

struct KvMerge {
  const float* parts;
  int64_t chunks, batch, heads, shared, rows, queries, head;
  void* out;
  DType dtype;
};

inline constexpr float kKvLowest = std::bit_cast<float>(0xff7fffffu);  // the largest score of no tokens

inline unsigned kv_chunk_blocks(const KvJob& job, int64_t batch) {
  return kv_grid("kv_attention", batch * job.heads * job.launch_chunks * job.tiles * job.slices);
}

void kv_chunks(const KvJob& job, int64_t batch, Stream stream);
int64_t kv_packed_bytes(const KvShape& shape);  // of shared memory, of a block of threads
void kv_packed_chunks(const KvJob& job, int64_t batch, Stream stream);
void kv_merge(const KvMerge& merge, Stream stream);

}  // namespace bitfold::cuda
