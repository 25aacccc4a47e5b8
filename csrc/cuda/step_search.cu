// The search for the steps of groups (StepSearchArgs): the CPU's, bit for bit.
//
// A block has one group of 32 rows. Its weights come to shared memory a few columns at a time, over their starts; a
// warp takes every eighth of the steps that are tried, and a lane a row, so that a sum is one thread's over the columns
// in their order. In the end a thread for each row takes the first of the best.
#include <cmath>

#include "cuda/gptq.hpp"
#include "cuda/lane.hpp"
#include "search/grid.hpp"
#include "search/step_search.inl"

namespace bitfold::cuda {
namespace {

constexpr int kRows = kWarp;
constexpr int kChunk = 32;  // columns that are held at a time
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kOwn = kMostTried / kWarps;  // steps of a warp
static_assert(kOwn * kWarps == kMostTried && kChunk == kWarp);

struct Room {
  float columns[kChunk][kRows + 1];  // written by column, read by row: an odd number of words meets in no bank
  float costs[kMostTried][kRows];
  float start[kRows];
  float levels[kGptqLevels];
  float middles[kGptqLevels];
};

// A group of some rows.
struct Spot {
  int64_t group;
  int64_t first_row;
  BITFOLD_DEVICE int64_t at(const StepSearchArgs& args, int row) const {
    return group * args.weight.rows + first_row + row;
  }
};

BITFOLD_DEVICE void fill_levels(const StepSearchArgs& args, Room& room) {
  const auto i = static_cast<int>(threadIdx.x);
  if (args.table == nullptr || i >= kGptqLevels) return;
  const auto last = static_cast<int>(args.high);
  const float level = args.table[smaller(i, last)], next = args.table[smaller(i + 1, last)];
  room.levels[i] = level;
  room.middles[i] = (level + next) * 0.5f;
}

BITFOLD_DEVICE float step_of(const StepSearchArgs& args, float start, int64_t i) {
  return round_scale(start * args.factors[i], args.stored);
}

BITFOLD_DEVICE void read_columns(const StepSearchArgs& args, const Spot& spot, int64_t first, int64_t count,
                                 Room& room) {
  const auto* weight = static_cast<const float*>(args.weight.data);
  const int c = ptx::lane_id();
  for (int r = ptx::warp_id(); r < kRows; r += kWarps) {
    const float start = room.start[r];
    const bool there = c < count && start != 0.0f;  // no start beyond the last row
    room.columns[c][r] = there ? weight[(spot.first_row + r) * args.weight.columns + first + c] / start : 0.0f;
  }
}

// The steps that a thread tries for its row.
template <class Levels>
BITFOLD_DEVICE void try_steps(const StepSearchArgs& args, const Spot& spot, const Levels& levels, Room& room) {
  const int lane = ptx::lane_id();
  const bool inside = spot.first_row + lane < args.weight.rows;
  const float start = room.start[lane];
  const float zero = inside && args.zeros != nullptr ? args.zeros[spot.at(args, lane)] : 0.0f;
  float sums[kOwn] = {}, ratios[kOwn] = {};
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = ptx::warp_id() + j * kWarps;
    if (i < args.tried && start != 0.0f) ratios[j] = step_of(args, start, i) / start;
  }
  const int64_t begin = spot.group * args.group, end = smaller(args.weight.columns, begin + args.group);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = smaller<int64_t>(kChunk, end - first);
    read_columns(args, spot, first, count, room);
    ptx::sync_block();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (ptx::warp_id() + j * kWarps >= args.tried) continue;
      const search::Tried tried(search::F{ratios[j]}, search::F{zero});
      for (int64_t c = 0; c < count; ++c) {
        const float cost = search::cost(search::F{room.columns[c][lane]}, tried, levels).v;
        sums[j] += args.importance == nullptr ? cost : cost * args.importance[first + c];
      }
    }
    ptx::sync_block();  // the next columns overwrite these
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j) room.costs[ptx::warp_id() + j * kWarps][lane] = sums[j];
}

// The first of the steps with the least cost, which is no NaN.
BITFOLD_DEVICE void choose(const StepSearchArgs& args, const Spot& spot, int row, const Room& room) {
  int best = 0;
  float least = INFINITY;
  for (int i = 0; i < args.tried; ++i) {
    const float cost = room.costs[i][row];
    best = cost < least ? i : best;
    least = cost < least ? cost : least;
  }
  args.step[spot.at(args, row)] = step_of(args, room.start[row], best);
  args.cost[spot.at(args, row)] = least;
}

__global__ void __launch_bounds__(kThreads) search_steps_kernel(const StepSearchArgs args) {
  Room& room = shared<Room>();
  const auto groups = static_cast<uint32_t>(bitfold::ceil_div(args.weight.columns, args.group));  // at most all blocks
  const Spot spot{blockIdx.x % groups, int64_t{blockIdx.x / groups} * kRows};
  const auto thread = static_cast<int>(threadIdx.x);
  const bool has_row = thread < kRows && spot.first_row + thread < args.weight.rows;
  if (thread < kRows) room.start[thread] = has_row ? args.start[spot.at(args, thread)] : 0.0f;
  fill_levels(args, room);
  ptx::sync_block();
  if (args.table != nullptr) {
    try_steps(args, spot, search::Entries{room.levels, room.middles}, room);
  } else {
    const search::Wholes levels{search::splat(static_cast<float>(args.low)),
                                search::splat(static_cast<float>(args.high))};
    try_steps(args, spot, levels, room);
  }
  ptx::sync_block();
  if (has_row) choose(args, spot, thread, room);
}

}  // namespace

void search_steps(const StepSearchArgs& args, Stream stream) {
  if (args.weight.rows == 0 || args.weight.columns == 0) return;
  const int64_t blocks = ceil_div(args.weight.columns, args.group) * ceil_div<int64_t>(args.weight.rows, kRows);
  launch({.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(kThreads),
          .shared_bytes = sizeof(Room),
          .name = "search_steps",
          .stream = stream},
         search_steps_kernel, args);
}

}  // namespace bitfold::cuda
