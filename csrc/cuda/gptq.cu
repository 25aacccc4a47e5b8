// GPTQ's loop over columns: the CPU's codes, errors and losses, bit for bit where it fuses a product and a sum.
//
// Rows of the weight know nothing of each other, so a block takes 32 of them through all columns, from the last to the
// first, 32 at a time (a panel). Two steps for each panel:
//   - what its columns get from all columns behind, sums over l of U[c, l] e[l]: a product of 32 x 32 sums, each of
//     which a thread adds up in the order of l. Errors and the factor come to shared memory piece by piece, the next on
//     its way meanwhile; a thread has four rows of one column, so that one load of 16 bytes serves four rows and one
//     four l's.
//   - rounding, column by column: eight lanes take a row, a lane every eighth column. Each hands its error to the seven
//     others, which add it to what their columns get.
// No sum depends on the GPU or on who comes first. Errors go to memory and come back from its second cache.
#include <cmath>

#include "cuda/device.hpp"
#include "cuda/gptq.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kPanel = 32;  // columns that are rounded together; the CPU's losses are summed over as many
constexpr int kRows = 32;   // of a block
constexpr int kThreads = 256;
constexpr int kDepth = 64;  // columns behind that a piece has
constexpr int kWarps = kThreads / kWarp;

// ---- sums over the columns behind: a thread has kQuad rows of one column ----
constexpr int kQuad = 4;
static_assert(kPanel * kRows == kThreads * kQuad);
static_assert(kWarp == kRows && kDepth % kWarp == 0 && kDepth % kQuad == 0);

// ---- rounding: kLanes lanes have a row, each of them kOwn columns ----
constexpr int kLanes = 8;
constexpr int kOwn = kPanel / kLanes;
static_assert(kRows * kLanes == kThreads);

// Rows of 16-byte units, an odd number of them: eight lanes that read down a column meet in no bank.
struct Piece {
  alignas(16) float errors[kDepth][kRows];
  alignas(16) float factor[kPanel][kDepth + 4];
};
struct Room {
  Piece pieces[2];
  alignas(16) float sums[kPanel][kRows + 4];
  alignas(16) float triangle[kPanel][kPanel + 4];
  float levels[kGptqLevels];
  float middles[kGptqLevels];  // between a level and the next; infinity where there is none
};
static_assert(sizeof(Room) <= 48 * 1024);

struct Args {
  GptqColumnsArgs op;
  float* errors;  // [weight.columns, n]
};

// A panel's columns among those of the weight.
struct Panel {
  int64_t begin;
  int width;
};

// ---- into shared memory ----

// Of U, `count` columns from `column` on of the panel's rows; zeros beyond either end.
template <int Columns, int Stride>
BITFOLD_DEVICE void fetch_factor(const GptqColumnsArgs& op, const Panel& panel, int64_t column, int count,
                                 float (&to)[kPanel][Stride]) {
  for (int c = ptx::warp_id(); c < kPanel; c += kWarps) {
    const float* from = op.factor + (op.begin + panel.begin + c) * op.k + column;
#pragma unroll
    for (int l = ptx::lane_id(); l < Columns; l += kWarp) {
      const bool there = c < panel.width && l < count;
      ptx::cp_async<4>(&to[c][l], there ? from + l : op.factor, there ? 4 : 0);
    }
  }
}

// Errors of `count` columns from number `column` on, counted from the first of the weight.
BITFOLD_DEVICE void fetch_errors(const Args& args, int64_t first_row, int64_t column, int count,
                                 float (&to)[kDepth][kRows]) {
  const int64_t n = args.op.weight.rows, columns = args.op.weight.columns, row = first_row + ptx::lane_id();
  for (int l = ptx::warp_id(); l < kDepth; l += kWarps) {
    const int64_t at = column + l;
    const float* from = at < columns ? args.errors + at * n : args.op.behind + (at - columns) * n;
    const bool there = l < count && row < n;
    ptx::cp_async<4>(&to[l][ptx::lane_id()], there ? from + row : args.op.factor, there ? 4 : 0);
  }
}

