// Large batches of bf16 rows: as tiled.inl, with operands rounded to bf16 (x already is) and sums in fp32. Operands
// below 2^-126 count as zero: the instruction has no subnormals.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

// From pairs of interleaved fp32 vectors to one interleaved vector of bf16. Which column is whose neighbour does not
// matter as long as it is so in w and x.
void round_bf16(const float* from, int64_t columns, int rows, uint16_t* to) {
  for (int64_t c = 0; c < columns; c += 2 * kLanes) {
    for (int r = 0; r < rows; ++r) {
      store_rounded(to + r * 2 * kLanes, load(from + r * kLanes), load(from + (rows + r) * kLanes));
    }
    from += 2 * rows * kLanes;
    to += 2 * rows * kLanes;
  }
}

template <int X = kTileX>  // rows of x, at most
void tile_bf16(const TileArgs<uint16_t>& a) {
  if constexpr (X > 1) {
    if (a.x_rows < X) return tile_bf16<X - 1>(a);
  }
  const uint16_t* w = a.w;
  const uint16_t* x = a.x;
  F sums[X][kTileRows];
  for (auto& row : sums) {
    for (F& sum : row) sum = splat(0.0f);
  }
  for (int64_t c = 0; c < a.depth; c += 2 * kLanes) {
    Pairs x_pairs[X];
    for (int j = 0; j < X; ++j) x_pairs[j] = hold(load_pairs(x + j * 2 * kLanes));
    for (int i = 0; i < kTileRows; ++i) {
      const Pairs w_pairs = hold(load_pairs(w + i * 2 * kLanes));
      for (int j = 0; j < X; ++j) sums[j][i] = dot(sums[j][i], w_pairs, x_pairs[j]);
    }
    x += kTileX * 2 * kLanes;
    w += kTileRows * 2 * kLanes;
  }
  for (int j = 0; j < X; ++j) add_reduced(sums[j], a.sums + j * a.sum_stride);
}

}  // namespace

void BITFOLD_ISA(tiled_bf16)(Kernels& kernels) {
  kernels.round_bf16 = round_bf16;
  kernels.tile_bf16 = tile_bf16<>;
}

}  // namespace bitfold::cpu
