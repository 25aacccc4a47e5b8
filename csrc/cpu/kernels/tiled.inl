// Large batches: products of a decoded tile, which lies in cache, with the rows of x. Both operands run along k, so
// a tile is a set of dot products whose lanes are added up at the end.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

void tile(const TileArgs& a) {
  for (int64_t j0 = 0; j0 < a.m; j0 += kTileX) {
    for (int64_t i0 = 0; i0 < a.rows; i0 += kTileW) {
      const float* w = a.w + i0 * a.w_stride;
      const float* x = a.x + j0 * a.x_stride;
      F sums[kTileW][kTileX];
      for (auto& row : sums) {
        for (F& sum : row) sum = splat(0.0f);
      }
      for (int64_t c = 0; c < a.depth; c += kLanes) {
        F rows[kTileW];
        for (int i = 0; i < kTileW; ++i) rows[i] = load(w + i * a.w_stride + c);
        for (int j = 0; j < kTileX; ++j) {
          const F lanes = load(x + j * a.x_stride + c);
          for (int i = 0; i < kTileW; ++i) sums[i][j] = fma(rows[i], lanes, sums[i][j]);
        }
      }
      for (int j = 0; j < kTileX; ++j) {
        for (int i = 0; i < kTileW; ++i) a.sums[(j0 + j) * a.sum_stride + i0 + i] += reduce_add(sums[i][j]);
      }
    }
  }
}

void axpy(const AxpyArgs& a) {
  for (int64_t i = 0; i < a.rows; i += kAxpyRows) {
    for (int64_t j = 0; j < a.m; ++j) {
      F factors[kAxpyRows];
      for (int r = 0; r < kAxpyRows; ++r) factors[r] = splat(a.factors[j * a.factor_stride + i + r]);
      float* sums = a.sums + j * a.sum_stride;
      for (int64_t c = 0; c < a.columns; c += kLanes) {
        F sum = load(sums + c);
        for (int r = 0; r < kAxpyRows; ++r) sum = fma(factors[r], load(a.w + (i + r) * a.w_stride + c), sum);
        store(sums + c, sum);
      }
    }
  }
}

}  // namespace

void BITFOLD_ISA(tiled)(Kernels& kernels) {
  kernels.tile_w = kTileW;
  kernels.tile_x = kTileX;
  kernels.tile = tile;
  kernels.axpy = axpy;
}

}  // namespace bitfold::cpu
