// How attention to the packed KV cache is cut: what its kernels are told, and the numbers of a word of codes.
#pragma once

#include <type_traits>

#include "cuda/matrix.hpp"
#include "formats/kv.hpp"

namespace bitfold::cuda {

inline constexpr int kKvThreads = 128, kKvWarps = kKvThreads / kWarp;
inline constexpr int kKvWord = 8;                      // numbers that a thread takes at once
inline constexpr int kKvSlots = kKvThreads * kKvWord;  // of sums of one query that threads have between them
inline constexpr int kKvPages = 96;                    // of one launch: pages are arguments, of which a launch has 4 KB
inline constexpr int64_t kKvChunk = 256;               // tokens at least, as whole blocks
inline constexpr int64_t kKvChunks = 64;               // of one head, as long as a chunk may have twice as many tokens
inline constexpr int64_t kKvExact = 64;                // exact tokens that are worked on at once
inline constexpr int64_t kKvWide = 1024;               // heads beyond this are done in slices, with one query at a time

// The blocks of a page, counted over all that the call reads.
struct KvRun {
  const uint8_t* data;
  int64_t begin;
  int64_t head_stride;  // bytes
};

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
  int64_t blocks_end;  // of all launches
  int64_t chunk_blocks, packed_chunks, chunk_begin, launch_chunks, chunks;
  float* parts;  // [batch, heads, chunks, queries, head + 2]: the largest score, the sum of weights, sums of values
  int run_count;
  KvRun runs[kKvPages];
};

// The codes of kKvWord numbers.
template <KvFormat Format>
using KvWord = std::conditional_t<Format == KvFormat::Int4, uint32_t, uint2>;

template <KvFormat Format>
BITFOLD_DEVICE KvWord<Format> load_word(const uint8_t* at) {
  if constexpr (Format == KvFormat::Int4) {
    return ptx::load_streaming4(at);
  } else {
    // Values of fp8 begin at a multiple of four where the head size is odd.
    if (Format == KvFormat::Fp8 && reinterpret_cast<uintptr_t>(at) % 8 != 0)
      return {ptx::load_streaming4(at), ptx::load_streaming4(at + 4)};
    return ptx::load_streaming8(at);
  }
}

// Bytes of 0 to 255 as floats: 2^23 and a byte is a float whose lowest bits are the byte.
BITFOLD_DEVICE void floats_of_bytes(uint32_t bytes, float (&out)[kKvWord], int first, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float moved = ptx::uint_as_float(ptx::prmt(bytes, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i)));
    out[first + i * step] = ptx::add(moved, -8388608.0f);
  }
}

template <KvFormat Format>
BITFOLD_DEVICE void floats_of_word(KvWord<Format> word, float (&out)[kKvWord]) {
  if constexpr (Format == KvFormat::Int8) {
    floats_of_bytes(word.x, out, 0, 1);
    floats_of_bytes(word.y, out, 4, 1);
  } else if constexpr (Format == KvFormat::Int4) {
    floats_of_bytes(word & 0x0f0f0f0fu, out, 0, 2);
    floats_of_bytes(word >> 4 & 0x0f0f0f0fu, out, 1, 2);
  } else {
    const uint32_t pairs[4] = {word.x, word.x >> 16, word.y, word.y >> 16};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 numbers = ptx::halves_to_floats(ptx::e4m3s_to_halves(pairs[i] & 0xffffu));
      out[2 * i] = numbers.x;
      out[2 * i + 1] = numbers.y;
    }
  }
}

}  // namespace bitfold::cuda
