// y[m, n] = x W^T with x in 8-bit codes, for more than 8 rows of x: a block has a tile of rows and a tile of tokens,
// and takes 64 columns of both at a time through shared memory, which come by asynchronous copies some stages ahead.
//
// W is the A operand of mma.m16n8k32, x the B operand. Both have a row's 64 columns in 64 bytes, of which a lane's 16
// are its operands of two steps (int8_rows.cu); eight lanes that read together have 128 bytes in one piece, and so all
// banks. One loop over columns, no scales in it: the sums are whole numbers. Outliers come to them at the end, from a
// table of their columns of W and x as fp32 in the memory of the stages: a chain of products and additions for each
// number, as the definition says.
//
// Where there are fewer tiles than a GPU has room for, k is cut over blocks: each writes its whole sums to memory, and
// the last to come adds all of them up and has the rest to do.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kBlocks = 2;  // of a multiprocessor

// RowWarps of Warps beside one another in rows, the others in tokens; each has Tiles times 16 rows and Groups times 8
// tokens.
template <int Warps_, int RowWarps_, int Tiles_, int Groups_, int Stages_>
struct Shape {
  static constexpr int kWarps = Warps_, kThreads = kWarp * kWarps;
  static constexpr int kRowWarps = RowWarps_, kTiles = Tiles_, kGroups = Groups_, kStages = Stages_;
  static constexpr int kRows = kRowWarps * kTiles * 16;
  static constexpr int kTokens = kWarps / kRowWarps * kGroups * 8;
  static constexpr int kTileSums = kRows * kTokens;
  // Of a stage: of its lines of 64 bytes a block copies kLines at a time, those of W in the first turns.
  static constexpr int kLinesOfAll = kRows + kTokens, kLines = kThreads / 4;
  static constexpr int kTurns = ceil_div(kLinesOfAll, kLines), kRowTurns = kRows / kLines;
  static_assert(kRows % kLines == 0);
  static constexpr int kOutRows = kRows + 4;  // so that the sums of a warp lie in banks of their own
};
using Few = Shape<8, 4, 1, 2, 8>;  // 64 rows, 32 tokens: as many blocks as there are multiprocessors where n is 8192
// 128 rows, 128 tokens. A warp has 64 of each, half of the registers: what decides is how often shared memory is read.
using Many = Shape<4, 2, 4, 8, 4>;

template <class S>
struct Table {  // of as many columns as stages leave room for
  static constexpr int kColumns = 16 * S::kStages;
  float w[kColumns][S::kRows];
  float x[kColumns][S::kTokens];
};
// Where the lines that a thread copies begin, in bytes from the tile's first row or token on: for all pieces, and in
// shared memory because sums take the registers.
template <class S>
struct alignas(8 * S::kTurns / 2) Lines {
  uint32_t bytes[S::kTurns];
};
template <class S>
struct Memory {
  union {
    uint4 stage[S::kStages][S::kLinesOfAll][4];  // W's rows, then tokens
    Int8Token tokens[S::kTokens];
    Table<S> table;
    float out[S::kTokens][S::kOutRows];
  };
  Int8Found found[S::kStages];  // of each stage's columns
  Lines<S> lines[S::kThreads];
  int last_row, last_token;
};

template <class S>
class Tile {
  static constexpr int kTableColumns = Table<S>::kColumns, kThreads = S::kThreads;

 public:
  BITFOLD_DEVICE Tile(const Int8Op& op, Memory<S>& memory, unsigned row_tile, unsigned token_tile)
      : op_(op),
        memory_(memory),
        row_tile_(row_tile),
        token_tile_(token_tile),
        last_row_(static_cast<int>(smaller<int64_t>(op.n - row0(), S::kRows)) - 1),
        last_token_(static_cast<int>(smaller<int64_t>(op.x.rows - token0(), S::kTokens)) - 1) {}

  BITFOLD_DEVICE void run() {
    // What is wanted afterwards waits in shared memory: the loop has registers for sums alone.
    if (threadIdx.x == 0) memory_.last_row = last_row_, memory_.last_token = last_token_;
    multiply_all();
    last_row_ = memory_.last_row, last_token_ = memory_.last_token;
    if (op_.tiles.splits > 1 && !add_splits()) return;
    scale();
    add_outliers();
    store();
  }

