// What the parts of the kernel for many tokens share where there is wgmma: how it is cut, and where it has what.
//
// y^T = W x^T, as in the tile kernel (tile.hpp): a block has kTileRows rows of W, up to 256 tokens and a range of
// chunks of k. Two warpgroups of it multiply, 64 rows each, and one brings what they multiply to shared memory. Tokens
// go by quarters of 64: one is the B of a product, and x lies in memory as quarters of a unit (64 columns), which are
// that operand: [step of 16 columns][b0 or b1][8 tokens][token][4 pairs of columns in a format's order], 16 bytes a
// token.
#pragma once

#include "cuda/tile_copies.hpp"

namespace bitfold::cuda {

inline constexpr int kStepBytes = kQuarterBytes / kUnitSteps;

inline constexpr int kWarpgroup = 4 * kWarp;
inline constexpr int kWgmmaThreads = kTileThreads + kWarpgroup;  // the last of them copy
inline constexpr int kWgmmaStages = 8;                           // at most
static_assert(kTileThreads == 2 * kWarpgroup && kTileRows == 2 * 64 && kTileRows == kWarpgroup);

// Registers of a thread: as a block begins, as they are for those who multiply, and for those who copy, who have more
// to do where scales lie in a plane. A block's are as many as it began with: those who go up would wait for more for
// ever.
inline constexpr int kAtStart = 65536 / kWgmmaThreads / 8 * 8;
template <class C>
inline constexpr int kUp = C::kPlanes ? 224 : 232;
template <class C>
inline constexpr int kDownTo = (kAtStart * kWgmmaThreads - kUp<C> * kTileThreads) / kWarpgroup;

// Of the stages of x and W: filled, and free again.
struct WgmmaBarriers {
  ptx::Barrier x_full[kWgmmaStages], x_empty[kWgmmaStages], w_full[kWgmmaStages], w_empty[kWgmmaStages];
};

// Where a block's shared memory has what; bytes. The sums on their way out lie where everything but the barriers was.
struct WgmmaPlaces {
  int out, tables, scales, sums, x, w, end;
};
BITFOLD_HOST_DEVICE constexpr WgmmaPlaces wgmma_places(ChunkSize size, int tokens, int x_stages, int w_stages) {
  WgmmaPlaces at{};
  at.out = at.tables = 1024;
  static_assert(sizeof(WgmmaBarriers) <= 1024);
  at.scales = at.tables + size.tables;
  at.sums = at.scales + w_stages * kTileRows * size.row_scales;
  at.x = at.sums + w_stages * (tokens / 8) * size.sums;
  at.w = at.x + x_stages * (tokens / kQuarter) * kQuarterBytes;
  at.end = at.w + w_stages * kTileRows * size.stride;
  return at;
}

}  // namespace bitfold::cuda
