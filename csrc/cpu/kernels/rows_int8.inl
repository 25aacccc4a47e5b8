// Products of bytes, for weights of 8 bits and x rounded to 8 bits, row by row. All sums are whole numbers that fit 32
// bits, so neither the instruction set nor the number of rows changes a bit of them.
//
// Few rows of x: a row of the weight is read once, in order, and its lanes, which hold sums of columns, are added up
// last. Many: 32 rows of the weight (16 and 8 with fewer lanes) are transposed into lanes, a row in each, four columns
// at a time, and meet four columns of one row of x, broadcast: an output is one lane.
#include "cpu/isa.hpp"
#include "cpu/rows_int8.hpp"

namespace bitfold::cpu {
namespace {

// Columns of a vector.
inline constexpr int64_t kVectorColumns = 4 * kLanes;
static_assert(kRowsInt8Block % kVectorColumns == 0);

// ---- rows of x ----

// Both arrays have room for whole vectors.
void mark(const float* x, int64_t columns, float* largest) {
  const F infinity = splat(std::bit_cast<float>(0x7f800000u)), none = splat(0.0f);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const F size = abs(load(x + c));
    store(largest + c, max(select(greater(infinity, size), size, none), load(largest + c)));
  }
}

int32_t round_row(const RowsInt8Round& a) {
  const F inverse = splat(a.inverse), most = splat(127.0f), least = splat(-127.0f);
  I sums = splat(int32_t{0});
  const auto step = [&](const float* x, uint8_t* to) {
    const I codes = to_int(max(min(round_even(mul(load(x), inverse)), most), least));
    sums = add(sums, codes);
    store_bytes(to, bit_and(codes, splat(int32_t{255})));
  };
  auto* to = reinterpret_cast<uint8_t*>(a.codes);
  int64_t c = 0;
  for (; c + kLanes <= a.columns; c += kLanes) step(a.x + c, to + c);
  if (c < a.columns) {
    float lanes[kLanes] = {};
    uint8_t bytes[kLanes];
    std::memcpy(lanes, a.x + c, static_cast<size_t>(a.columns - c) * sizeof(float));
    step(lanes, bytes);
    std::memcpy(to + c, bytes, static_cast<size_t>(a.columns - c));
  }
  int32_t lanes[kLanes], sum = 0;
  store_int(lanes, sums);
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

void scale(const RowsInt8Scale& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const auto sum = static_cast<float>(a.sums[i] - a.zeros[i] * a.codes_sum);
    const float value = sum * (a.step * a.scales[i]);
    a.y[i] = a.first ? value : a.y[i] + value;
  }
}

// ---- columns with outliers ----

// Not fused: a processor may have no fused instruction, and all give the same bits.
template <int X>
BITFOLD_SIMD void add_products_of(const RowsInt8Sides& a, int64_t j) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  for (int64_t i = 0; i < kRowsInt8Block; i += kVectors * kLanes) {
    F sums[X][kVectors];
    for (int r = 0; r < X; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(a.sums + (j + r) * kRowsInt8Block + i + v * kLanes);
    }
    for (int64_t c = 0; c < a.columns; ++c) {
      F w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load(a.panel + c * kRowsInt8Block + i + v * kLanes);
      for (int r = 0; r < X; ++r) {
        const F x = splat(a.x[(j + r) * a.x_stride + c]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = add(sums[r][v], mul(x, w[v]));
      }
    }
    for (int r = 0; r < X; ++r) {
      for (int v = 0; v < kVectors; ++v) store(a.sums + (j + r) * kRowsInt8Block + i + v * kLanes, sums[r][v]);
    }
  }
}

void add_products(const RowsInt8Sides& a) {
  int64_t j = 0;
  for (; j + 4 <= a.m; j += 4) add_products_of<4>(a, j);
  for (; j < a.m; ++j) add_products_of<1>(a, j);
}

// ---- few rows of x ----

// Bytes of the weight that are asked for ahead of those that are multiplied.
inline constexpr int64_t kAheadBytes = 2048;

// totals[r * M + j]: vectors of R rows of the weight times M of x. Whole numbers are held as vectors of floats, which
// nothing computes with, for `hold`: without it GCC 12 copies every sum to memory, in each step of the loop.
template <int R, int M>
[[gnu::noinline]] void multiply_few(const uint8_t* const (&rows)[R], const RowsInt8Products& a, I* totals) {
  const uint8_t* w[R];
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  const int8_t* x = a.x;
  F sums[R][M];
  for (auto& row : sums) {
    for (F& sum : row) sum = as_float(splat(int32_t{0}));
  }
  const auto load_codes = [](const void* p) { return load_words<8>(static_cast<const uint8_t*>(p)); };
  const auto multiply = [&](const uint8_t* const(&from)[R]) {
    F codes[R];
    for (int r = 0; r < R; ++r) codes[r] = as_float(load_codes(from[r]));
    for (int j = 0; j < M; ++j) {
      const I x_codes = load_codes(x + j * a.x_stride);
      for (int r = 0; r < R; ++r) {
        sums[r][j] = hold(as_float(dot_bytes<true>(as_int(sums[r][j]), as_int(codes[r]), x_codes)));
      }
    }
  };
  int64_t c = 0;
  for (; c + kVectorColumns <= a.columns; c += kVectorColumns) {
    multiply(w);
    for (int r = 0; r < R; ++r) {
      prefetch(w[r] + kAheadBytes);
      w[r] += kVectorColumns;
    }
    x += kVectorColumns;
  }
  if (c < a.columns) {  // the last columns are copied to where they may be overread; x is zero there
    uint8_t tails[R][kVectorColumns] = {};
    const uint8_t* from[R];
    for (int r = 0; r < R; ++r) {
      std::memcpy(tails[r], w[r], static_cast<size_t>(a.columns - c));
      from[r] = tails[r];
    }
    multiply(from);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < M; ++j) totals[r * M + j] = as_int(sums[r][j]);
  }
}

