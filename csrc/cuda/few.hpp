// How the kernel for 9 to 32 tokens on Hopper (linear_few.hpp) is cut, a pure function of (format, n, k, class of m,
// GPU).
//
// A block of threads has a multiprocessor to itself: kFewRows rows of W, all tokens and a range of columns. It goes
// through them stage by stage; the warps that multiply are kFewRowWarps x kFewColumnWarps: a warp has two tiles of 16
// rows and a half of a stage's columns. One warpgroup more copies.
#pragma once

#include <stdexcept>

#include "cuda/tile.hpp"

namespace bitfold::cuda {

inline constexpr int kFewRowWarps = 8, kFewColumnWarps = 2;
inline constexpr int kFewWarps = kFewRowWarps * kFewColumnWarps, kFewMultiply = kFewWarps * kWarp;
inline constexpr int kFewCopy = 4 * kWarp;
inline constexpr int kFewThreads = kFewMultiply + kFewCopy;
inline constexpr int kFewRows = kFewRowWarps * kTiles * 16;
inline constexpr int kFewStages = 6, kFewBarrierBytes = 128;

// Registers of a thread: as a block begins, as they are for those who multiply, and for those who copy.
inline constexpr int kFewAtStart = 65536 / kFewThreads / 8 * 8;
inline constexpr int kFewUp = 112, kFewDownTo = (kFewAtStart * kFewThreads - kFewUp * kFewMultiply) / kFewCopy;
static_assert(kFewDownTo % 8 == 0 && kFewDownTo >= 24);

// A stage of a format: one of its chunks, or so many that a barrier is worth its while.
template <class C>
struct FewStage {
  static constexpr int kColumns = larger(C::kColumns, C::kBytes <= C::kColumns / 2 ? 256 : 128);
  static constexpr int kUnits = kColumns / kUnit;
  static constexpr int kBytes = C::kBytes * (kColumns / C::kColumns);
  // Rows in shared memory as tile_copies.hpp has them: an odd number of pieces of 16 bytes.
  static constexpr bool kSkewed = C::kAlign < 16;
  static constexpr int kPieces = (kBytes + 16 - smaller(C::kAlign, 16) + 15) / 16;
  static constexpr int kStride = 16 * (kPieces | 1);
  static constexpr int kSums = kWarp * C::kMins;  // bytes of sums of x, of 8 tokens
};

constexpr int64_t few_aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Where a block's shared memory has what; bytes. A stage: its rows of W, x of its units, sums of x. The sums on their
// way out lie where everything but the barriers was.
struct FewPlaces {
  int tables, stages, x, sums, stage, end;
};
BITFOLD_HOST_DEVICE constexpr FewPlaces few_places(const FewSize& size, int groups, int stages) {
  FewPlaces at{};
  at.tables = kFewBarrierBytes;
  at.stages = at.tables + size.tables;
  at.x = kFewRows * size.stride;
  at.sums = at.x + size.columns / kUnit * groups * kUnitBytes;
  at.stage = at.sums + groups * size.sums;
  at.end = at.stages + stages * at.stage;
  return at;
}

// Stages as many as fit, and k cut over so many blocks that waves of them take the least time, in stages: a block costs
// about three beside its own.
inline TileShape few_shape(const FewSize& size, int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  constexpr int64_t kMostSplits = 16, kOverhead = 3;
  TileShape shape{};
  shape.few = true;
  shape.rows = kFewRows;
  shape.tokens = m <= 16 ? 16 : 32;
  const auto fit = [&](int stages) {
    const FewPlaces at = few_places(size, shape.tokens / 8, stages);
    shape.shared_bytes = larger<int64_t>(at.end, at.tables + int64_t{4} * shape.tokens * out_stride(kFewRows));
    return shape.shared_bytes <= gpu.shared_bytes;
  };
  int stages = kFewStages;
  while (!fit(stages)) {
    if (--stages < 2) throw std::runtime_error("linear_few: this GPU has too little shared memory");
  }
  shape.x_stages = shape.w_stages = stages;
  shape.row_blocks = static_cast<int>(bitfold::ceil_div(n, int64_t{kFewRows}));
  shape.token_blocks = 1;
  shape.splits = 1;
  const int64_t all = bitfold::ceil_div(k, int64_t{size.columns});
  int64_t least = 0;
  for (int64_t splits = 1; splits <= smaller(kMostSplits, larger<int64_t>(all / 2, 1)); ++splits) {
    const int64_t waves = bitfold::ceil_div(shape.row_blocks * splits, int64_t{gpu.multiprocessors});
    const int64_t cost = waves * (bitfold::ceil_div(all, splits) + kOverhead + (splits > 1 ? 1 : 0));
    if (splits > 1 && cost >= least) continue;
    least = cost;
    shape.splits = static_cast<int>(splits);
  }
  return shape;
}

}  // namespace bitfold::cuda