BITFOLD_DEVICE void fill_levels(const GptqGrid& grid, Room& room) {
  const auto i = static_cast<int>(threadIdx.x);
  if (grid.table == nullptr || i >= kGptqLevels) return;
  const auto last = static_cast<int>(grid.high);
  const float level = grid.table[smaller(i, last)], next = grid.table[smaller(i + 1, last)];
  room.levels[i] = level;
  room.middles[i] = level < next ? (level + next) * 0.5f : INFINITY;
}

// ---- sums over the columns behind ----

// sums[i] += U[c, l] e[l, 4 q + i] for `count` columns behind, in their order.
BITFOLD_DEVICE void add_piece(const Piece& piece, int c, int q, int count, float (&sums)[kQuad]) {
  const auto add = [&](float factor, int l) {
    const float4 errors = *reinterpret_cast<const float4*>(&piece.errors[l][kQuad * q]);
    sums[0] = ptx::fma(factor, errors.x, sums[0]);
    sums[1] = ptx::fma(factor, errors.y, sums[1]);
    sums[2] = ptx::fma(factor, errors.z, sums[2]);
    sums[3] = ptx::fma(factor, errors.w, sums[3]);
  };
  int l = 0;
#pragma unroll 4
  for (; l + 4 <= count; l += 4) {
    const float4 factors = *reinterpret_cast<const float4*>(&piece.factor[c][l]);
    add(factors.x, l);
    add(factors.y, l + 1);
    add(factors.z, l + 2);
    add(factors.w, l + 3);
  }
  for (; l < count; ++l) add(piece.factor[c][l], l);
}

// room.sums of the panel, and its triangle of U.
BITFOLD_DEVICE void sum_behind(const Args& args, const Panel& panel, int64_t first_row, Room& room) {
  const GptqColumnsArgs& op = args.op;
  const int64_t start = panel.begin + panel.width, end = op.k - op.begin;
  const auto fetch = [&](int64_t column) {
    const auto count = static_cast<int>(smaller<int64_t>(kDepth, end - column));
    Piece& piece = room.pieces[(column - start) / kDepth % 2];
    fetch_factor<kDepth>(op, panel, op.begin + column, count, piece.factor);
    fetch_errors(args, first_row, column, count, piece.errors);
  };
  const auto thread = static_cast<int>(threadIdx.x);
  const int c = thread / (kRows / kQuad), q = thread % (kRows / kQuad);
  float sums[kQuad] = {};
  fetch_factor<kPanel>(op, panel, op.begin + panel.begin, panel.width, room.triangle);
  if (start < end) fetch(start);
  ptx::cp_async_commit();
  for (int64_t column = start; column < end; column += kDepth) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this piece is there, and the one before has been added
    if (column + kDepth < end) fetch(column + kDepth);
    ptx::cp_async_commit();
    const auto count = static_cast<int>(smaller<int64_t>(kDepth, end - column));
    add_piece(room.pieces[(column - start) / kDepth % 2], c, q, count, sums);
  }
  *reinterpret_cast<float4*>(&room.sums[c][kQuad * q]) = {sums[0], sums[1], sums[2], sums[3]};
  ptx::cp_async_wait<0>();
  ptx::sync_block();
}

// ---- rounding ----

// A column of a row: its weight, and the grid of its group there.
struct Spot {
  float weight, step, offset;
  float sum;  // what it has from the columns behind
};
struct Rounded {
  int place;
  float value;
};

BITFOLD_DEVICE Rounded nearest(const GptqGrid& grid, const Room& room, float target, const Spot& spot) {
  const float quotient = spot.step == 0.0f ? 0.0f : (target - spot.offset) / spot.step;
  if (grid.table == nullptr) {
    const auto low = static_cast<float>(grid.low), high = static_cast<float>(grid.high);
    float level = rintf(quotient);
    level = level > low ? level : low;  // also of a NaN
    level = level < high ? level : high;
    return {ptx::float_to_int(level - low), level * spot.step + spot.offset};
  }
  int place = 0;
#pragma unroll
  for (int i = 0; i + 1 < kGptqLevels; ++i) place += quotient > room.middles[i] ? 1 : 0;
  return {place, room.levels[place] * spot.step + spot.offset};
}

