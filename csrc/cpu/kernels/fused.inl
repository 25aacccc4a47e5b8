// Small batches: every packed weight is read once, decoded in registers, and multiplied with up to four rows of x
// there.
//
// The sum of one output is: per group, two vectors of partial sums over alternating lanes; their sum times the group's
// scale goes to a vector of totals; the totals are added up last. This order does not depend on how many rows x has.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

// A scale per row or matrix is applied to pieces of this many columns, so that long sums stay accurate.
constexpr int64_t kPiece = 1024;
static_assert(kPiece % kAlign == 0 && kAlign % (2 * kLanes) == 0);

// How a family's codes become lanes before the scale, which is meant for kUnit times the lanes.
template <int Row>
struct Stream;
template <>
struct Stream<kFp16> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
};
template <>
struct Stream<kBf16> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
};
template <>
struct Stream<kE5m2> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* p) { return load_e5m2(p); }
};
template <>
struct Stream<kE4m3> {
  static constexpr float kUnit = 256.0f;
  BITFOLD_SIMD static F at(const uint8_t* p) { return load_e4m3_small(p); }
};

// Whether a NaN is among the codes; encoding makes none.
template <int Row>
BITFOLD_SIMD bool lost_nan(const uint8_t* codes, int64_t count) {
  if constexpr (Row != kE4m3) return false;
  uint8_t found = 0;  // a byte of 0x7f or 0xff
  for (int64_t i = 0; i < count; ++i) found |= static_cast<uint8_t>((codes[i] & 0x7f) == 0x7f ? 1 : 0);
  return found != 0;
}

// R rows of the weight at once, so that enough sums are under way to hide the latency of an addition.
template <int Row, int M, int R>
BITFOLD_SIMD void multiply_rows(const FusedArgs& a, int first, int64_t row) {
  constexpr FormatRow kRow = kFormats[Row];
  constexpr int64_t kBytes = kRow.bits / 8;
  const int x_rows = fused_rows(a.m);
  const Weight& w = *a.w;
  const int64_t row_bytes = w.k * kBytes;
  const int64_t piece = w.format.group > 0 ? w.format.group : kPiece;
  const int64_t ahead = row + 2 * R <= w.n ? R * row_bytes : 0;
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * row_bytes;
  F totals[R][M];
  for (auto& total : totals) {
    for (F& lanes : total) lanes = splat(0.0f);
  }
  for (int64_t begin = 0; begin < w.k; begin += piece) {
    const int64_t stop = smaller(w.k, begin + piece);
    const int64_t group = w.format.group > 0 ? begin / w.format.group : 0;
    F even[R][M], odd[R][M];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) even[r][j] = odd[r][j] = splat(0.0f);
    }
    const auto step = [&](const uint8_t* from, int64_t from_stride, int64_t column) {
      const float* x = a.x + column * x_rows + first * kLanes;
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = from + r * from_stride;
        prefetch(at + ahead);
        const F w0 = Stream<Row>::at(at), w1 = Stream<Row>::at(at + kLanes * kBytes);
        for (int j = 0; j < M; ++j) {
          even[r][j] = fma(w0, load(x + j * kLanes), even[r][j]);
          odd[r][j] = fma(w1, load(x + (x_rows + j) * kLanes), odd[r][j]);
        }
      }
    };
    int64_t i = begin;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) step(codes + i * kBytes, row_bytes, i);
    if (i < stop) {  // the last columns: x is padded with zeros, the codes are copied to where they may be overread
      constexpr int64_t kTail = 2 * kLanes * kBytes;
      uint8_t tails[R * kTail] = {};
      const int64_t offset = i * kBytes;
      for (int r = 0; r < R; ++r) {
        std::memcpy(tails + r * kTail, codes + r * row_bytes + offset, static_cast<size_t>(row_bytes - offset));
      }
      step(tails, kTail, i);
    }
    for (int r = 0; r < R; ++r) {
      const F scale = splat(kRow.grid == Grid::Cast ? 1.0f : group_scale(w, row + r, group) * Stream<Row>::kUnit);
      for (int j = 0; j < M; ++j) totals[r][j] = fma(add(even[r][j], odd[r][j]), scale, totals[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const bool nan = lost_nan<Row>(codes + r * row_bytes, w.k);
    for (int j = 0; j < M; ++j) {
      const float sum = reduce_add(totals[r][j]);
      a.y[(first + j) * a.y_stride + row + r - a.row_begin] = nan ? std::bit_cast<float>(0x7fc00000u) : sum;
    }
  }
}

template <int Row, int M, int R>
void fused_range(const FusedArgs& a, int first) {
  int64_t row = a.row_begin;
  for (; row + R <= a.row_end; row += R) multiply_rows<Row, M, R>(a, first, row);
  for (; row < a.row_end; ++row) multiply_rows<Row, M, 1>(a, first, row);
}

template <int Row>
void fused(const FusedArgs& a) {
  int first = 0;
  for (; first + 4 <= a.m; first += 4) fused_range<Row, 4, 1>(a, first);
  if (first + 2 <= a.m) {
    fused_range<Row, 2, 2>(a, first);
    first += 2;
  }
  if (first < a.m) fused_range<Row, 1, 4>(a, first);
}

// Columns stay in order; nobody asks for sums.
void arrange(const float* x, int64_t k, int j, int rows, float* panel, float*) {
  float* to = panel + j * kLanes;
  for (int64_t c = 0; c < ceil_div(k, kAlign) * kAlign; c += kLanes, to += rows * kLanes) {
    if (c + kLanes <= k) {
      store(to, load(x + c));
    } else {
      store(to, splat(0.0f));
      if (c < k) std::memcpy(to, x + c, static_cast<size_t>(k - c) * sizeof(float));
    }
  }
}

template <int Row>
void fill(Kernels& kernels) {
  kernels.linear[Row] = {fused<Row>, arrange, nullptr, kAlign, kAlign};
}

}  // namespace

void BITFOLD_ISA(fused)(Kernels& kernels) {
  fill<kFp16>(kernels);
  fill<kBf16>(kernels);
  fill<kE4m3>(kernels);
  fill<kE5m2>(kernels);
}

}  // namespace bitfold::cpu
