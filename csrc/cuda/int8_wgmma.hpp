// int8_tile's tiles where there is wgmma: 128 rows of W and 128 or 256 tokens. Two warpgroups multiply 64 rows each,
// and one brings what they multiply, 64 columns at a time, as far ahead as shared memory goes; barriers tell each
// other. Products read both operands in shared memory, so that a thread has registers for sums alone, and one of them
// is always on its way: a stage is given back when the product after its own has been issued.
//
// W's codes are multiplied as they are, without a sign. Lines of a stage lie as the operands of wgmma: eight of them by
// 16 bytes make a core matrix. Four lanes copy a line's 64 bytes, since caches are asked for pieces of what eight do.
#pragma once

#include "cuda/int8.hpp"

namespace bitfold::cuda {

inline constexpr int kWideRows = 128, kWarpgroup = 4 * kWarp;
inline constexpr int kWideProducts = 2 * kWarpgroup;  // threads that multiply
inline constexpr int kWideThreads = kWideProducts + kWarpgroup;
static_assert(kWideRows == kWideProducts / kWarpgroup * 64);

// Between core matrices, so that the two lines that eight lanes copy lie in banks of their own.
inline constexpr int kApart = 2;

template <int Tokens>
struct WideMemory {
  static constexpr int kStages = Tokens == 128 ? 10 : 7;
  static constexpr int kLines = kWideRows + Tokens;  // W's rows, then tokens
  uint4 stage[kStages][kLines / 8][kInt8Piece / 16][8 + kApart];
  Int8Found found[kStages];  // of each stage's columns
  ptx::Barrier full[kStages], empty[kStages];
};
static_assert(sizeof(WideMemory<256>) <= 227 * 1024 && sizeof(WideMemory<128>) <= 227 * 1024);

template <int Tokens>
class WideTile {
  using Memory = WideMemory<Tokens>;
  static constexpr int kStages = Memory::kStages;
  static constexpr int kCore = (8 + kApart) * 16;         // bytes from a core matrix to the next
  static constexpr int kEight = kInt8Piece / 16 * kCore;  // of eight lines
  static constexpr int kStageBytes = Memory::kLines / 8 * kEight;

 public:
  BITFOLD_DEVICE WideTile(const Int8Op& op, Memory& memory, unsigned row_tile, unsigned token_tile)
      : op_(op),
        memory_(memory),
        row0_(int64_t{row_tile} * kWideRows),
        token0_(int64_t{token_tile} * Tokens),
        last_row_(static_cast<int>(smaller<int64_t>(op.n - row0_, kWideRows)) - 1),
        last_token_(static_cast<int>(smaller<int64_t>(op.x.rows - token0_, Tokens)) - 1) {
    const auto pieces = static_cast<unsigned>(op_.stride / kInt8Piece),
               splits = static_cast<unsigned>(op_.tiles.splits);
    first_ = static_cast<int>(pieces * blockIdx.y / splits);
    end_ = static_cast<int>(pieces * (blockIdx.y + 1) / splits);
  }

  BITFOLD_DEVICE void run() {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::barrier_init(&memory_.full[i], kWarpgroup);
        ptx::barrier_init(&memory_.empty[i], kWideProducts / kWarp);
      }
      ptx::fence_barrier_init();
    }
    ptx::sync_block();
    if (thread < kWideProducts) multiply();
    else bring(thread - kWideProducts);
  }

 private:
  // ---- the way in: a thread has 16 bytes of every 32nd line, or of a line beyond the tile's last those of the last
  // ----

  static constexpr int kTurnLines = kWarpgroup / 4, kTurns = Memory::kLines / kTurnLines;
  static constexpr int kRowTurns = kWideRows / kTurnLines;

  BITFOLD_DEVICE void bring(int thread) {
    const int line = thread / 4, of_line = thread % 4;
    uint32_t from[kTurns];  // where the lines begin, in bytes from the tile's first row or token on
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int number = turn * kTurnLines + line;
      from[turn] = turn < kRowTurns ? static_cast<uint32_t>(smaller(number, last_row_) * op_.k)
                                    : static_cast<uint32_t>(smaller(number - kWideRows, last_token_) * op_.stride);
    }
    const uint8_t* w = op_.codes + row0_ * op_.k;
    const auto* x = reinterpret_cast<const uint8_t*>(op_.x_codes) + token0_ * op_.stride;
    int stage = 0;
    unsigned parity = 1;  // of a phase before the first: stages are free
#pragma unroll 1
    for (int piece = first_; piece < end_; ++piece) {
      ptx::barrier_wait(&memory_.empty[stage], parity);
      const int64_t column = int64_t{piece} * kInt8Piece + 16 * of_line;
      const bool there = column < op_.k;  // x's codes have zeros behind k
      uint4* to = &memory_.stage[stage][line / 8][of_line][line % 8];
      if (thread == 0 && gathers()) ptx::cp_async<16>(&memory_.found[stage], op_.found + piece);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        uint4* into = to + turn * (kTurnLines / 8) * (kEight / 16);
        if (turn < kRowTurns) {
          ptx::cp_async<16>(into, w + from[turn] + (there ? column : 0), there ? 16 : 0);
        } else {  // zeros for tokens that aren't there: all blocks would queue for the last one
          const bool is_token = turn * kTurnLines + line - kWideRows <= last_token_;
          ptx::cp_async<16>(into, x + from[turn] + column, is_token ? 16 : 0);
        }
      }
      ptx::cp_async_arrive(&memory_.full[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }

  // ---- products ----

  BITFOLD_DEVICE void multiply() {
    const uint64_t a = ptx::wgmma_matrix(&memory_.stage[0][ptx::warp_id() / 4 * 8], kCore, kEight);
    const uint64_t b = ptx::wgmma_matrix(&memory_.stage[0][kWideRows / 8], kCore, kEight);
    int sums[Tokens / 2] = {};
    int piece = first_, stage = 0, before = -1;
    unsigned parity = 0;
#pragma unroll 1
    do {  // no block has none
      ptx::barrier_wait(&memory_.full[stage], parity);
      ptx::fence_async();
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kInt8Piece / 32; ++step) {
        const int at = (stage * kStageBytes + step * 2 * kCore) / 16;
        ptx::wgmma_u8s8<Tokens>(sums, a + at, b + at, true);
      }
      ptx::wgmma_commit();
      if (gathers()) gather(stage);
      ptx::wgmma_wait<1>();
      if (before >= 0) release(before);
      before = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    } while (++piece < end_);
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
    each_found(memory_.found[stage], op_.loose.lines, [&](int i, int column) {
      const auto* codes = reinterpret_cast<const uint8_t*>(&memory_.stage[stage][row / 8][column / 16][row % 8]);
      const int code = codes[column % 16] - int8_zero(op_, row0_ + smaller(row, last_row_));
      op_.loose.w[i * op_.table_rows + row0_ + row] = static_cast<float>(code);
    });
  }

  // ---- sums to memory ----

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
  Memory& memory_;
  const int64_t row0_, token0_;
  const int last_row_, last_token_;  // of the tile
  int first_, end_;                  // pieces of this block
};

}  // namespace bitfold::cuda
