// y[m, n] = x W^T with x in 8-bit codes, for m <= 8: what decides is how fast W is read.
//
// A block of 16 warps (8, where shared memory is small) is at home on a multiprocessor and takes tiles of 32 rows of W
// in turn; its warps share the columns in pieces of 64. A lane copies the 16 bytes of each of its rows that it will
// multiply itself, three pieces ahead, into a ring of its own, so that nobody waits for anybody until the warps add
// their sums up: those are whole numbers, whose order is no matter. As the order of columns is none either, a lane's 16
// bytes are its operands of two steps of mma with W as the 16 rows, and the same 16 bytes of a token's codes are those
// of the 8 columns. Those come from the caches.
//
// With more tokens the grid's second dimension has eight of them each.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kMostWarps = 16, kFewWarps = 8;  // of a block; few where more of them have no room
constexpr int kThreads = kWarp * kMostWarps;
constexpr int kTokens = static_cast<int>(kInt8Tokens);
constexpr int kTiles = 2;  // of 16 rows
constexpr int kRows = 16 * kTiles;
constexpr int kRooms = 4;
constexpr int64_t kPartPieces = kPartColumns / kInt8Piece;
static_assert(kPartPieces % kMostWarps == 0);  // the pieces of a warp go on from part to part

static_assert(kRows * kTokens <= kWarp * kFewWarps);  // a number of y for a thread
constexpr int kMostLines = 3 * kInt8Lines;            // of outliers, where there is room for them

struct Memory {                           // of a warp
  uint4 ring[kRooms][2 * kTiles][kWarp];  // rows g and g + 8 of each tile
  int4 partial[kTiles][kWarp];
};
struct Line {  // behind those of all warps: an outlier
  float w[kRows];
  float x[kTokens];
};

BITFOLD_DEVICE int threads() { return static_cast<int>(blockDim.x); }

// The 16 bytes of a row from `column` on, zeros behind k, to `to`. By one thread, which can't copy asynchronously where
// rows lie anywhere: `aligned` says that k is a multiple of 16.
BITFOLD_DEVICE void fetch(const uint8_t* row, int64_t column, int64_t k, bool aligned, uint4* to) {
  if (aligned) {
    const bool there = column < k;
    ptx::cp_async<16>(to, row + (there ? column : 0), there ? 16 : 0);
    return;
  }
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t code = column + i < k ? ptx::load1(row + column + i) : 0u;
    words[i / 4] |= code << 8 * (i % 4);
  }
  *to = {words[0], words[1], words[2], words[3]};
}

// The copies of a lane's pieces: those of tile after tile.
class Feed {
 public:
  BITFOLD_DEVICE Feed(const Int8Op& op, Memory& memory, int64_t tiles, int64_t pieces, bool aligned)
      : op_(op), memory_(memory), tiles_(tiles), pieces_(pieces), aligned_(aligned), piece_(ptx::warp_id()) {
    if (piece_ >= pieces) tile_ = tiles;  // more warps than pieces
    for (int i = 1; i < kRooms; ++i) next();
  }

  // The next piece into the next room, if there is one; a group of copies in either case.
  BITFOLD_DEVICE void next() {
    if (tile_ < tiles_) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int64_t row = smaller<int64_t>(tile_ * kRows + 8 * i + ptx::lane_id() / 4, op_.n - 1);
        fetch(op_.codes + row * op_.k, piece_ * kInt8Piece + 16 * (ptx::lane_id() % 4), op_.k, aligned_,
              room(room_, i));
      }
      piece_ += threads() / kWarp;
      if (piece_ >= pieces_) {
        piece_ = ptx::warp_id();
        tile_ += gridDim.x;
      }
    }
    ptx::cp_async_commit();
    room_ = room_ + 1 == kRooms ? 0 : room_ + 1;
  }

  BITFOLD_DEVICE uint4* room(int number, int i) const { return &memory_.ring[number][i][ptx::lane_id()]; }

 private:
  const Int8Op& op_;
  Memory& memory_;
  const int64_t tiles_, pieces_;
  const bool aligned_;
  int64_t tile_ = blockIdx.x, piece_;
  int room_ = 0;
};

BITFOLD_DEVICE void multiply(int (&sums)[4], const uint4& low, const uint4& high, const uint4& x) {
  const uint32_t first[4] = {int8_codes(low.x), int8_codes(high.x), int8_codes(low.y), int8_codes(high.y)};
  const uint32_t second[4] = {int8_codes(low.z), int8_codes(high.z), int8_codes(low.w), int8_codes(high.w)};
  const uint32_t x_first[2] = {x.x, x.y}, x_second[2] = {x.z, x.w};
  ptx::mma_s8(sums, first, x_first);
  ptx::mma_s8(sums, second, x_second);
}

