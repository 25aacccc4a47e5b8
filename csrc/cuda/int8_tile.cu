// y[m, n] = x W^T with x in 8-bit codes, for more than 8 rows of x: a block has a tile of rows and a tile of tokens,
// and takes 64 columns of both at a time through shared memory, which come by asynchronous copies some stages ahead.
//
// W is the A operand of mma.m16n8k32, x the B operand. Both have a row's 64 columns in 64 bytes, of which a lane's 16
// are its operands of two steps (int8_rows.cu); eight lanes that read together have 128 bytes in one piece, and so all
// banks. One loop over columns, no scales in it: the sums are whole numbers. Outliers come to them at the end, from a
// table of their columns of W and x as fp32 in the memory of the stages: chains of fused multiply-adds, as the
// definition says.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;

// RowWarps warps beside one another in rows, the others in tokens; each has Tiles times 16 rows and Groups times 8
// tokens.
template <int RowWarps_, int Tiles_, int Groups_, int Stages_>
struct Shape {
  static constexpr int kRowWarps = RowWarps_, kTiles = Tiles_, kGroups = Groups_, kStages = Stages_;
  static constexpr int kRows = kRowWarps * kTiles * 16;
  static constexpr int kTokens = kWarps / kRowWarps * kGroups * 8;
  static constexpr int kPieces = (kRows + kTokens) * 4;  // of 16 bytes, in a stage
  static constexpr int kTurns = ceil_div(kPieces, kThreads);
};
using Few = Shape<4, 1, 2, 8>;   // 64 rows, 32 tokens: as many blocks as there are multiprocessors where n is 8192
using Many = Shape<4, 2, 8, 4>;  // 128 rows, 128 tokens

template <class S>
struct Table {  // of as many columns as stages leave room for
  static constexpr int kColumns = 16 * S::kStages;
  float w[kColumns][S::kRows];
  float x[kColumns][S::kTokens];
};
template <class S>
union Memory {
  uint4 stage[S::kStages][S::kRows + S::kTokens][4];  // W's rows, then tokens
  Table<S> table;
};

template <class S>
class Tile {
  static constexpr int kTableColumns = Table<S>::kColumns;

 public:
  BITFOLD_DEVICE Tile(const Int8Op& op, Memory<S>& memory, int64_t row, int64_t token)
      : op_(op),
        memory_(memory),
        row0_(row),
        token0_(token),
        warp_row_(ptx::warp_id() % S::kRowWarps * (16 * S::kTiles)),
        warp_token_(ptx::warp_id() / S::kRowWarps * (8 * S::kGroups)),
        last_row_(static_cast<int>(smaller<int64_t>(op.n - row, S::kRows)) - 1),
        last_token_(static_cast<int>(smaller<int64_t>(op.x.rows - token, S::kTokens)) - 1) {}

  BITFOLD_DEVICE void run() {
    multiply_all();
    scale();
    add_outliers();
    store();
  }

 private:
  // ---- whole sums ----

  // A thread's lines of a stage are the same in all of them, those of W in the first turns. Offsets are from the tile's
  // first row or token on.
  static constexpr int kLines = kThreads / 4;  // of a turn
  static constexpr int kRowTurns = S::kRows / kLines;
  static_assert(S::kRows % kLines == 0);
  static_assert((S::kRows + S::kTokens) * kPartColumns < int64_t{1} << 32);

