// Products with more than 8 tokens: how the kernels are cut, where a workspace has what, which unit has the format.
#include <array>
#include <stdexcept>
#include <utility>

#include "cuda/few.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan.hpp"
#include "cuda/tile.hpp"
#include "cuda/wgmma.hpp"

namespace bitfold::cuda {
namespace {

// ---- the shape ----

constexpr int64_t kReserved = 1024;  // bytes of shared memory of each block, by CUDA
constexpr int64_t kMostSplits = 16;

// Stages as many as fit, at most four; of x first. Those of W go at least as far ahead.
bool fit_stages(ChunkSize size, int64_t room, TileShape* shape) {
  constexpr int kStages[][2] = {{4, 4}, {3, 3}, {4, 3}, {3, 2}, {2, 2}};  // of x, of W
  const int parts = size.units() / tile_x_units(shape->tokens, size.units());
  for (const auto& [x, w] : kStages) {
    if ((w - 1) * parts < x - 1) continue;
    shape->x_stages = x;
    shape->w_stages = w;
    shape->shared_bytes =
        larger<int64_t>(tile_places(size, shape->tokens, x, w).end, int64_t{4} * shape->tokens * kOutStride);
    if (shape->shared_bytes <= room) return true;
  }
  return false;
}

// Blocks wait for one another in waves, and each costs about two chunks beside its own.
int choose_splits(int64_t blocks, int64_t chunks, int64_t slots) {
  constexpr int64_t kOverhead = 2;
  int best = 1;
  int64_t least = 0;
  for (int64_t splits = 1; splits <= smaller(kMostSplits, larger<int64_t>(chunks / 2, 1)); ++splits) {
    const int64_t waves = ceil_div(blocks * splits, slots);
    const int64_t cost = waves * (ceil_div(chunks, splits) + kOverhead + (splits > 1 ? 1 : 0));
    if (splits == 1 || cost < least) least = cost, best = static_cast<int>(splits);
  }
  return best;
}

}  // namespace

TileShape tile_shape(ChunkSize size, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  const int64_t half = (gpu.shared_bytes + kReserved) / 2 - kReserved;
  TileShape shape{};
  shape.rows = kTileRows;
  int per_multiprocessor = 1;
  bool fits = false;
  for (const int tokens : {kManyTokens, kFewTokens}) {
    if (tokens == kManyTokens && m <= kFewTokens) continue;
    shape.tokens = tokens;
    if (tokens == kFewTokens && fit_stages(size, half, &shape) && (shape.w_stages - 1) * size.columns >= 256) {
      fits = true;
      per_multiprocessor = 2;
    } else {
      fits = fit_stages(size, gpu.shared_bytes, &shape);
    }
    if (fits) break;
  }
  if (!fits) throw std::runtime_error("linear_tile: this GPU has too little shared memory");
  shape.row_blocks = static_cast<int>(ceil_div<int64_t>(n, kTileRows));
  shape.token_blocks = static_cast<int>(ceil_div<int64_t>(m, shape.tokens));
  shape.splits = choose_splits(int64_t{shape.row_blocks} * shape.token_blocks, ceil_div<int64_t>(k, size.columns),
                               int64_t{gpu.multiprocessors} * per_multiprocessor);
  return shape;
}

// ---- the shape with wgmma ----

namespace {

// Clocks of a unit of 64 columns by a block's quarters: counted from what an H200 took for two warpgroups at 00e05ac
// (int4 with groups of 128), 740 and 1015, since more of them wait side by side.
constexpr int64_t wgmma_clocks(int quarters) { return quarters == 1 ? 850 : 1075; }

bool fit_wgmma(ChunkSize size, int64_t room, TileShape* shape) {
  // Of x, of W: x for some units, and W for a chunk more than what is multiplied.
  constexpr int kStages[][2] = {{8, 6}, {8, 4}, {8, 3}, {6, 3}, {4, 4}, {4, 3}, {4, 2}, {3, 3}, {3, 2}, {2, 2}};
  static_assert(kStages[0][0] <= kWgmmaStages && kStages[0][1] <= kWgmmaStages);
  for (const auto& [x, w] : kStages) {
    const WgmmaPlaces at = wgmma_places(size, shape->rows, shape->tokens, x, w);
    shape->x_stages = x;
    shape->w_stages = w;
    shape->shared_bytes = larger<int64_t>(at.end, at.out + int64_t{4} * shape->tokens * out_stride(shape->rows));
    if (shape->shared_bytes <= room) return true;
  }
  return false;
}

}  // namespace

TileShape wgmma_shape(ChunkSize size, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  // What a block costs beside its units, in clocks: its start and its end; and adding up the sums of others.
  constexpr int64_t kBegin = 3000, kEnd = 1000, kAddUp = 1500;
  const int64_t quarters = bitfold::ceil_div(m, int64_t{kQuarter}), units = ceil_div<int64_t>(k, kUnit);
  const int64_t chunks = ceil_div<int64_t>(k, size.columns);
  TileShape best{};
  int64_t least = 0;
  for (const int each : {1, 2}) {
    TileShape shape{};
    shape.wgmma = true;
    shape.rows = wgmma_rows(each);
    shape.tokens = each * kQuarter;
    if (!fit_wgmma(size, gpu.shared_bytes, &shape)) continue;
    shape.row_blocks = static_cast<int>(ceil_div<int64_t>(n, shape.rows));
    shape.token_blocks = static_cast<int>(ceil_div<int64_t>(quarters, each));
    for (int64_t splits = 1; splits <= smaller(kMostSplits, larger<int64_t>(chunks / 2, 1)); ++splits) {
      const int64_t blocks = int64_t{shape.row_blocks} * shape.token_blocks * splits;
      const int64_t waves = ceil_div<int64_t>(blocks, gpu.multiprocessors);
      const int64_t cost = waves * (ceil_div(units, splits) * wgmma_clocks(each) + kBegin + each * kEnd +
                                    (splits > 1 ? each * kAddUp : 0));
      if (least != 0 && cost >= least) continue;
      least = cost;
      shape.splits = static_cast<int>(splits);
      best = shape;
    }
  }
  if (least == 0) throw std::runtime_error("linear_wgmma: this GPU has too little shared memory");
  return best;
}

namespace {

// ---- the table of units ----

struct Unit {
  ChunkSize (*chunk)();
  FewSize (*few)();
  const Order& (*order)();
  bool (*in_words)(const Weight&);
  PlaneMatrix (*planes)(const Weight&);
  void (*launch)(const TileParameter&, Stream);
};
template <int Row>
constexpr Unit unit_of() {
  return {tile_chunk<Row>, few_size<Row>, tile_order<Row>, tile_in_words<Row>, tile_planes<Row>, tile_launch<Row>};
}
template <int... I>
constexpr std::array<Unit, sizeof...(I)> units(std::integer_sequence<int, I...>) {
  return {unit_of<kE4m3 + I == kFp4 ? kNf4 : kE4m3 + I>()...};
}
// All formats but fp16 and bf16, the first two; fp4 is nf4's.
const Unit& unit_of(int row) {
  static constexpr auto kUnits = units(std::make_integer_sequence<int, kRowCount - kE4m3>());
  if (row < kE4m3) throw std::logic_error("this format has no tile kernel");
  return kUnits[static_cast<size_t>(row - kE4m3)];
}

// ---- the workspace ----

struct Workspace {
  int64_t x, sums, factors, peaks, partial, arrivals, end;
};
Workspace workspace_of(ChunkSize size, const TileShape& shape, int64_t m, int64_t k) {
  const auto aligned = [](int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; };
  const int64_t groups = tile_groups(shape, m), chunks = ceil_div<int64_t>(k, size.columns);
  const int64_t blocks = int64_t{shape.row_blocks} * shape.token_blocks;
  const bool split = shape.splits > 1;
  Workspace at{};
  at.sums = aligned(at.x + chunks * size.units() * groups * kUnitBytes);
  at.factors = aligned(at.sums + chunks * groups * size.sums);
  at.peaks = aligned(at.factors + groups * 8 * 4);
  at.partial = aligned(at.peaks + m * kMostPeaks * 4);
  at.arrivals = aligned(at.partial + (split ? blocks * shape.splits * shape.tokens * shape.rows * 4 : 0));
  at.end = aligned(at.arrivals + (split ? blocks * 4 : 0));
  return at;
}

TileShape shape_of(const Unit& unit, const LinearArgs& args) {
  const Gpu device = gpu();
  const ChunkSize size = unit.chunk();
  if (device.wgmma && args.x.rows <= kTileBesideWgmma) {
    return few_shape(unit.few(), args.x.rows, args.w.n, args.w.k, device);
  }
  const auto shape = device.wgmma ? wgmma_shape : tile_shape;
  return shape(size, args.x.rows, args.w.n, args.w.k, device);
}

}  // namespace

int64_t linear_tile_workspace(const LinearArgs& args) {
  if (args.w.n == 0) return 0;
  const Unit& unit = unit_of(args.w.format.row);
  const ChunkSize size = unit.chunk();
  const TileShape shape = shape_of(unit, args);
  return workspace_of(size, shape, args.x.rows, args.w.k).end;
}

// (k % 128 makes the groups of a row whole fours, or pairs.)
static bool scales_together(const Weight& w) {
  const int64_t group = w.format.group;
  return (group == 32 || group == 64) && w.k % 128 == 0 && reinterpret_cast<uintptr_t>(w.scales) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(w.zeros) % 2 == 0;
}

void linear_tile(const LinearArgs& args, void* workspace, Stream stream) {
  if (args.w.n == 0) return;
  const Unit& unit = unit_of(args.w.format.row);
  const ChunkSize size = unit.chunk();
  const TileShape shape = shape_of(unit, args);
  const Workspace at = workspace_of(size, shape, args.x.rows, args.w.k);
  auto* base = static_cast<uint8_t*>(workspace);
  const TileParameter parameter{
      .codes = static_cast<const uint8_t*>(args.w.codes),
      .row_bytes = tile_row_bytes(args.w),
      .n = args.w.n,
      .k = args.w.k,
      .chunks = static_cast<int>(ceil_div<int64_t>(args.w.k, size.columns)),
      .last_run = static_cast<uint32_t>((args.w.k - 1) / 32),
      .in_words = unit.in_words(args.w),
      .planes = unit.planes(args.w),
      .wide_groups = args.w.format.group < 1 || args.w.format.group % 128 == 0,
      .whole_units = args.w.format.group < 1 || args.w.format.group % kUnit == 0,
      .scales_together = scales_together(args.w),
      .x = base + at.x,
      .sums = base + at.sums,
      .factors = reinterpret_cast<const float*>(base + at.factors),
      .unit = 1.0f / codebook_up(args.w.format.row),
      .m = args.x.rows,
      .groups = static_cast<int>(tile_groups(shape, args.x.rows)),
      .bias = args.bias,
      .y = args.y,
      .dtype = args.x.dtype,
      .partial = reinterpret_cast<float*>(base + at.partial),
      .arrivals = reinterpret_cast<uint32_t*>(base + at.arrivals),
      .peaks = reinterpret_cast<uint32_t*>(base + at.peaks),
      .shape = shape,
  };
  arrange(args.x, unit.order(), parameter, stream);
  unit.launch(parameter, stream);
}

}  // namespace bitfold::cuda