 private:
  // Little is kept beside the sums of many tokens.
  BITFOLD_DEVICE int64_t row0() const { return int64_t{row_tile_} * S::kRows; }
  BITFOLD_DEVICE int64_t token0() const { return int64_t{token_tile_} * S::kTokens; }
  BITFOLD_DEVICE static int warp_row() { return ptx::warp_id() % S::kRowWarps * (16 * S::kTiles); }
  BITFOLD_DEVICE static int warp_token() { return ptx::warp_id() / S::kRowWarps * (8 * S::kGroups); }

  // ---- whole sums ----

  // A thread has the same lines of all stages, kLines apart, and of each the same 16 bytes. Of a line beyond the tile's
  // last it has the last.
  static constexpr int kLines = S::kLines, kRowTurns = S::kRowTurns;
  static_assert((S::kRows + S::kTokens) * kPartColumns < int64_t{1} << 32);

  BITFOLD_DEVICE static int line_of(int turn) { return turn * kLines + static_cast<int>(threadIdx.x) / 4; }
  BITFOLD_DEVICE static int of_line() { return static_cast<int>(threadIdx.x) % 4; }
  BITFOLD_DEVICE void find_lines() {
    auto& bytes = memory_.lines[threadIdx.x].bytes;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      bytes[turn] = turn < kRowTurns
                        ? static_cast<uint32_t>(smaller(line_of(turn), last_row_) * op_.k)
                        : static_cast<uint32_t>(smaller(line_of(turn) - S::kRows, last_token_) * op_.stride);
    }
  }
  BITFOLD_DEVICE void fetch(int piece, int stage) {
    const Lines<S> lines = memory_.lines[threadIdx.x];
    const int64_t column = int64_t{piece} * kInt8Piece + 16 * of_line();
    if (threadIdx.x == 0 && gathers()) ptx::cp_async<16>(&memory_.found[stage], op_.found + piece);
    const bool there = column < op_.k;  // x's codes have zeros behind k
    const uint8_t* w = op_.codes + row0() * op_.k + (there ? column : 0);
    const auto* x = reinterpret_cast<const uint8_t*>(op_.x_codes) + token0() * op_.stride + column;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      if (S::kLinesOfAll % kLines != 0 && line_of(turn) >= S::kLinesOfAll) break;
      uint4* to = &memory_.stage[stage][line_of(turn)][of_line()];
      if (turn < kRowTurns) ptx::cp_async<16>(to, w + lines.bytes[turn], there ? 16 : 0);
      else ptx::cp_async<16>(to, x + lines.bytes[turn]);
    }
  }

  // Whether outliers of W are picked out of the stages.
  BITFOLD_DEVICE bool gathers() const { return op_.gathers && op_.found != nullptr; }
  // Those of a stage, into their table, where the block finds them at the end, or the last of a tile's blocks does.
  BITFOLD_DEVICE void gather(int stage) const {
    const auto row = static_cast<int>(threadIdx.x);
    if (row >= S::kRows) return;
    each_found(memory_.found[stage], op_.loose.lines, [&](int i, int column) {
      const auto* codes = reinterpret_cast<const uint8_t*>(memory_.stage[stage][row]);
      const int code = codes[column] - int8_zero(op_, row0() + smaller(row, memory_.last_row));
      op_.loose.w[i * op_.table_rows + row0() + row] = static_cast<float>(code);
    });
  }

  BITFOLD_DEVICE void multiply_all() {
    const auto pieces = static_cast<unsigned>(op_.stride / kInt8Piece),
               splits = static_cast<unsigned>(op_.tiles.splits);
    const auto first = static_cast<int>(pieces * blockIdx.y / splits);
    const auto end = static_cast<int>(pieces * (blockIdx.y + 1) / splits);
    find_lines();
#pragma unroll 1
    for (int i = 0; i < S::kStages - 1; ++i) {
      if (first + i < end) fetch(first + i, i);
      ptx::cp_async_commit();
    }
    int stage = 0;
#pragma unroll 1
    for (int piece = first; piece < end; ++piece) {
      ptx::cp_async_wait<S::kStages - 2>();
      ptx::sync_block();  // all have their copies, and have read the stage that is filled next
      const int ahead = piece + S::kStages - 1;
      if (ahead < end) fetch(ahead, stage == 0 ? S::kStages - 1 : stage - 1);
      ptx::cp_async_commit();
      multiply(stage);
      if (gathers()) gather(stage);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
  }

  BITFOLD_DEVICE void multiply(int stage) {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    uint32_t a[S::kTiles][2][4];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      const uint4 low = memory_.stage[stage][warp_row() + 16 * r + g][t];
      const uint4 high = memory_.stage[stage][warp_row() + 16 * r + g + 8][t];
      a[r][0][0] = int8_codes(low.x), a[r][0][1] = int8_codes(high.x);
      a[r][0][2] = int8_codes(low.y), a[r][0][3] = int8_codes(high.y);
      a[r][1][0] = int8_codes(low.z), a[r][1][1] = int8_codes(high.z);
      a[r][1][2] = int8_codes(low.w), a[r][1][3] = int8_codes(high.w);
    }
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
      const uint4 x = memory_.stage[stage][S::kRows + warp_token() + 8 * j + g][t];
      const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) ptx::mma_s8(sums_[r][j], a[r][step], b[step]);
      }
    }
  }

  // ---- sums of several blocks ----

  // Where a split has this thread's four.
  BITFOLD_DEVICE int4* split_sums(unsigned split, int r, int j) const {
    const int64_t first = (int64_t{blockIdx.x} * op_.tiles.splits + split) * S::kTileSums;
    return reinterpret_cast<int4*>(op_.partial + first) + (j * S::kTiles + r) * kThreads + threadIdx.x;
  }
  // Leaves the sums of all blocks to the last of them, and says which that is.
  BITFOLD_DEVICE bool add_splits() {
    const auto splits = static_cast<unsigned>(op_.tiles.splits);
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        int (&four)[4] = sums_[r][j];
        *split_sums(blockIdx.y, r, j) = int4{four[0], four[1], four[2], four[3]};
        four[0] = four[1] = four[2] = four[3] = 0;
      }
    }
    ptx::fence();
    ptx::sync_block();  // all sums are written before the block counts, and nobody looks at the stages any more
    auto& arrived = *reinterpret_cast<uint32_t*>(&memory_);
    if (threadIdx.x == 0) arrived = ptx::atomic_add(op_.arrivals + blockIdx.x, 1u);
    ptx::sync_block();
    if (arrived != splits - 1) return false;
    ptx::fence();
