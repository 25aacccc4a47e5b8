// The search for the steps of groups (StepSearchArgs): kPanel rows at a time, group by group.
// Each sum is that of one row and one step, over the columns in their order: the bits are the same for any number of
// threads.
#include <algorithm>
#include <limits>

#include "cpu/buffer.hpp"
#include "cpu/gptq.hpp"

namespace bitfold::cpu {
namespace {

constexpr int64_t kChunk = 128;  // columns that are held over their starts, 16 KB of them

struct Levels {
  float levels[kGptqLevels];
  float middles[kGptqLevels];
};

// What a thread needs for a panel of rows.
struct Scratch {
  float columns[kChunk * kPanel];
  float ratios[kMostTried * kPanel];
  float costs[kMostTried * kPanel];
  float start[kPanel], zeros[kPanel];
};

// Rows of a panel, which may be the last of the matrix and have fewer than kPanel.
struct Rows {
  int64_t first, count;
};

// Lane r: its start, the zero point, and the steps over the start; 0 beyond the last row.
void read_group(const StepSearchArgs& args, int64_t group, const Rows& rows, Scratch* scratch) {
  const int64_t at = group * args.weight.rows + rows.first;
  for (int64_t r = 0; r < kPanel; ++r) {
    const bool inside = r < rows.count;
    scratch->start[r] = inside ? args.start[at + r] : 0.0f;
    scratch->zeros[r] = inside && args.zeros != nullptr ? args.zeros[at + r] : 0.0f;
  }
  for (int64_t i = 0; i < args.tried; ++i) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const float start = scratch->start[r], step = round_scale(start * args.factors[i], args.stored);
      scratch->ratios[i * kPanel + r] = start == 0.0f ? 0.0f : step / start;
    }
  }
}

void read_columns(const StepSearchArgs& args, const Rows& rows, int64_t first, int64_t count, Scratch* scratch) {
  const int64_t k = args.weight.columns;
  const float* weight = static_cast<const float*>(args.weight.data) + rows.first * k + first;
  for (int64_t r = 0; r < kPanel; ++r) {
    const float start = scratch->start[r];
    if (start == 0.0f) {  // as beyond the last row
      for (int64_t c = 0; c < count; ++c) scratch->columns[c * kPanel + r] = 0.0f;
    } else {
      for (int64_t c = 0; c < count; ++c) scratch->columns[c * kPanel + r] = weight[r * k + c] / start;
    }
  }
}

// The first of the steps with the least cost, which is no NaN.
void choose(const StepSearchArgs& args, int64_t group, const Rows& rows, const Scratch& scratch) {
  const int64_t at = group * args.weight.rows + rows.first;
  for (int64_t r = 0; r < rows.count; ++r) {
    int64_t best = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < args.tried; ++i) {
      const float cost = scratch.costs[i * kPanel + r];
      best = cost < least ? i : best;
      least = cost < least ? cost : least;
    }
    args.step[at + r] = round_scale(scratch.start[r] * args.factors[best], args.stored);
    args.cost[at + r] = least;
  }
}

void search_group(const StepSearchArgs& args, const Levels& levels, int64_t group, const Rows& rows, Scratch* scratch) {
  const int64_t k = args.weight.columns, end = std::min(k, (group + 1) * args.group);
  read_group(args, group, rows, scratch);
  std::fill(scratch->costs, scratch->costs + args.tried * kPanel, 0.0f);
  for (int64_t first = group * args.group; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first);
    read_columns(args, rows, first, count, scratch);
    kernels().panel_search({scratch->columns, args.importance == nullptr ? nullptr : args.importance + first, count,
                            scratch->ratios, args.tried, scratch->zeros,
                            args.table == nullptr ? nullptr : levels.levels, levels.middles, args.low, args.high,
                            scratch->costs});
  }
  choose(args, group, rows, *scratch);
}

}  // namespace

void search_steps(const StepSearchArgs& args) {
  const int64_t n = args.weight.rows, groups = ceil_div(args.weight.columns, args.group);
  Levels levels{};
  for (int64_t i = 0; i < kGptqLevels && args.table != nullptr; ++i) {
    const float level = args.table[std::min(i, args.high)], next = args.table[std::min(i + 1, args.high)];
    levels.levels[i] = level;
    levels.middles[i] = (level + next) * 0.5f;
  }
  share(args.parallel_for, ceil_div(n, kPanel), 1, [&](const auto& next) {
    Buffer<Scratch> scratch(1);
    for (int64_t panel = 0, end = 0; next(&panel, &end);) {
      const Rows rows{panel * kPanel, std::min(kPanel, n - panel * kPanel)};
      for (int64_t g = 0; g < groups; ++g) search_group(args, levels, g, rows, scratch.data());
    }
  });
}

}  // namespace bitfold::cpu
