// The kernel that encodes GGUF's blocks, for the units of each kind of search: a thread has a block, and runs the
// search that a CPU's lane runs (csrc/search).
#pragma once

#include "cuda/encode.hpp"
#include "cuda/lane.hpp"
#include "formats/blocks.hpp"
#include "search/blocks.hpp"
#include "search/misfit.hpp"

namespace bitfold::cuda {

struct BlocksArgs {
  MatrixIn w;
  const float* importance;  // may be null
  const float* row_means;   // null where nobody asks
  uint8_t* blocks;
  bool clamp;
  Faults* faults;
};

// Each knows some types, with importance where the search is another one.
void encode_affine(int row, const BlocksArgs& args, Stream stream);
void encode_symmetric(int row, const BlocksArgs& args, Stream stream);
void encode_iq4(int row, const BlocksArgs& args, Stream stream);
void encode_legacy(int row, const BlocksArgs& args, Stream stream);

// Threads of a block of them: a super-block's numbers are a kilobyte of shared memory.
template <int Row>
inline constexpr int kEncodeThreads = kFormats[Row].group == 256 ? 32 : 128;

template <int Row>
struct EncodeRoom {
  static constexpr int kValues = kFormats[Row].group, kBytes = kFormats[Row].block_bytes,
                       kThreads = kEncodeThreads<Row>;
  float x[kThreads][kValues + 1];  // one more: neighbours' numbers are in different banks
  alignas(16) uint8_t blocks[kThreads * kBytes];
  int64_t at[kThreads];  // where the numbers of each block start
};

// The numbers of `count` blocks, to fp32; consecutive lanes read consecutive columns.
template <int Row>
BITFOLD_DEVICE void read_blocks(const MatrixIn& w, int count, EncodeRoom<Row>& room) {
  constexpr int kEach = EncodeRoom<Row>::kValues / kWarp, kWarps = EncodeRoom<Row>::kThreads / kWarp;
#pragma unroll 4
  for (int b = ptx::warp_id(); b < count; b += kWarps) {
    float numbers[kEach];
    read_floats(w, room.at[b] + ptx::lane_id() * w.column_stride, kWarp * w.column_stride, kEach, numbers);
    for (int i = 0; i < kEach; ++i) room.x[b][ptx::lane_id() + i * kWarp] = numbers[i];
  }
}

template <int Row>
BITFOLD_DEVICE void write_blocks(const EncodeRoom<Row>& room, int count, uint8_t* to) {
  const int bytes = count * room.kBytes;
  int words = 0;
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    words = bytes / 4;
    const auto* from = reinterpret_cast<const uint32_t*>(room.blocks);
    for (int i = threadIdx.x; i < words; i += room.kThreads) reinterpret_cast<uint32_t*>(to)[i] = from[i];
  }
  for (int i = 4 * words + threadIdx.x; i < bytes; i += room.kThreads) to[i] = room.blocks[i];
}

// Encoder::run(args of one block, the mean of its row's squares).
template <int Row, class Encoder>
__global__ void __launch_bounds__(kEncodeThreads<Row>) encode_each_block(BlocksArgs a) {
  using Room = EncodeRoom<Row>;
  constexpr int kValues = Room::kValues, kBytes = Room::kBytes, kThreads = Room::kThreads;
  Room& room = shared<Room>();
  const int t = threadIdx.x;
  const int64_t row_blocks = a.w.columns / kValues, blocks = a.w.rows * row_blocks;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < blocks; first += int64_t{gridDim.x} * kThreads) {
    const int count = static_cast<int>(smaller<int64_t>(kThreads, blocks - first));
    const int64_t row = (first + t) / row_blocks, column = (first + t) % row_blocks * kValues;
    room.at[t] = row * a.w.row_stride + column * a.w.column_stride;
    ptx::sync_block();
    read_blocks(a.w, count, room);
    ptx::sync_block();
    if (t < count) {
      int odd = 0;
      while (odd < kValues && is_finite(room.x[t][odd])) ++odd;
      if (odd < kValues) {
        add_fault(a.faults, true, a.w, row, column + odd);
      } else {
        const float* importance = a.importance == nullptr ? nullptr : a.importance + column;
        const float* mean = a.row_means == nullptr ? nullptr : a.row_means + row;
        uint8_t* block = room.blocks + t * kBytes;
        Encoder::run({room.x[t], importance, 1, kValues, block}, mean);
        const float most = largest_magnitude(room.x[t], kValues);
        const bool wrong = misfits(*reinterpret_cast<const Block<Row>*>(block), room.x[t], most);
        if (wrong && !a.clamp) add_fault(a.faults, false, a.w, row, column);
      }
    }
    ptx::sync_block();
    write_blocks(room, count, a.blocks + first * kBytes);
    ptx::sync_block();
  }
}

template <int Row, class Encoder>
void start_encoder(const char* name, const BlocksArgs& args, Stream stream) {
  const int64_t blocks = args.w.rows * args.w.columns / kFormats[Row].group;
  const unsigned threads = kEncodeThreads<Row>;
  launch({grid_for(blocks, threads), threads, sizeof(EncodeRoom<Row>), name, stream}, encode_each_block<Row, Encoder>,
         args);
}

}  // namespace bitfold::cuda