// The first `count` lines of a table for the rows of a tile, and for the tokens.
BITFOLD_DEVICE void fetch_rows(const Int8Op& op, const Int8Table& table, Line* lines, int count, int64_t row) {
  constexpr int kFours = kRows / 4;
  for (auto i = static_cast<int>(threadIdx.x); i < count * kFours; i += threads()) {
    const int c = i / kFours, four = i % kFours * 4;
    ptx::cp_async<16>(&lines[c].w[four], table.w + c * op.table_rows + row + four);
  }
}
BITFOLD_DEVICE void fetch_tokens(const Int8Op& op, const Int8Table& table, Line* lines, int count, int64_t token) {
  constexpr int kXFours = kTokens / 4;
  for (auto i = static_cast<int>(threadIdx.x); i < count * kXFours; i += threads()) {
    const int c = i / kXFours, four = i % kXFours * 4;
    ptx::cp_async<16>(&lines[c].x[four], table.x + c * op.table_tokens + token + four);
  }
}

// What a lane has of the outliers in a piece that lies in a room of its ring: a code of each of its rows.
BITFOLD_DEVICE void gather(const Feed& feed, int room, const Int8Found& found, Line* lines, int count) {
  each_found(found, count, [&](int i, int column) {
    if (column / 16 != ptx::lane_id() % 4) return;
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) {
      const auto* codes = reinterpret_cast<const uint8_t*>(feed.room(room, j));
      lines[i].w[8 * j + ptx::lane_id() / 4] = static_cast<float>(codes[column % 16]);
    }
  });
}

// How many outliers there are, and how many of them have one of the `lines`: first those without a copy.
struct Outliers {
  int loose, exact, loose_lines, exact_lines;
  BITFOLD_DEVICE Outliers(const Int8Op& op, int lines)
      : loose(int8_outliers(op)),
        exact(op.copies),
        loose_lines(smaller(loose, smaller(op.loose.lines, lines))),
        exact_lines(smaller(exact, smaller(op.exact.lines, lines - loose_lines))) {}
};

// The sums of outliers of one number of y: those without a copy, and those with one.
struct Sums {
  float loose, exact;
};
// Lines whose weights are so much larger: by a whole number of 8 bits, or by 0.
BITFOLD_DEVICE float sum_of_lines(const Line* lines, int count, int64_t token, int64_t row, int zero) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float weight = ptx::add(lines[i].w[row % kRows], static_cast<float>(-zero));
    sum = ptx::add(sum, ptx::mul(lines[i].x[token % kTokens], weight));
  }
  return sum;
}
BITFOLD_DEVICE Sums sums_of(const Int8Op& op, const Line* lines, const Outliers& outliers, int64_t token, int64_t row,
                            int zero) {
  float loose = sum_of_lines(lines, outliers.loose_lines, token, row, zero);
#pragma unroll 4
  for (int i = outliers.loose_lines; i < outliers.loose; ++i) {
    const int64_t column = op.outliers[i];
    const auto code = static_cast<float>(op.codes[row * op.k + column] - zero);
    loose = ptx::add(loose, ptx::mul(int8_outlier(op, token, column), code));
  }
  float exact = sum_of_lines(lines + outliers.loose_lines, outliers.exact_lines, token, row, 0);
#pragma unroll 4
  for (int i = outliers.exact_lines; i < outliers.exact; ++i) {
    const float weight = read_float(op.copy, row * op.copies + i);
    exact = ptx::add(exact, ptx::mul(int8_x(op, token, op.columns[i]), weight));
  }
  return {loose, exact};
}