#pragma unroll 1
    for (unsigned s = 0; s < splits; ++s) {
#pragma unroll
      for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          const float4 four = ptx::load_written16(split_sums(s, r, j));
          sums_[r][j][0] += ptx::float_as_int(four.x), sums_[r][j][1] += ptx::float_as_int(four.y);
          sums_[r][j][2] += ptx::float_as_int(four.z), sums_[r][j][3] += ptx::float_as_int(four.w);
        }
      }
    }
    return true;
  }

  // ---- numbers: from here on sums_ has the bits of fp32 ----

  // Of a sum's place: row g + 8 (i / 2), token 2 t + i % 2.
  BITFOLD_DEVICE int row_of(int r, int i) const { return warp_row() + 16 * r + ptx::lane_id() / 4 + 8 * (i / 2); }
  BITFOLD_DEVICE int token_of(int j, int i) const { return warp_token() + 8 * j + ptx::lane_id() % 4 * 2 + i % 2; }
  BITFOLD_DEVICE int64_t real_row(int row) const { return row0() + smaller(row, last_row_); }
  BITFOLD_DEVICE int64_t real_token(int token) const { return token0() + smaller(token, last_token_); }

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
    ptx::sync_block();  // nobody looks at the stages any more
    for (auto token = static_cast<int>(threadIdx.x); token < S::kTokens; token += kThreads) {
      memory_.tokens[token] = int8_token(op_, real_token(token), 0);
    }
    ptx::sync_block();
    each([&](int r, int j, int i, int& sum) {
      sum = ptx::float_as_int(ptx::add(0.0f, int8_part(sum, rows_[r][i / 2], memory_.tokens[token_of(j, i)])));
    });
  }

  BITFOLD_DEVICE void add_outliers() {
    const int count = int8_outliers(op_);
    // A product of 16 bits and 8 is exact: rounded once less, sums are the same.
    const bool exact = op_.x.dtype != DType::F32 && count <= op_.loose.lines;
    if (count > 0 && exact && *op_.loose_huge == 0) add_chains<false, true>(count);
    else add_chains<false, false>(count);
    add_chains<true, false>(op_.copies);
  }

  // Adds the sums over `count` columns: those with a copy, or those without. A thread has chains for some of its groups
  // of tokens at a time, for which there are registers beside the sums.
  template <bool Copied, bool Fused>
  BITFOLD_DEVICE void add_chains(int count) {
    constexpr int kChained = smaller(S::kGroups, 4);
    static_assert(S::kGroups % kChained == 0);
    if (count == 0) return;
    if (count <= kTableColumns) fill<Copied>(0, count);
#pragma unroll
    for (int first = 0; first < S::kGroups; first += kChained) {
      float chains[kChained][S::kTiles][4] = {};
#pragma unroll 1
      for (int begin = 0; begin < count; begin += kTableColumns) {
        const int columns = smaller(count - begin, kTableColumns);
        if (count > kTableColumns) fill<Copied>(begin, columns);
#pragma unroll 1
        for (int c = 0; c < columns; ++c) add_column<Fused>(c, first, chains);
      }
#pragma unroll
      for (int j = 0; j < kChained; ++j) {
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float chain = Copied ? chains[j][r][i] : ptx::mul(rows_[r][i / 2].scale, chains[j][r][i]);
            int& sum = sums_[r][first + j][i];
            sum = ptx::float_as_int(ptx::add(ptx::int_as_float(sum), chain));
          }
        }
      }
    }
  }
  // Column c of the table, to the chains of groups from `first` on.
  template <bool Fused, int Chained>
  BITFOLD_DEVICE void add_column(int c, int first, float (&chains)[Chained][S::kTiles][4]) const {
    float w[S::kTiles][2];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) w[r][h] = memory_.table.w[c][row_of(r, 2 * h)];
    }
