// What the parts of the tile kernel share: its parameter, and how it is cut, a pure function of (format, n, k, class of
// m, GPU).
//
// y^T = W x^T: a block of threads has `rows` rows of W, kTokens tokens and a range of chunks of k. Its warps are
// row_warps x k_warps: a warp has two tiles of 16 rows and every k_warps-th unit of 64 columns.
#pragma once

#include "cuda/chunk.hpp"
#include "cuda/cuda.hpp"

namespace bitfold::cuda {

inline constexpr int kTiles = 2;  // of 16 rows, of a warp
inline constexpr int kTileThreads = 256;
inline constexpr int kTileWarps = kTileThreads / kWarp;

// Bytes of x in order: 8 tokens, one unit.
inline constexpr int kUnitBytes = 2 * kWarp * 16;

// What the shape depends on of a format.
struct ChunkSize {
  int columns;
  int stride;      // bytes from row to row in shared memory
  int sums;        // bytes of sums of x for 8 tokens of a chunk
  int row_scales;  // bytes of scales for a row of a chunk
  int tables;      // bytes that all warps look up

  BITFOLD_HOST_DEVICE constexpr int units() const { return columns / kUnit; }
};

struct TileShape {
  int tokens;  // of a block: 16, 32, 64 or 128
  int row_warps, k_warps;
  int x_units;             // of a stage of x
  int x_stages, w_stages;  // (w_stages - 1) stages of W are at least x_stages - 1 of x
  int splits;              // of k, over blocks
  int row_blocks, token_blocks;
  int64_t shared_bytes;

  BITFOLD_HOST_DEVICE constexpr int rows() const { return row_warps * kTiles * 16; }
};

// Where a block's shared memory has what; bytes.
struct TilePlaces {
  int w, sums, x, scales, tables, end;
};
BITFOLD_HOST_DEVICE constexpr TilePlaces tile_places(const ChunkSize& size, const TileShape& shape) {
  TilePlaces at{};
  at.tables = 0;
  at.scales = at.tables + size.tables;
  at.sums = at.scales + 2 * shape.rows() * size.row_scales;
  at.x = at.sums + shape.w_stages * (shape.tokens / 8) * size.sums;
  at.w = at.x + shape.x_stages * shape.x_units * (shape.tokens / 8) * kUnitBytes;
  at.end = at.w + shape.w_stages * shape.rows() * size.stride;
  return at;
}
// The sums on their way out lie where everything else was: tokens x rows, four floats more a row.
BITFOLD_HOST_DEVICE constexpr int tile_out_stride(const TileShape& shape) { return shape.rows() + 4; }
constexpr int64_t tile_shared_bytes(const ChunkSize& size, const TileShape& shape) {
  return larger<int64_t>(tile_places(size, shape).end, int64_t{4} * shape.tokens * tile_out_stride(shape));
}

TileShape tile_shape(const ChunkSize& size, int64_t m, int64_t n, int64_t k, const Gpu& gpu);

// Of 8 tokens each, in whole pairs.
constexpr int64_t tile_groups(int64_t m) { return 2 * bitfold::ceil_div(m, int64_t{16}); }

// Columns of a chunk in the order of its operands: entry ((unit * 4 + step) * 4 + t) * 4 + half.
struct Order {
  uint8_t column[256];
  int columns;
  int mins;
};
template <int Row>
constexpr Order order_of() {
  using C = Chunk<Row>;
  Order order{};
  order.columns = C::kColumns;
  order.mins = C::kMins;
  for (int i = 0; i < C::kColumns; ++i) {
    order.column[i] = static_cast<uint8_t>(C::column(i / 64, i / 16 % 4, i / 4 % 4, i % 4));
  }
  return order;
}

struct TileParameter {
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t n;
  int64_t k;
  int chunks;     // of a row
  bool in_words;  // whether rows start where their chunks' loads want them to; else bytes are moved there
  PlaneMatrix planes;

  const uint8_t* x;      // [unit][group][2][lane] 16 bytes
  const uint8_t* sums;   // [chunk][group][lane] hi and lo of sums
  const float* factors;  // of tokens: what their sums are multiplied with, times 2^-14
  int64_t m;
  int groups;  // of 8 tokens

  const void* bias;
  void* y;
  DType dtype;
  float* partial;      // [block][split][token][row]
  uint32_t* arrivals;  // of splits, for each block; zero

  TileShape shape;
};

constexpr int64_t tile_row_bytes(const Weight& w) {
  return plane_extent(plane_laws(w.format).items[kCodes], w.n, w.k).columns;
}

// The formats that have tiles.
#define BITFOLD_TILE_ROWS(X)                                                                                       \
  X(kE4m3)                                                                                                         \
  X(kE5m2)                                                                                                         \
  X(kInt8) X(kInt4) X(kInt3) X(kInt2) X(kNf4) X(kFp4) X(kQ4_0) X(kQ4_1) X(kQ5_0) X(kQ5_1) X(kQ8_0) X(kQ2K) X(kQ3K) \
      X(kQ4K) X(kQ5K) X(kQ6K) X(kIq4Nl) X(kIq4Xs) X(kMxfp4)

// Defined for each format in a unit of its own (linear_tile.cu).
template <int Row>
ChunkSize tile_chunk();
template <int Row>
const Order& tile_order();
template <int Row>
bool tile_in_words(const Weight& w);
template <int Row>
PlaneMatrix tile_planes(const Weight& w);
template <int Row>
void tile_launch(const TileParameter& p, Stream stream);

// arrange.cu: x to its order, its sums and factors, and no arrivals.
void arrange(const MatrixIn& x, const Order& order, const TileParameter& p, Stream stream);

}  // namespace bitfold::cuda