__global__ void __launch_bounds__(kThreads, 1) int8_rows_kernel(const Int8Op op, int room_for) {
  const int warps = threads() / kWarp;
  Memory* memory = &shared<Memory>();
  auto* lines = reinterpret_cast<Line*>(memory + warps);
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = ceil_div<int64_t>(op.n, kRows), pieces = op.stride / kInt8Piece;
  const int64_t first_token = int64_t{blockIdx.y} * kTokens;
  Feed feed(op, memory[ptx::warp_id()], tiles, pieces, op.k % 16 == 0);  // W, which int8_round doesn't write
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  const bool there = first_token + ptx::lane_id() / 4 < op.x.rows;
  const int8_t* x = op.x_codes + (there ? first_token + ptx::lane_id() / 4 : 0) * op.stride + 16 * (ptx::lane_id() % 4);
  // A number of y for each of the first threads.
  const int64_t token = first_token + thread / kRows;
  const Outliers outliers(op, room_for);
  const bool few_pieces = pieces < warps * kRooms;
  int room = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * kRows + thread % kRows;
    const bool mine = thread < kRows * kTokens && token < op.x.rows && row < op.n;
    const Int8Row w = mine ? int8_row(op, row) : Int8Row{};
    if (tile == blockIdx.x) {
      fetch_tokens(op, op.loose, lines, outliers.loose_lines, first_token);
      fetch_tokens(op, op.exact, lines + outliers.loose_lines, outliers.exact_lines, first_token);
    }
    fetch_rows(op, op.exact, lines + outliers.loose_lines, outliers.exact_lines, tile * kRows);
    if (outliers.loose_lines + outliers.exact_lines > 0) ptx::cp_async_commit();
    float y = 0.0f;
    Sums more{};
    for (int part = 0; part < op.parts; ++part) {
      int sums[kTiles][4] = {};
      const int64_t end = smaller((part + 1) * kPartPieces, pieces);
#pragma unroll 1
      for (int64_t piece = part * kPartPieces + ptx::warp_id(); piece < end; piece += warps) {
        uint4 codes{};
        if (there) codes = *reinterpret_cast<const uint4*>(x + piece * kInt8Piece);
        uint4 found{};
        if (op.found != nullptr) found = *reinterpret_cast<const uint4*>(op.found + piece);
        ptx::cp_async_wait<kRooms - 2>();
        uint4 loaded[2 * kTiles];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) loaded[i] = *feed.room(room, i);
        gather(feed, room, {found.x, {found.y, found.z}, 0}, lines, outliers.loose_lines);
        feed.next();  // into the room before this one
        room = room + 1 == kRooms ? 0 : room + 1;
#pragma unroll
        for (int r = 0; r < kTiles; ++r) multiply(sums[r], loaded[2 * r], loaded[2 * r + 1], codes);
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        memory[ptx::warp_id()].partial[r][ptx::lane_id()] = {sums[r][0], sums[r][1], sums[r][2], sums[r][3]};
      }
      if (few_pieces) ptx::cp_async_wait<0>();  // else the outliers came before the pieces that were waited for
      ptx::sync_block();
      if (mine) {
        // D: row g + 8 i of token 2 t + j is d[2 i + j] of lane 4 g + t.
        const int t = thread / kRows, r = thread % kRows;
        const int lane = r % 8 * 4 + t / 2, place = r % 16 / 8 * 2 + t % 2;
        int sum = 0;
#pragma unroll 8
        for (int warp = 0; warp < warps; ++warp) {
          sum += reinterpret_cast<const int*>(&memory[warp].partial[r / 16][lane])[place];
        }
        y = ptx::add(y, int8_part(sum, 128, w, int8_token(op, token, part)));
        // Between barriers: the next tile's outliers come to the same place.
        if (part == op.parts - 1) more = sums_of(op, lines, outliers, token, row, w.zero);
      }
      ptx::sync_block();
    }
    if (mine) int8_store(op, token, row, w.scale, y, more.loose, more.exact);
  }
}

}  // namespace

void int8_rows(const Int8Op& op, Stream stream) {
  constexpr int64_t kMemory = sizeof(Memory), kLine = sizeof(Line);
  const int64_t tiles = ceil_div<int64_t>(op.n, kRows), bytes = gpu().shared_bytes;
  const int warps = bytes < kMostWarps * kMemory ? kFewWarps : kMostWarps;
  const int64_t lines = smaller<int64_t>(smaller(kMostLines, op.loose.lines + op.exact.lines),
                                         larger<int64_t>((bytes - warps * kMemory) / kLine, 0));
  launch({.grid = dim3(static_cast<unsigned>(smaller<int64_t>(tiles, gpu().multiprocessors)),
                       static_cast<unsigned>(ceil_div<int64_t>(op.x.rows, kTokens))),
          .block = static_cast<unsigned>(warps * kWarp),
          .shared_bytes = warps * kMemory + lines * kLine,
          .name = "int8_rows",
          .stream = stream,
          .early = gpu().early},
         int8_rows_kernel, op, static_cast<int>(lines));
}

}  // namespace bitfold::cuda