// Sums of the lanes of kLanes vectors.
BITFOLD_SIMD void add_lanes(const I* vectors, int32_t* to) {
  F rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = as_float(vectors[i]);
  store_int(to, as_int(across(rows, [](F a, F b) { return as_float(add(as_int(a), as_int(b))); })));
}

// R rows at a time that lie far apart: each of R runs goes on from row to row in memory, and a core looks ahead in all.
template <int R, int M>
void multiply_runs(const RowsInt8Products& a) {
  constexpr int kVectors = R * M, kSteps = kVectors < kLanes ? kLanes / kVectors : 1;  // a whole number of add_lanes
  static_assert(kVectors * kSteps % kLanes == 0);
  const int64_t run = ceil_div(a.rows, R);
  for (int64_t top = 0; top < run; top += kSteps) {
    I totals[kVectors * kSteps];
    for (int step = 0; step < kSteps; ++step) {
      const uint8_t* rows[R];  // past the end the last row is taken again; what comes of that is not used
      for (int r = 0; r < R; ++r)
        rows[r] = a.w + smaller(r * run + smaller(top + step, run - 1), a.rows - 1) * a.w_stride;
      multiply_few<R, M>(rows, a, totals + step * kVectors);
    }
    alignas(64) int32_t sums[kVectors * kSteps];
    for (int i = 0; i < kVectors * kSteps; i += kLanes) add_lanes(totals + i, sums + i);
    for (int step = 0; step < kSteps && top + step < run; ++step) {
      for (int r = 0; r < R && r * run + top + step < a.rows; ++r) {
        for (int j = 0; j < smaller(M, a.m); ++j)
          a.sums[j * a.sum_stride + r * run + top + step] = sums[step * kVectors + r * M + j];
      }
    }
  }
}

void few(const RowsInt8Products& a) {
  if (a.m == 1) return multiply_runs<4, 1>(a);
  if (a.m == 2) return multiply_runs<4, 2>(a);
  if (a.m <= 4) return multiply_runs<4, 4>(a);
  return multiply_runs<2, 8>(a);
}

// ---- many rows of x ----

// Vectors of rows of the weight, and rows of x, in a tile: sums and operands fit the registers.
inline constexpr int kTileVectors = kLanes == 16 ? 2 : 1;
inline constexpr int kTileOfX = kLanes == 16 ? 12 : 8;
inline constexpr int kTile = kTileVectors * kLanes;
static_assert(kRowsInt8Block % kTile == 0);
// Columns that are open at a time: the panel stays in the first cache beside the group of x that goes by.
inline constexpr int64_t kOpenColumns = 512;

using Panel8 = int32_t[kOpenColumns / 4][kTile];

