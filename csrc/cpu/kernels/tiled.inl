// Large batches: products of a few decoded rows, which lie in cache, with the rows of x. Both operands run along k, so
// these are dot products whose lanes are added up at the end.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

template <int X = kTileX>  // rows of x, at most
void tile(const TileArgs<float>& a) {
  if constexpr (X > 1) {
    if (a.x_rows < X) return tile<X - 1>(a);
  }
  const float* w = a.w;
  const float* x = a.x;
  F sums[X][kTileRows];
  for (auto& row : sums) {
    for (F& sum : row) sum = splat(0.0f);
  }
  for (int64_t c = 0; c < a.depth; c += kLanes) {
    F x_lanes[X];
    for (int j = 0; j < X; ++j) x_lanes[j] = hold(load(x + j * kLanes));
    for (int i = 0; i < kTileRows; ++i) {
      const F w_lanes = hold(load(w + i * kLanes));
      for (int j = 0; j < X; ++j) sums[j][i] = fma(w_lanes, x_lanes[j], sums[j][i]);
    }
    x += kTileX * kLanes;
    w += kTileRows * kLanes;
  }
  for (int j = 0; j < X; ++j) add_reduced(sums[j], a.sums + j * a.sum_stride);
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
  kernels.lanes = kLanes;
  kernels.tile_x = kTileX;
  kernels.tile = tile<>;
  kernels.axpy = axpy;
}

}  // namespace bitfold::cpu