  BITFOLD_DEVICE static int line_of(int turn) { return turn * kLines + static_cast<int>(threadIdx.x) / 4; }
  BITFOLD_DEVICE static int of_line() { return static_cast<int>(threadIdx.x) % 4; }
  BITFOLD_DEVICE void fetch(int piece, int stage) {
    const uint8_t* w = op_.codes + row0_ * op_.k + piece * kInt8Piece;
    const auto* x = reinterpret_cast<const uint8_t*>(op_.x_codes) + token0_ * op_.stride + piece * kInt8Piece;
    const int column = 16 * of_line();
    const bool there = piece * kInt8Piece + column < op_.k;  // x's codes have zeros behind k
    const auto k = static_cast<uint32_t>(op_.k), stride = static_cast<uint32_t>(op_.stride);
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const int line = line_of(turn);
      if (S::kPieces % kThreads != 0 && line >= S::kRows + S::kTokens) break;
      uint4* to = &memory_.stage[stage][line][of_line()];
      if (turn < kRowTurns) {
        const auto row = static_cast<uint32_t>(smaller(line, last_row_));
        ptx::cp_async<16>(to, w + (there ? row * k + static_cast<uint32_t>(column) : 0u), there ? 16 : 0);
      } else {
        const auto token = static_cast<uint32_t>(smaller(line - S::kRows, last_token_));
        ptx::cp_async<16>(to, x + (token * stride + static_cast<uint32_t>(column)));
      }
    }
  }

  BITFOLD_DEVICE void multiply_all() {
    const auto pieces = static_cast<int>(op_.stride / kInt8Piece);
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (i < pieces) fetch(i, i);
      ptx::cp_async_commit();
    }
    int stage = 0;
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      ptx::cp_async_wait<S::kStages - 2>();
      ptx::sync_block();  // all have their copies, and have read the stage that is filled next
      const int ahead = piece + S::kStages - 1;
      if (ahead < pieces) fetch(ahead, stage == 0 ? S::kStages - 1 : stage - 1);
      ptx::cp_async_commit();
      multiply(stage);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
  }

  BITFOLD_DEVICE void multiply(int stage) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    uint32_t a[S::kTiles][2][4];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      const uint4 low = memory_.stage[stage][warp_row_ + 16 * r + g][t];
      const uint4 high = memory_.stage[stage][warp_row_ + 16 * r + g + 8][t];
      a[r][0][0] = int8_codes(low.x), a[r][0][1] = int8_codes(high.x);
      a[r][0][2] = int8_codes(low.y), a[r][0][3] = int8_codes(high.y);
      a[r][1][0] = int8_codes(low.z), a[r][1][1] = int8_codes(high.z);
      a[r][1][2] = int8_codes(low.w), a[r][1][3] = int8_codes(high.w);
    }
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
      const uint4 x = memory_.stage[stage][S::kRows + warp_token_ + 8 * j + g][t];
      const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) ptx::mma_s8(sums_[r][j], a[r][step], b[step]);
      }
    }
  }

  // ---- numbers: from here on sums_ has the bits of fp32 ----

  // Of a sum's place: row g + 8 (i / 2), token 2 t + i % 2.
  BITFOLD_DEVICE int row_of(int r, int i) const { return warp_row_ + 16 * r + ptx::lane_id() / 4 + 8 * (i / 2); }
  BITFOLD_DEVICE int token_of(int j, int i) const { return warp_token_ + 8 * j + ptx::lane_id() % 4 * 2 + i % 2; }
  BITFOLD_DEVICE int64_t real_row(int row) const { return row0_ + smaller(row, last_row_); }
  BITFOLD_DEVICE int64_t real_token(int token) const { return token0_ + smaller(token, last_token_); }

  template <class Body>
  BITFOLD_DEVICE void each(const Body& body) {
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) body(r, j, i, sums_[r][j][i]);
      }
    }
  }

  BITFOLD_DEVICE void scale() {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) rows_[r][h] = int8_row(op_, real_row(row_of(r, 2 * h)));
    }
    each([&](int r, int j, int i, int& sum) {
      const float part = int8_part(op_, sum, rows_[r][i / 2], real_token(token_of(j, i)), 0);
      sum = ptx::float_as_int(ptx::add(0.0f, part));
    });
  }

  BITFOLD_DEVICE void add_outliers() {
    add_chains<false>(int8_outliers(op_));
    add_chains<true>(op_.copies);
  }

  // Adds the sums over `count` columns: those with a copy, or those without.
  template <bool Copied>
  BITFOLD_DEVICE void add_chains(int count) {
    if (count == 0) return;
    if (count <= kTableColumns) fill<Copied>(0, count);
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
      float chains[S::kTiles][4] = {};
#pragma unroll 1
      for (int begin = 0; begin < count; begin += kTableColumns) {
        const int columns = smaller(count - begin, kTableColumns);
        if (count > kTableColumns) fill<Copied>(begin, columns);
#pragma unroll 1
        for (int c = 0; c < columns; ++c) {
          const float* x = memory_.table.x[c] + token_of(j, 0);
#pragma unroll
          for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              chains[r][i] = ptx::add(chains[r][i], ptx::mul(x[i % 2], memory_.table.w[c][row_of(r, i)]));
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float chain = Copied ? chains[r][i] : ptx::mul(rows_[r][i / 2].scale, chains[r][i]);
          sums_[r][j][i] = ptx::float_as_int(ptx::add(ptx::int_as_float(sums_[r][j][i]), chain));
        }
      }
    }
  }

  // The table of columns [begin, begin + columns) of a list. Begins and ends with a barrier.
  template <bool Copied>
  BITFOLD_DEVICE void fill(int begin, int columns) {
    const int32_t* list = Copied ? op_.columns : op_.outliers;
    ptx::sync_block();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < columns * S::kRows; i += kThreads) {
      const int c = i / S::kRows, row = i % S::kRows;
      const int64_t real = real_row(row);
      memory_.table.w[c][row] =
          Copied ? read_float(op_.copy, real * op_.copies + begin + c)
                 : static_cast<float>(op_.codes[real * op_.k + list[begin + c]] - int8_row(op_, real).zero);
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < columns * S::kTokens; i += kThreads) {
      const int c = i / S::kTokens, token = i % S::kTokens;
      const int64_t real = real_token(token), column = list[begin + c];
      memory_.table.x[c][token] = Copied ? int8_x(op_, real, column) : int8_outlier(op_, real, column);
    }
    ptx::sync_block();
  }

  BITFOLD_DEVICE void store() {
    each([&](int r, int j, int i, int& sum) {
      const int row = row_of(r, i), token = token_of(j, i);
      if (row > last_row_ || token > last_token_) return;
      float y = ptx::int_as_float(sum);
      if (op_.bias != nullptr) y = ptx::add(y, read_float({op_.bias, op_.x.dtype, 1, 1, 1, 1}, row0_ + row));
      write_number(op_.y, op_.x.dtype, (token0_ + token) * op_.n + row0_ + row, y);
    });
  }

  const Int8Op& op_;
  Memory<S>& memory_;
  const int64_t row0_, token0_;
  const int warp_row_, warp_token_;
  const int last_row_, last_token_;  // of the tile
  int sums_[S::kTiles][S::kGroups][4] = {};
  Int8Row rows_[S::kTiles][2];
};

// Blocks that share rows of W come one after the other.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) int8_tile_kernel(const Int8Op op) {
  auto& memory = shared<Memory<S>>();
  const int64_t token_tiles = ceil_div<int64_t>(op.x.rows, S::kTokens);
  Tile<S>(op, memory, blockIdx.x / token_tiles * S::kRows, blockIdx.x % token_tiles * S::kTokens).run();
}

template <class S>
void launch_tiles(const Int8Op& op, Stream stream) {
  const int64_t tiles = ceil_div<int64_t>(op.n, S::kRows) * ceil_div<int64_t>(op.x.rows, S::kTokens);
  launch({.grid = static_cast<unsigned>(tiles),
          .block = kThreads,
          .shared_bytes = sizeof(Memory<S>),
          .name = "int8_tile",
          .stream = stream},
         int8_tile_kernel<S>, op);
}

}  // namespace

void int8_tile(const Int8Op& op, Stream stream) {
  return op.x.rows <= Few::kTokens ? launch_tiles<Few>(op, stream) : launch_tiles<Many>(op, stream);
}

}  // namespace bitfold::cuda
