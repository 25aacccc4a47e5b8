// Products of GGUF's blocks with activations of 8 bits (docs/gguf-blocks.md, "Activations of 8 bits"), and of 16 bits,
// which are two bytes.
//
// A tile of rows is opened a block at a time into panels (panels.hpp), and those are multiplied with all rows of x
// while they are in the first cache: a vector of the panel holds four columns of kLanes rows, and meets four columns of
// one row of x in all lanes. Whatever the number of rows, one output is one lane, and its sum runs over sub-blocks and
// blocks in the order of their columns; sums within a sub-block are whole numbers. So every instruction set gives the
// same bits, and m and the cuts between threads don't matter: no operation here may be contracted or reordered.
#include "cpu/kernels/panels.hpp"

namespace bitfold::cpu {
namespace {

// A block of a row of x: x is about codes * step. A code is one byte, or two: 256 times the first, and the second.
template <int Row, int Bytes>
struct Quantized {
  using P = Panel<Row>;
  static constexpr bool kPairs = kLarge<Row> && Packed<Row>::kMin;
  static constexpr float kMost = Bytes == 1 ? 127 : 127 * 256 + 127;
  float step;
  // Of the codes of each sub-block: their sum times -kZero, or with minima the sum, as pairs of halves where the minima
  // are so too.
  int32_t sums[Bytes][kPairs ? P::kSubs / 2 : P::kSubs];
  int8_t codes[Bytes][P::kColumns];
};

// What whole numbers of each byte of a code are together.
template <int Bytes>
BITFOLD_SIMD I join_bytes(const I (&parts)[Bytes]) {
  if constexpr (Bytes == 1) return parts[0];
  else return add(shift_left<8>(parts[0]), parts[1]);
}

// What is smaller everywhere in a block counts as zero: 127 over it would not be finite, or 32639.
inline constexpr float kSmallestBlock = std::bit_cast<float>(uint32_t{127 - 100} << 23);  // 2^-100

template <int Row, int Bytes>
BITFOLD_SIMD void quantize_block(const float* x, Quantized<Row, Bytes>& to) {
  using P = Panel<Row>;
  using Q = Quantized<Row, Bytes>;
  F most = splat(0.0f), odd = splat(0.0f);
  for (int c = 0; c < P::kColumns; c += kLanes) {
    const F v = load(x + c);
    most = max(most, abs(v));
    odd = add(odd, mul(v, splat(0.0f)));  // NaN where v is none or infinite
  }
  const float largest = reduce_max(most);
  const bool finite = reduce_add(odd) == 0.0f;
  if (!finite || largest < kSmallestBlock) {
    std::memset(&to, 0, sizeof(to));
    if (!finite) to.step = std::bit_cast<float>(0x7fc00000u);
    return;
  }
  to.step = largest / Q::kMost;
  const F inverse = splat(Q::kMost / largest);
  const auto put = [&](int byte, int c, I codes) {
    store_bytes(reinterpret_cast<uint8_t*>(to.codes[byte] + c), bit_and(codes, splat(int32_t{255})));
  };
  for (int c = 0; c < P::kColumns; c += kLanes) {
    const I codes = to_int(round_even(mul(load(x + c), inverse)));
    if constexpr (Bytes == 2) put(0, c, shift_right<8>(add(codes, splat(int32_t{128}))));
    put(Bytes - 1, c, codes);
  }
  constexpr int kSub = Packed<Row>::kSub, kZero = Packed<Row>::kZero;
  for (int byte = 0; byte < Bytes; ++byte) {
    auto* halves = reinterpret_cast<int16_t*>(to.sums[byte]);
    for (int j = 0; j < P::kSubs; ++j) {
      int32_t sum = 0;
      for (int c = j * kSub; c < (j + 1) * kSub; ++c) sum += to.codes[byte][c];
      if constexpr (Q::kPairs) halves[min_place(j)] = static_cast<int16_t>(sum);
      else to.sums[byte][j] = Packed<Row>::kMin ? sum : -kZero * sum;
    }
  }
}

template <int Row, int Bytes>
void quantize(const float* x, int64_t k, int64_t j, int64_t m, void* to) {
  auto* blocks = static_cast<Quantized<Row, Bytes>*>(to);
  for (int64_t b = 0; b < k / Panel<Row>::kColumns; ++b) {
    quantize_block<Row, Bytes>(x + b * Panel<Row>::kColumns, blocks[b * m + j]);
  }
}

// ---- tiles: R vectors of rows times X rows of x ----

// Rows of a tile and of x, so that sums, totals and operands fit the registers.
inline constexpr int kTileVectors = kLanes == 16 ? 2 : 1;
template <int Bytes>
inline constexpr int kTileOfX = kLanes == 16 ? 6 : 3;
template <>
inline constexpr int kTileOfX<2> = 4;
inline constexpr int kTile = kTileVectors * kLanes;
static_assert(kInt8Rows % kTile == 0);
// Blocks that are open at a time.
template <int Row>
inline constexpr int kOpen = kLarge<Row> ? 1 : 8;

BITFOLD_SIMD I splat_four(const void* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return splat(bytes);
}

// Products of sub-block `sub` with its zero point, whole numbers.
template <int Row, int Bytes, int R, int X>
BITFOLD_SIMD void multiply_sub(const Panel<Row>* const (&panels)[R], const Quantized<Row, Bytes>* x, int sub,
                               I (&sums)[R][X]) {
  constexpr int kSub = Packed<Row>::kSub;
  I parts[R][X][Bytes];
  for (int j = 0; j < X; ++j) {
    for (int byte = 0; byte < Bytes; ++byte) {
      const I start = Packed<Row>::kZero != 0 ? splat(x[j].sums[byte][sub]) : splat(int32_t{0});
      for (int r = 0; r < R; ++r) parts[r][j][byte] = start;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kSub; c += 4) {
    I w[R];
    for (int r = 0; r < R; ++r) w[r] = load_int(panels[r]->codes[(sub * kSub + c) / 4]);
    for (int j = 0; j < X; ++j) {
      for (int byte = 0; byte < Bytes; ++byte) {
        const I four = splat_four(x[j].codes[byte] + sub * kSub + c);
        for (int r = 0; r < R; ++r) parts[r][j][byte] = dot_bytes<Packed<Row>::kWide>(parts[r][j][byte], w[r], four);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < X; ++j) sums[r][j] = join_bytes(parts[r][j]);
  }
}

// A sum of products times the scale of the weight's block and the step of x's. Steps of 16 bits are small enough for
// their product with a small scale to be below 2^-126, where digits get lost.
template <int Bytes>
BITFOLD_SIMD F scaled(F sum, F d, F step) {
  if constexpr (Bytes == 1) return mul(sum, mul(d, step));
  else return mul(mul(sum, d), step);
}

// y += a block of 256 columns. With 8 bits, products of a scale and a sum of products are exact in fp32.
template <int Row, int Bytes, int R, int X>
BITFOLD_SIMD void multiply_large(const Panel<Row>* const (&panels)[R], const Quantized<Row, Bytes>* x, float* y,
                                 int64_t y_stride) {
  using P = Panel<Row>;
  F totals[R][X];
  for (int sub = 0; sub < P::kSubs; ++sub) {
    I sums[R][X];
    multiply_sub<Row, Bytes, R, X>(panels, x, sub, sums);
    for (int r = 0; r < R; ++r) {
      const F scale = load(panels[r]->scales[sub]);
      for (int j = 0; j < X; ++j) {
        const F sum = to_float(sums[r][j]);
        totals[r][j] = sub == 0 ? mul(sum, scale) : fma(sum, scale, totals[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const F d = load(panels[r]->d);
    for (int j = 0; j < X; ++j) {
      const F step = splat(x[j].step);
      F value = scaled<Bytes>(totals[r][j], d, step);
      if constexpr (Packed<Row>::kMin) {
        I mins[Bytes];
        for (int byte = 0; byte < Bytes; ++byte) {
          mins[byte] = splat(int32_t{0});
          for (int pair = 0; pair < P::kMinPairs; ++pair) {
            mins[byte] = dot_pairs(mins[byte], load_int(panels[r]->mins[pair]), splat(x[j].sums[byte][pair]));
          }
        }
        value = sub(value, scaled<Bytes>(to_float(join_bytes(mins)), load(panels[r]->m), step));
      }
      float* at = y + j * y_stride + r * kLanes;
      store(at, add(load(at), value));
    }
  }
}

// y += `count` blocks of 32 columns.
template <int Row, int Bytes, int R, int X>
BITFOLD_SIMD void multiply_small(const Panel<Row>* panels, int count, const Quantized<Row, Bytes>* x, int64_t x_stride,
                                 float* y, int64_t y_stride) {
  F totals[R][X];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < X; ++j) totals[r][j] = load(y + j * y_stride + r * kLanes);
  }
  for (int b = 0; b < count; ++b) {
    const Panel<Row>* open[R];
    for (int r = 0; r < R; ++r) open[r] = panels + r * kOpen<Row> + b;
    I sums[R][X];
    multiply_sub<Row, Bytes, R, X>(open, x, 0, sums);
    for (int r = 0; r < R; ++r) {
      const F d = load(open[r]->d);
      for (int j = 0; j < X; ++j) {
        const F step = splat(x[j].step);
        F value = scaled<Bytes>(to_float(sums[r][j]), d, step);
        if constexpr (Packed<Row>::kMin) {
          I all[Bytes];
          for (int byte = 0; byte < Bytes; ++byte) all[byte] = splat(x[j].sums[byte][0]);
          value = add(value, scaled<Bytes>(to_float(join_bytes(all)), load(open[r]->m), step));
        }
        totals[r][j] = add(totals[r][j], value);
      }
    }
    x += x_stride;
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < X; ++j) store(y + j * y_stride + r * kLanes, totals[r][j]);
  }
}

template <int Row, int Bytes, int X>
[[gnu::noinline]] void multiply_tile(const Panel<Row>* panels, int count, const Quantized<Row, Bytes>* x,
                                     int64_t x_stride, float* y, int64_t y_stride) {
  if constexpr (kLarge<Row>) {
    const Panel<Row>* open[kTileVectors];
    for (int r = 0; r < kTileVectors; ++r) open[r] = panels + r * kOpen<Row>;
    multiply_large<Row, Bytes, kTileVectors, X>(open, x, y, y_stride);
  } else {
    multiply_small<Row, Bytes, kTileVectors, X>(panels, count, x, x_stride, y, y_stride);
  }
}

// All rows of x with the open panels, kTileOfX at a time.
template <int Row, int Bytes, int X = kTileOfX<Bytes>>
BITFOLD_SIMD void multiply_rows(const Panel<Row>* panels, int count, const Quantized<Row, Bytes>* x, int64_t m,
                                int64_t j, float* y, int64_t y_stride) {
  for (; j + X <= m; j += X) multiply_tile<Row, Bytes, X>(panels, count, x + j, m, y + j * y_stride, y_stride);
  if constexpr (X > 1) multiply_rows<Row, Bytes, X - 1>(panels, count, x, m, j, y, y_stride);
}

// ---- all of it ----

// Opens blocks [first, first + count) of kLanes rows from `row` on, those past the last as if they were zero.
template <int Row>
BITFOLD_SIMD void open_blocks(const Weight& w, int64_t row, int64_t first, int count, const uint8_t* ahead,
                              Panel<Row>* panels) {
  constexpr int64_t kBytes = sizeof(Block<Row>);
  const int64_t bytes = blocks_row_bytes<Row>(w.k);
  const uint8_t* blocks = static_cast<const uint8_t*>(w.codes) + row * bytes + first * kBytes;
  uint8_t copy[kLanes][kOpen<Row> * kBytes];
  int64_t stride = bytes;
  if (row + kLanes > w.n) {
    std::memset(copy, 0, sizeof(copy));
    for (int64_t r = 0; r < w.n - row; ++r) {
      std::memcpy(copy[r], blocks + r * bytes, static_cast<size_t>(count * kBytes));
    }
    blocks = copy[0];
    stride = sizeof(copy[0]);
  }
  for (int b = 0; b < count; ++b) {
    Packed<Row>::open({blocks + b * kBytes, stride, ahead + b * kLanes * kBytes}, panels[b]);
  }
}

template <int Row, int Bytes>
void multiply(const Int8Args& a) {
  const Weight& w = *a.w;
  constexpr int64_t kBytes = sizeof(Block<Row>);
  const int64_t blocks = w.k / Panel<Row>::kColumns, bytes = blocks_row_bytes<Row>(w.k);
  const auto* x = static_cast<const Quantized<Row, Bytes>*>(a.x);
  for (int64_t j = 0; j < a.m; ++j) {
    std::memset(a.y + j * a.y_stride, 0,
                static_cast<size_t>(ceil_div(a.row_end - a.row_begin, kTile) * kTile) * sizeof(float));
  }
  Panel<Row> panels[kTileVectors][kOpen<Row>];
  for (int64_t row = a.row_begin; row < a.row_end; row += kTile) {
    // The rows of the next tile lie behind these: they are asked for in order while these are read.
    const uint8_t* ahead = static_cast<const uint8_t*>(w.codes) + (row + kTile) * bytes;
    for (int64_t b = 0; b < blocks; b += kOpen<Row>) {
      const auto count = static_cast<int>(smaller(kOpen<Row>, blocks - b));
      for (int r = 0; r < kTileVectors; ++r) {
        open_blocks<Row>(w, row + r * kLanes, b, count, ahead, panels[r]);
        ahead += kLanes * count * kBytes;
      }
      multiply_rows<Row, Bytes>(panels[0], count, x + b * a.m, a.m, 0, a.y + (row - a.row_begin), a.y_stride);
    }
  }
}

template <int Row, int Bytes>
constexpr Int8Kernel kernel() {
  return {quantize<Row, Bytes>, multiply<Row, Bytes>, sizeof(Quantized<Row, Bytes>)};
}
template <int Row = kQ4_0>
void fill(Kernels& kernels) {
  kernels.int8[Row] = kernel<Row, 1>();
  if constexpr (kOneDot) kernels.int16[Row] = kernel<Row, 2>();
  if constexpr (Row + 1 < kRowCount) fill<Row + 1>(kernels);
}

}  // namespace

void BITFOLD_ISA(int8)(Kernels& kernels) { fill(kernels); }

}  // namespace bitfold::cpu
