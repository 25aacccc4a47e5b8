// y[m, n] = x W^T with x in 8-bit codes, for more than 8 rows of x: a block has a tile of rows and a tile of tokens,
// and takes 64 columns of both at a time through shared memory, which come by asynchronous copies some stages ahead.
//
// W is the A operand of mma.m16n8k32, x the B operand. Both have a row's 64 columns in 64 bytes, of which a lane's 16
// are its operands of two steps (int8_rows.cu); eight lanes that read together have 128 bytes in one piece, and so all
// banks. One loop over columns, and nothing but whole sums: those go to memory, and int8_finish (int8_finish.cu) makes
// numbers of them, with threads enough for it. Where there are fewer tiles than a GPU has room for, k is cut over
// blocks, each of which has sums of its own; where there are many more, only so many tokens are multiplied at a time
// that their sums are still in the second cache when they are wanted.
//
// The outliers of W that are wanted with them pass through shared memory here, and are put into their table.
#include "cuda/int8.hpp"
#include "cuda/int8_wgmma.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kBlocks = 2;     // of a multiprocessor
constexpr int64_t kWaves = 4;  // of blocks, before int8_finish makes numbers of what they left

// RowWarps of Warps beside one another in rows, the others in tokens; each has Tiles times 16 rows and Groups times 8
// tokens. Few: with wgmma (int8_wgmma.hpp) for at most 64 tokens, else for more.
template <bool Few_, int Warps_, int RowWarps_, int Tiles_, int Groups_, int Stages_>
struct Shape {
  static constexpr bool kFew = Few_;
  static constexpr int kWarps = Warps_, kThreads = kWarp * kWarps;
  static constexpr int kRowWarps = RowWarps_, kTiles = Tiles_, kGroups = Groups_, kStages = Stages_;
  static constexpr int kRows = kRowWarps * kTiles * 16;
  static constexpr int kTokens = kWarps / kRowWarps * kGroups * 8;
  // Of a stage: of its lines of 64 bytes a block copies kLines at a time, those of W in the first turns.
  static constexpr int kLinesOfAll = kRows + kTokens, kLines = kThreads / 4;
  static constexpr int kTurns = ceil_div(kLinesOfAll, kLines), kRowTurns = kRows / kLines;
  static_assert(kRows % kLines == 0);
};
using Few = Shape<true, 8, 4, 1, 2, 8>;  // 64 rows, 32 tokens: a block for each multiprocessor where n is 8192
// 128 rows, 128 tokens. A warp has 64 of each, half of the registers: what decides is how often shared memory is read.
using Many = Shape<false, 4, 2, 4, 8, 4>;

// Where the lines that a thread copies begin, in bytes from the tile's first row or token on: for all pieces, and in
// shared memory because sums take the registers.
template <class S>
struct alignas(8 * S::kTurns / 2) Lines {
  uint32_t bytes[S::kTurns];
};
template <class S>
struct Memory {
  uint4 stage[S::kStages][S::kLinesOfAll][4];  // W's rows, then tokens
  Int8Found found[S::kStages];                 // of each stage's columns
  Lines<S> lines[S::kThreads];
  int last_row, last_token;
};