// What a lane needs of its columns of the panel, asked for before the sums are there.
BITFOLD_DEVICE void read_spots(const GptqColumnsArgs& op, const Panel& panel, int64_t row, int lane,
                               Spot (&spots)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int c = kLanes * i + lane;
    spots[i] = {};
    if (row >= op.weight.rows || c >= panel.width) continue;
    const int64_t column = panel.begin + c;
    spots[i].weight = static_cast<const float*>(op.weight.data)[row * op.weight.columns + op.order[column]];
    if (!op.grid.round) continue;
    const int64_t scale = op.group[column] * op.weight.rows + row;
    spots[i].step = op.grid.step[scale];
    spots[i].offset = op.grid.offset[scale];
  }
}

// The panel's columns of a row, from the last to the first; the squared norm of what they add to E Uᵀ.
BITFOLD_DEVICE float round_panel(const Args& args, const Panel& panel, const Room& room, int64_t row, int lane,
                                 Spot (&spots)[kOwn]) {
  const GptqColumnsArgs& op = args.op;
  const int row_here = static_cast<int>(threadIdx.x) / kLanes;
  const int first_lane = ptx::lane_id() - lane;
  float loss = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) spots[i].sum = room.sums[kLanes * i + lane][row_here];
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    const Spot& mine = spots[i];
    Rounded rounded{0, 0.0f};
    float error = 0.0f;
    for (int owner = smaller(kLanes, panel.width - kLanes * i) - 1; owner >= 0; --owner) {
      const int c = kLanes * i + owner;
      const float diagonal = room.triangle[c][c];
      // All lanes round; the owner's sum alone is complete.
      const float target = mine.weight + mine.sum / diagonal;
      const Rounded now = op.grid.round ? nearest(op.grid, room, target, mine) : Rounded{0, target};
      const float error_now = mine.weight - now.value;
      if (lane == owner) {
        rounded = now;
        error = error_now;
      }
      const float given = ptx::shuffle(error_now, first_lane + owner);
      const float component = ptx::shuffle(ptx::fma(diagonal, error_now, mine.sum), first_lane + owner);
      loss = ptx::fma(component, component, loss);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        const int other = kLanes * j + lane;
        if (other < c) spots[j].sum = ptx::fma(room.triangle[other][c], given, spots[j].sum);
      }
    }
    const int c = kLanes * i + lane;
    if (row >= op.weight.rows || c >= panel.width) continue;
    const int64_t column = panel.begin + c;
    args.errors[column * op.weight.rows + row] = error;
    if (op.grid.round) op.codes[row * op.weight.columns + op.order[column]] = static_cast<uint8_t>(rounded.place);
  }
  return loss;
}

// ---- kernel ----

__global__ void __launch_bounds__(kThreads) gptq_columns_kernel(const Args args) {
  Room& room = shared<Room>();
  const GptqColumnsArgs& op = args.op;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t row = first_row + thread / kLanes;
  const int lane = thread % kLanes;
  fill_levels(op.grid, room);  // a barrier follows before anyone rounds
  double loss = 0.0;
  for (int64_t end = op.weight.columns; end > 0; end -= kPanel) {
    const int64_t begin = larger<int64_t>(0, end - kPanel);
    const Panel panel{begin, static_cast<int>(end - begin)};
    Spot spots[kOwn];
    read_spots(op, panel, row, lane, spots);
    sum_behind(args, panel, first_row, room);
    loss += static_cast<double>(round_panel(args, panel, room, row, lane, spots));
    ptx::sync_block();  // the next panel reads the errors, and overwrites the room
  }
  if (lane == 0 && row < op.weight.rows) op.loss[row] = loss;
}

}  // namespace

int64_t gptq_columns_workspace(const GptqColumnsArgs& args) {
  const int64_t floats = args.errors == nullptr ? args.weight.rows * args.weight.columns : 0;
  return floats * static_cast<int64_t>(sizeof(float));
}

void gptq_columns(const GptqColumnsArgs& args, void* workspace, Stream stream) {
  if (args.weight.rows == 0) return;
  const Args all{args, args.errors != nullptr ? args.errors : static_cast<float*>(workspace)};
  launch({.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(args.weight.rows, kRows))),
          .block = dim3(kThreads),
          .shared_bytes = sizeof(Room),
          .name = "gptq_columns",
          .stream = stream},
         gptq_columns_kernel, all);
}

}  // namespace bitfold::cuda