#pragma unroll
    for (int j = 0; j < Chained; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(&memory_.table.x[c][token_of(first + j, 0)]);
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& chain = chains[j][r][i];
          const float number = i % 2 == 0 ? x.x : x.y, weight = w[r][i / 2];
          chain = Fused ? ptx::fma(number, weight, chain) : ptx::add(chain, ptx::mul(number, weight));
        }
      }
    }
  }

  // The table of columns [begin, begin + columns) of a list. Begins and ends with a barrier.
  template <bool Copied>
  BITFOLD_DEVICE void fill(int begin, int columns) {
    static_assert(kInt8Lines % kTableColumns == 0 && kInt8Lines % S::kRows == 0 && kInt8Lines % S::kTokens == 0);
    ptx::sync_block();
    const Int8Table& table = Copied ? op_.exact : op_.loose;
    if (begin < table.lines) {
      copy_lines<S::kRows>(&memory_.table.w[0][0], table.w + begin * op_.table_rows + row0(), op_.table_rows, columns);
      copy_lines<S::kTokens>(&memory_.table.x[0][0], table.x + begin * op_.table_tokens + token0(), op_.table_tokens,
                             columns);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    } else {
      gather<Copied>(begin, columns);
    }
    ptx::sync_block();
  }
  template <int Width>
  BITFOLD_DEVICE static void copy_lines(float* to, const float* from, int64_t stride, int lines) {
    constexpr int kFours = Width / 4;
#pragma unroll 1
    for (auto i = static_cast<int>(threadIdx.x); i < lines * kFours; i += kThreads)
      ptx::cp_async<16>(to + i * 4, from + i / kFours * stride + i % kFours * 4);
  }
  template <bool Copied>
  BITFOLD_DEVICE void gather(int begin, int columns) {
    const int32_t* list = Copied ? op_.columns : op_.outliers;
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
  }

  // By way of shared memory, so that neighbours of y are written together, by a short loop.
  BITFOLD_DEVICE void store() {
    static_assert(kThreads % S::kRows == 0);
    ptx::sync_block();  // nobody looks at the table any more
    each([&](int r, int j, int i, int& sum) { memory_.out[token_of(j, i)][row_of(r, i)] = ptx::int_as_float(sum); });
    ptx::sync_block();
    const int thread = static_cast<int>(threadIdx.x), row = thread % S::kRows;
    if (row > last_row_) return;
    const bool biased = op_.bias != nullptr;
    const float bias = biased ? read_float({op_.bias, op_.x.dtype, 1, 1, 1, 1}, row0() + row) : 0.0f;
#pragma unroll 4
    for (int token = thread / S::kRows; token <= last_token_; token += kThreads / S::kRows) {
      float y = memory_.out[token][row];
      if (biased) y = ptx::add(y, bias);
      write_number(op_.y, op_.x.dtype, (token0() + token) * op_.n + row0() + row, y);
    }
  }

  const Int8Op& op_;
  Memory<S>& memory_;
  const unsigned row_tile_, token_tile_;
  int last_row_, last_token_;  // of the tile
  int sums_[S::kTiles][S::kGroups][4] = {};
  Int8Row rows_[S::kTiles][2];
};