template <class S>
class Tile {
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
    store();
  }

 private:
  // Little is kept beside the sums of many tokens.
  BITFOLD_DEVICE int64_t row0() const { return int64_t{row_tile_} * S::kRows; }
  BITFOLD_DEVICE int64_t token0() const { return int64_t{token_tile_} * S::kTokens; }
  BITFOLD_DEVICE static int warp_row() { return ptx::warp_id() % S::kRowWarps * (16 * S::kTiles); }
  BITFOLD_DEVICE static int warp_token() { return ptx::warp_id() / S::kRowWarps * (8 * S::kGroups); }

  // ---- whole sums ----

  // A thread has the same lines of all stages, kLines apart, and of each the same 16 bytes. Of a row beyond the tile's
  // last it has the last; tokens that aren't there are zeros, since all blocks would ask for the same bytes.
  static constexpr int kLines = S::kLines, kRowTurns = S::kRowTurns;
  static_assert((S::kRows + S::kTokens) * kPartColumns < int64_t{1} << 32);
  static constexpr uint32_t kNoToken = ~uint32_t{0};  // in the place of where its line begins

  BITFOLD_DEVICE static int line_of(int turn) { return turn * kLines + static_cast<int>(threadIdx.x) / 4; }
  BITFOLD_DEVICE static int of_line() { return static_cast<int>(threadIdx.x) % 4; }
  BITFOLD_DEVICE void find_lines() {
    auto& bytes = memory_.lines[threadIdx.x].bytes;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const int token = line_of(turn) - S::kRows;
      if (turn < kRowTurns) bytes[turn] = static_cast<uint32_t>(smaller(line_of(turn), last_row_) * op_.k);
      else bytes[turn] = token <= last_token_ ? static_cast<uint32_t>(token * op_.stride) : kNoToken;
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
      const uint32_t line = lines.bytes[turn];
      const bool is_token = line != kNoToken;
      if (turn < kRowTurns) ptx::cp_async<16>(to, w + line, there ? 16 : 0);
      else ptx::cp_async<16>(to, x + (is_token ? line : 0), is_token ? 16 : 0);
    }
  }

  // Whether outliers of W are picked out of the stages: by one of those that read the same rows.
  BITFOLD_DEVICE bool gathers() const { return token_tile_ == 0 && op_.found != nullptr; }
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

  // ---- sums to memory, where int8_finish finds them ----

  BITFOLD_DEVICE void store() const {
    const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
    int32_t* to = op_.partial + (blockIdx.y * op_.x.rows + token0()) * op_.table_rows + row0() + warp_row() + g;
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = warp_token() + 8 * j + 2 * t + i;
        if (token > last_token_) continue;
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          to[token * op_.table_rows + 16 * r] = sums_[r][j][i];
          to[token * op_.table_rows + 16 * r + 8] = sums_[r][j][2 + i];
        }
      }
    }
  }

  const Int8Op& op_;
  Memory<S>& memory_;
  const unsigned row_tile_, token_tile_;
  int last_row_, last_token_;  // of the tile
  int sums_[S::kTiles][S::kGroups][4] = {};
};

// How tiles are cut: their rows, tokens and columns of a stage, the blocks that a GPU has room for, and whether wgmma
// multiplies.
struct Cut {
  int64_t rows, tokens, columns, slots;
  bool wide;
};
template <class S>
Cut cut_of(const Gpu& gpu) {
  return {S::kRows, S::kTokens, kInt8Piece, kBlocks * gpu.multiprocessors, false};
}
Cut wide_cut(int64_t m, const Gpu& gpu) {
  return {kWideRows, m <= 64 ? 64 : m <= 128 ? 128 : 256, kBoxBytes, gpu.multiprocessors, true};
}

// Blocks wait for one another in waves. Beside its own pieces each costs about as much as six of them until the first
// have arrived and sums are handed over, and where k is cut, one more for each split to whoever adds them.
int choose_splits(int64_t tiles, int64_t pieces, int64_t slots) {
  constexpr int64_t kMost = 16, kBegin = 6, kFewest = 4;  // kFewest: pieces of a block
  int best = 1;
  int64_t least = 0;
  for (int64_t splits = 1; splits <= smaller(kMost, larger<int64_t>(pieces / kFewest, 1)); ++splits) {
    const int64_t waves = ceil_div(tiles * splits, slots);
    const int64_t cost = waves * (ceil_div(pieces, splits) + kBegin) + splits;
    if (splits == 1 || cost < least) least = cost, best = static_cast<int>(splits);
  }
  return best;
}

