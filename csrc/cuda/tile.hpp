// What the parts of the tile kernel share: its parameter, and how it is cut, a pure function of (format, n, k, class of
// m, GPU).
//
// y^T = W x^T: a block of threads has kTileRows rows of W, up to 128 tokens and a range of chunks of k. Its warps are
// kRowWarps x kColumnWarps: a warp has two tiles of 16 rows, and every kColumnWarps-th unit of 64 columns.
#pragma once

#include "cuda/chunk.hpp"
#include "cuda/cuda.hpp"

namespace bitfold::cuda {

inline constexpr int kTiles = 2;  // of 16 rows, of a warp
inline constexpr int kRowWarps = 4;
inline constexpr int kColumnWarps = 2;
inline constexpr int kTileThreads = kWarp * kRowWarps * kColumnWarps;
inline constexpr int kTileRows = kRowWarps * kTiles * 16;

// Tokens of a block at most: a GPU with little shared memory takes few in turn.
inline constexpr int kFewTokens = 32, kManyTokens = 128;

// Bytes of x in order: 8 tokens, one unit.
inline constexpr int kUnitBytes = 2 * kWarp * 16;

// The kernel with wgmma (wgmma.hpp) has tokens by quarters: one is the B of a product, and 8 KB of a unit.
inline constexpr int kQuarter = 64;
inline constexpr int kQuarterBytes = kQuarter / 8 * kUnitBytes;

// What the shape depends on of a format.
struct ChunkSize {
  int columns;
  int stride;      // bytes from row to row in shared memory
  int sums;        // bytes of sums of x for 8 tokens of a chunk
  int row_scales;  // bytes of scales for a row of a chunk
  int tables;      // bytes that all warps look up

  constexpr int units() const { return columns / kUnit; }
};

// The same of the kernel for few tokens on Hopper (few.hpp).
struct FewSize {
  int columns;  // of a stage
  int stride;   // bytes from row to row in shared memory
  int sums;     // bytes of sums of x for 8 tokens of a stage
  int tables;   // bytes that all warps look up
};

struct TileShape {
  bool wgmma;              // the kernel of wgmma.hpp
  bool few;                // the kernel of few.hpp
  int rows;                // of W, of a block
  int tokens;              // of a block: kFewTokens or kManyTokens; with wgmma whole quarters; of few.hpp 16 or 32
  int x_stages, w_stages;  // that wait in shared memory
  int splits;              // of k, over blocks
  int row_blocks, token_blocks;
  int64_t shared_bytes;
};

// Units of a stage of x: few tokens have whole chunks.
BITFOLD_HOST_DEVICE constexpr int tile_x_units(int tokens, int units) {
  return tokens == kFewTokens ? units : kColumnWarps;
}

// Where a block's shared memory has what; bytes.
struct TilePlaces {
  int tables, sums, x, w, end;
};
BITFOLD_HOST_DEVICE constexpr TilePlaces tile_places(ChunkSize size, int tokens, int x_stages, int w_stages) {
  TilePlaces at{};
  at.sums = at.tables + size.tables;
  at.x = at.sums + w_stages * (tokens / 8) * size.sums;
  at.w = at.x + x_stages * tile_x_units(tokens, size.columns / kUnit) * (tokens / 8) * kUnitBytes;
  at.end = at.w + w_stages * kTileRows * size.stride;
  return at;
}
struct alignas(1024) Bytes {
  uint8_t bytes[1024];
};

// The sums on their way out lie where everything else was: [token][row], a few floats more a token.
BITFOLD_HOST_DEVICE constexpr int out_stride(int rows) { return rows + 4; }
inline constexpr int kOutStride = out_stride(kTileRows);

TileShape tile_shape(ChunkSize size, int64_t m, int64_t n, int64_t k, const Gpu& gpu);
TileShape wgmma_shape(ChunkSize size, int64_t m, int64_t n, int64_t k, const Gpu& gpu);

// Of 8 tokens each, in whole pairs; with wgmma in whole quarters.
constexpr int64_t tile_groups(const TileShape& shape, int64_t m) {
  const int64_t tokens = shape.wgmma ? kQuarter : 16;
  return tokens / 8 * bitfold::ceil_div(m, tokens);
}

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
  int chunks;         // of a row
  uint32_t last_run;  // its last 32 columns', counting from 0
  bool in_words;      // whether rows start where their chunks' loads want them to; else bytes are moved there
  PlaneMatrix planes;
  bool wide_groups;  // whether 128 columns share a scale
  bool whole_units;  // whether 64 do
  // Whether groups are as small as their run of the kernel has them (64 columns with whole_units, else 32) and those of
  // 128 columns of a row lie together, aligned: one load then brings their scales.
  bool scales_together;

  const uint8_t* x;      // [unit][group][2][lane] 16 bytes, or as wgmma.hpp says
  const uint8_t* sums;   // [chunk][group][lane] hi and lo of sums
  const float* factors;  // of tokens: what their sums are multiplied with, times 2^-14
  float unit;            // and what those of all tokens
  int64_t m;
  int groups;  // of 8 tokens

  const void* bias;
  void* y;
  DType dtype;
  float* partial;      // [block][split][token][row]
  uint32_t* arrivals;  // of splits, for each block; zero
  uint32_t* peaks;     // kMostPeaks of each token, for arrange alone

  TileShape shape;
};

constexpr int64_t tile_row_bytes(const Weight& w) {
  return plane_extent(plane_laws(w.format).items[kCodes], w.n, w.k).columns;
}

// Defined for each format in a unit of its own (linear_tile.cu).
template <int Row>
ChunkSize tile_chunk();
template <int Row>
FewSize few_size();
template <int Row>
const Order& tile_order();
template <int Row>
bool tile_in_words(const Weight& w);
template <int Row>
PlaneMatrix tile_planes(const Weight& w);
template <int Row>
void tile_launch(const TileParameter& p, Stream stream);

// arrange.cu: x to its order, its sums and factors, and no arrivals.
inline constexpr int kMostPeaks = 16;  // of a token
void arrange(const MatrixIn& x, const Order& order, const TileParameter& p, Stream stream);

}  // namespace bitfold::cuda
