// int8_tile's tiles where there is wgmma: 128 rows of W and 64, 128 or 256 tokens. Two warpgroups multiply 64 rows
// each, and a thread brings what they multiply, a box of 128 columns of W and of x at a time, as far ahead as shared
// memory goes; barriers tell each other. Products read both operands in shared memory, where boxes lie as wgmma likes
// them, so that a thread has registers for sums alone, and one of them is always on its way: a stage is given back when
// the product after its own has been issued.
//
// W's codes are multiplied as they are, without a sign. Rows, tokens and columns that aren't there are zeros in a box.
#pragma once

#include "cuda/int8.hpp"

namespace bitfold::cuda {

inline constexpr int kWideRows = 128, kWarpgroup = 4 * kWarp;
inline constexpr int kWideProducts = 2 * kWarpgroup;  // threads that multiply
inline constexpr int kWideThreads = kWideProducts + kWarp;
static_assert(kWideRows == kWideProducts / kWarpgroup * 64);
inline constexpr int kWidePieces = kBoxBytes / kInt8Piece;  // of a stage

// The op, and W's codes and x's by boxes of the rows and the tokens of a block.
struct Int8Boxes {
  Int8Op op;
  TensorMap w, x;
};

template <int Tokens>
struct WideMemory {
  struct alignas(1024) Stage {
    uint8_t w[kWideRows][kBoxBytes];
    uint8_t x[Tokens][kBoxBytes];
  };
  static constexpr int kStages = (225 << 10) / static_cast<int>(sizeof(Stage));
  Stage stages[kStages];
  Int8Found found[kStages][kWidePieces];  // of each stage's columns
  ptx::Barrier full[kStages], empty[kStages];
};
static_assert(sizeof(WideMemory<64>) <= 227 << 10 && sizeof(WideMemory<128>) <= 227 << 10 &&
              sizeof(WideMemory<256>) <= 227 << 10);

template <int Tokens>
class WideTile {
  using Memory = WideMemory<Tokens>;
  using Stage = typename Memory::Stage;
  static constexpr int kStages = Memory::kStages;

 public:
  BITFOLD_DEVICE WideTile(const Int8Boxes& boxes, Memory& memory, unsigned row_tile, unsigned token_tile)
      : op_(boxes.op),
        boxes_(boxes),
        memory_(memory),
        row0_(static_cast<int>(row_tile) * kWideRows),
        token0_(static_cast<int>(token_tile) * Tokens),
        last_token_(static_cast<int>(smaller<int64_t>(op_.x.rows - token0_, Tokens)) - 1) {
    const auto stages = static_cast<unsigned>(ceil_div<int64_t>(op_.k, kBoxBytes)),
               splits = static_cast<unsigned>(op_.tiles.splits);
    first_ = static_cast<int>(stages * blockIdx.y / splits);
    end_ = static_cast<int>(stages * (blockIdx.y + 1) / splits);
  }