Int8Tiles cut_tiles(const Cut& cut, int64_t m, int64_t n, int64_t k) {
  const int64_t row_tiles = ceil_div(n, cut.rows);
  const int64_t tokens = smaller(m, larger<int64_t>(kWaves * cut.slots / row_tiles, 1) * cut.tokens);
  const int64_t count = row_tiles * ceil_div(tokens, cut.tokens);
  return {.count = count,
          .tokens = tokens,
          .splits = choose_splits(count, ceil_div(k, cut.columns), cut.slots),
          .block_tokens = static_cast<int>(cut.tokens),
          .wide = cut.wide};
}

// Blocks that share rows of W come one after the other.
template <class Tile, class Parameter, class Memory>
BITFOLD_DEVICE void run_tile(const Parameter& parameter, int64_t tokens, int of_block, Memory& memory) {
  const auto token_tiles = static_cast<unsigned>(ceil_div<int64_t>(tokens, of_block));
  Tile(parameter, memory, blockIdx.x / token_tiles, blockIdx.x % token_tiles).run();
}
template <int Tokens>
BITFOLD_DEVICE void run_wide(const Int8Boxes& boxes) {
  run_tile<WideTile<Tokens>>(boxes, boxes.op.x.rows, Tokens, shared<WideMemory<Tokens>>());
}

template <class S>
__global__ void __launch_bounds__(kWgmma ? kWideThreads : S::kThreads, kWgmma ? 1 : kBlocks)
    int8_tile_kernel(const __grid_constant__ Int8Boxes boxes) {
  const Int8Op& op = boxes.op;
  if (wgmma_where(op.tiles.wide)) {
    if constexpr (S::kFew) run_wide<64>(boxes);
    else if (op.tiles.block_tokens == 128) run_wide<128>(boxes);
    else run_wide<256>(boxes);
  } else {
    ptx::wait_for_earlier();
    ptx::let_later_begin();
    run_tile<Tile<S>>(op, op.x.rows, S::kTokens, shared<Memory<S>>());
  }
}

// A block, and the bytes that it shares.
struct Block {
  int threads;
  size_t bytes;
};
template <class S>
Block block_of(const Int8Tiles& tiles) {
  if (!tiles.wide) return {S::kThreads, sizeof(Memory<S>)};
  return {kWideThreads, tiles.block_tokens == 64    ? sizeof(WideMemory<64>)
                        : tiles.block_tokens == 128 ? sizeof(WideMemory<128>)
                                                    : sizeof(WideMemory<256>)};
}

template <class S>
void launch_tiles(const Int8Op& op, Stream stream) {
  Int8Boxes boxes{.op = op, .w = {}, .x = {}};
  if (op.tiles.wide) {
    boxes.w = tensor_map({op.codes, op.n, op.k, op.k, kWideRows});
    boxes.x = tensor_map({op.x_codes, op.x.rows, op.stride, op.stride, op.tiles.block_tokens});
  }
  const Block block = block_of<S>(op.tiles);
  launch({.grid = dim3(static_cast<unsigned>(op.tiles.count), static_cast<unsigned>(op.tiles.splits)),
          .block = static_cast<unsigned>(block.threads),
          .shared_bytes = static_cast<int64_t>(block.bytes),
          .name = "int8_tile",
          .stream = stream,
          .early = gpu().early},
         int8_tile_kernel<S>, boxes);
}

}  // namespace

Int8Tiles int8_tiles(int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  constexpr int64_t kMostRows = kMostGridY * kInt8Tokens / kInt8Lines * kInt8Lines;  // of one int8_rows
  if (m <= kInt8Tokens || k > kPartColumns || k % 16 != 0 || k == 0) return {0, smaller(m, kMostRows), 1, 0, false};
  if (gpu.wgmma) return cut_tiles(wide_cut(m, gpu), m, n, k);
  return cut_tiles(m <= Few::kTokens ? cut_of<Few>(gpu) : cut_of<Many>(gpu), m, n, k);
}

void int8_tile(const Int8Op& op, Stream stream) {
  return op.tiles.block_tokens <= 64 ? launch_tiles<Few>(op, stream) : launch_tiles<Many>(op, stream);
}

}  // namespace bitfold::cuda