// Puts columns [begin, begin + columns) of kLanes rows from `row` on into lanes; rows and columns that there are not
// are zeros.
void open_vector(const RowsInt8Products& a, int64_t row, int64_t begin, int64_t columns, int vector, Panel8& panel) {
  const uint8_t* from = a.w + row * a.w_stride + begin;
  const bool whole = row + kLanes <= a.rows;
  for (int64_t c = 0; c < columns; c += 16) {
    const uint8_t* at = from + c;
    int64_t stride = a.w_stride;
    alignas(16) uint8_t copy[kLanes][16];
    if (!whole || c + 16 > columns) {
      std::memset(copy, 0, sizeof(copy));
      for (int64_t r = 0; r < smaller(kLanes, a.rows - row); ++r)
        std::memcpy(copy[r], at + r * stride, static_cast<size_t>(smaller(16, columns - c)));
      at = copy[0];
      stride = sizeof(copy[0]);
    }
    I v[4];
    for (int i = 0; i < 4; ++i) v[i] = load_quarters(at + i * stride, 4 * stride);
    transpose_quarters(v);
    for (int i = 0; i < 4; ++i) store_int(&panel[c / 4 + i][vector * kLanes], v[i]);
  }
}

BITFOLD_SIMD I splat_four(const void* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return splat(bytes);
}

// sums += X rows of x times the open columns; `quads` fours of them.
template <int X>
[[gnu::noinline]] void multiply_tile(const Panel8& panel, int64_t quads, const int8_t* x, int32_t* to, int64_t stride) {
  F sums[X][kTileVectors];  // whole numbers (see multiply_few)
  for (int j = 0; j < X; ++j) {
    for (int r = 0; r < kTileVectors; ++r) sums[j][r] = as_float(load_int(to + j * stride + r * kLanes));
  }
  for (int64_t q = 0; q < quads; ++q) {
    F w[kTileVectors];
    for (int r = 0; r < kTileVectors; ++r) w[r] = as_float(load_int(&panel[q][r * kLanes]));
    for (int j = 0; j < X; ++j) {
      const I four = splat_four(x + 4 * j);
      for (int r = 0; r < kTileVectors; ++r) {
        sums[j][r] = hold(as_float(dot_bytes<true>(as_int(sums[j][r]), as_int(w[r]), four)));
      }
    }
    x += 4 * kTileOfX;
  }
  for (int j = 0; j < X; ++j) {
    for (int r = 0; r < kTileVectors; ++r) store_int(to + j * stride + r * kLanes, as_int(sums[j][r]));
  }
}

template <int X = kTileOfX>
BITFOLD_SIMD void multiply_rows(const Panel8& panel, int64_t quads, const int8_t* x, int64_t m, int32_t* to,
                                int64_t stride) {
  if (m >= X) return multiply_tile<X>(panel, quads, x, to, stride);
  if constexpr (X > 1) multiply_rows<X - 1>(panel, quads, x, m, to, stride);
}

void many(const RowsInt8Products& a) {
  alignas(64) Panel8 panel;
  for (int64_t j = 0; j < a.m; ++j)
    std::memset(a.sums + j * a.sum_stride, 0, static_cast<size_t>(ceil_div(a.rows, kTile) * kTile) * sizeof(int32_t));
  for (int64_t row = 0; row < a.rows; row += kTile) {
    for (int64_t begin = 0; begin < a.columns; begin += kOpenColumns) {
      const int64_t columns = smaller(kOpenColumns, a.columns - begin);
      for (int v = 0; v < kTileVectors; ++v) open_vector(a, row + v * kLanes, begin, columns, v, panel);
      const uint8_t* ahead = a.w + (row + kTile) * a.w_stride + begin;
      for (int64_t j = 0; j < a.m; j += kTileOfX) {
        // The next tile's rows are asked for while these are multiplied, some with each group of x.
        for (int64_t r = j * kTile / a.m; r < smaller(kTile, (j + kTileOfX) * kTile / a.m); ++r) {
          for (int64_t line = 0; line < columns; line += 64) prefetch(ahead + r * a.w_stride + line);
        }
        multiply_rows(panel, ceil_div(columns, 4), a.x + j / kTileOfX * a.x_stride + begin * kTileOfX, a.m - j,
                      a.sums + j * a.sum_stride + row, a.sum_stride);
      }
    }
  }
}

constexpr RowsInt8Kernel kKernel{mark, round_row, few, many, scale, add_products, kTileOfX};

}  // namespace

void BITFOLD_ISA(rows_int8)(Kernels& kernels) { kernels.rows_int8 = &kKernel; }

}  // namespace bitfold::cpu