  BITFOLD_DEVICE void run() {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::barrier_init(&memory_.full[i], 1);
        ptx::barrier_init(&memory_.empty[i], kWideProducts / kWarp);
      }
      ptx::fence_barrier_init();
    }
    ptx::sync_block();
    if (thread == kWideProducts) return bring();
    ptx::wait_for_earlier();
    if (thread < kWideProducts) multiply();
  }

 private:
  // Of a ring of stages the one whose turn it is, and the parity of its turn.
  struct Turn {
    int stage = 0;
    unsigned parity = 0;
    BITFOLD_DEVICE void next() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  // W of the first stages doesn't wait for int8_round, whose is x.
  BITFOLD_DEVICE void bring() {
    const int with_x = smaller(first_ + kStages, end_);
#pragma unroll 1
    for (int i = first_; i < with_x; ++i) bring_w(i, i - first_);
    ptx::wait_for_earlier();
    ptx::let_later_begin();
    Turn turn;
#pragma unroll 1
    for (int i = first_; i < end_; ++i, turn.next()) {
      if (i >= with_x) {
        ptx::barrier_wait(&memory_.empty[turn.stage], turn.parity ^ 1);
        bring_w(i, turn.stage);
      }
      bring_x(i, turn.stage);
    }
  }
  BITFOLD_DEVICE void bring_w(int i, int stage) {
    ptx::Barrier* full = &memory_.full[stage];
    ptx::barrier_expect(full, static_cast<unsigned>(sizeof(Stage) + (gathers() ? sizeof(memory_.found[0]) : 0)));
    ptx::copy_box(memory_.stages[stage].w, boxes_.w, i * kBoxBytes, row0_, full);
  }
  BITFOLD_DEVICE void bring_x(int i, int stage) {
    ptx::Barrier* full = &memory_.full[stage];
    ptx::copy_box(memory_.stages[stage].x, boxes_.x, i * kBoxBytes, token0_, full);
    if (!gathers()) return;
    ptx::copy_bulk(memory_.found[stage], op_.found + i * kWidePieces, sizeof(memory_.found[0]), full);
  }

  BITFOLD_DEVICE void multiply() {
    const uint64_t a = ptx::wgmma_box(memory_.stages[0].w[ptx::warp_id() / 4 * 64]);
    const uint64_t b = ptx::wgmma_box(memory_.stages[0].x);
    int sums[Tokens / 2] = {};
    Turn turn;
    int before = -1, i = first_;
#pragma unroll 1
    do {  // no block has none
      ptx::barrier_wait(&memory_.full[turn.stage], turn.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int bytes = 0; bytes < kBoxBytes; bytes += 32) {
        const int at = (turn.stage * static_cast<int>(sizeof(Stage)) + bytes) / 16;
        ptx::wgmma_u8s8<Tokens>(sums, a + at, b + at, true);
      }
      ptx::wgmma_commit();
      if (gathers()) gather(turn.stage);
      ptx::wgmma_wait<1>();
      if (before >= 0) release(before);
      before = turn.stage;
      turn.next();
    } while (++i < end_);
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(sums);
    store(sums);
  }
  // This warp has looked at all of a stage that it will.
  BITFOLD_DEVICE void release(int stage) const {
    ptx::sync_warp();
    if (ptx::lane_id() == 0) ptx::barrier_arrive(&memory_.empty[stage]);
  }

  // Outliers of W are picked out of the stages by one of those that read the same rows.

  BITFOLD_DEVICE bool gathers() const { return token0_ == 0 && op_.found != nullptr; }
  BITFOLD_DEVICE void gather(int stage) const {
    const auto row = static_cast<int>(threadIdx.x);
    if (row >= kWideRows) return;
#pragma unroll
    for (int piece = 0; piece < kWidePieces; ++piece) {
      each_found(memory_.found[stage][piece], op_.loose.lines, [&](int i, int of_piece) {
        const int column = piece * kInt8Piece + of_piece;
        const uint8_t code = memory_.stages[stage].w[row][column ^ row % 8 * 16];
        const int number = code - int8_zero(op_, smaller<int64_t>(row0_ + row, op_.n - 1));
        op_.loose.w[i * op_.table_rows + row0_ + row] = static_cast<float>(number);
      });
    }
  }

  // Sum 4 j + r is of row g + 8 (r / 2) of the warp's 16, token 8 j + 2 t + r % 2.
  BITFOLD_DEVICE void store(const int (&sums)[Tokens / 2]) const {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    int32_t* to = op_.partial + (blockIdx.y * op_.x.rows + token0_) * op_.table_rows + row0_ + 16 * ptx::warp_id() + g;
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 8 * j + 2 * t + i;
        if (token > last_token_) continue;
        to[token * op_.table_rows] = sums[4 * j + i];
        to[token * op_.table_rows + 8] = sums[4 * j + 2 + i];
      }
    }
  }

  const Int8Op& op_;
  const Int8Boxes& boxes_;
  Memory& memory_;
  const int row0_, token0_;
  const int last_token_;  // of the tile
  int first_, end_;       // stages of this block
};

}  // namespace bitfold::cuda