// Blocks wait for one another in waves. Beside its own pieces each costs about as much as six of them until the first
// have arrived, and where k is cut, six more to hand over sums, and one for each split to the block that adds them.
int choose_splits(int64_t tiles, int64_t pieces, int64_t slots) {
  constexpr int64_t kMost = 16, kBegin = 6, kHand = 6, kFewest = 4;  // kFewest: pieces of a block
  int best = 1;
  int64_t least = 0;
  for (int64_t splits = 1; splits <= smaller(kMost, larger<int64_t>(pieces / kFewest, 1)); ++splits) {
    const int64_t waves = ceil_div(tiles * splits, slots);
    const int64_t cost = waves * (ceil_div(pieces, splits) + kBegin) + (splits > 1 ? kHand + splits : 0);
    if (splits == 1 || cost < least) least = cost, best = static_cast<int>(splits);
  }
  return best;
}

// Blocks that share rows of W come one after the other.
template <class S>
__global__ void __launch_bounds__(S::kThreads, kBlocks) int8_tile_kernel(const Int8Op op) {
  auto& memory = shared<Memory<S>>();
  const auto token_tiles = static_cast<unsigned>(ceil_div<int64_t>(op.x.rows, S::kTokens));
  Tile<S>(op, memory, blockIdx.x / token_tiles, blockIdx.x % token_tiles).run();
}

template <class S>
Int8Tiles tiles_of(int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  const int64_t count = ceil_div<int64_t>(n, S::kRows) * ceil_div<int64_t>(m, S::kTokens);
  return {.count = count,
          .sums = S::kTileSums,
          .splits = choose_splits(count, ceil_div<int64_t>(k, kInt8Piece), kBlocks * gpu.multiprocessors),
          .gathers = m <= S::kTokens};
}

template <class S>
void launch_tiles(const Int8Op& op, Stream stream) {
  launch({.grid = dim3(static_cast<unsigned>(op.tiles.count), static_cast<unsigned>(op.tiles.splits)),
          .block = S::kThreads,
          .shared_bytes = sizeof(Memory<S>),
          .name = "int8_tile",
          .stream = stream},
         int8_tile_kernel<S>, op);
}

bool is_few(int64_t m) { return m <= Few::kTokens; }

}  // namespace

Int8Tiles int8_tiles(int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  if (m <= kInt8Tokens || k > kPartColumns || k % 16 != 0 || k == 0) return {0, 0, 1, true};
  return is_few(m) ? tiles_of<Few>(m, n, k, gpu) : tiles_of<Many>(m, n, k, gpu);
}

void int8_tile(const Int8Op& op, Stream stream) {
  return is_few(op.x.rows) ? launch_tiles<Few>(op, stream) : launch_tiles<Many>(op, stream);
}

}  // namespace bitfold::cuda
