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
static_assert(kPiece % kFusedAlign == 0 && kFusedAlign % (2 * kLanes) == 0);

// How a family's codes become lanes before the scale.
template <int Row>
struct Stream {
  static constexpr FormatRow kRow = kFormats[Row];
  Values<Row> values;
  BITFOLD_SIMD F at(const uint8_t* row, int64_t i) const {
    return values(unpack<kRow.bits, kRow.high_first>(row + i * kRow.bits / 8));
  }
};
template <>
struct Stream<kFp16> {
  BITFOLD_SIMD F at(const uint8_t* row, int64_t i) const {
    return load_half(reinterpret_cast<const uint16_t*>(row) + i);
  }
};
template <>
struct Stream<kBf16> {
  BITFOLD_SIMD F at(const uint8_t* row, int64_t i) const {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  }
};

template <int Row, int M>
void fused_rows(const FusedArgs& a, int first) {
  constexpr FormatRow kRow = kFormats[Row];
  const Weight& w = *a.w;
  const int64_t row_bytes = ceil_div(w.k * kRow.bits, 8);
  const int64_t group_size = w.format.group;
  const int64_t piece = group_size > 0 ? group_size : kPiece;
  Stream<Row> stream;
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * row_bytes;
    F totals[M];
    for (int j = 0; j < M; ++j) totals[j] = splat(0.0f);
    for (int64_t begin = 0; begin < w.k; begin += piece) {
      const int64_t stop = smaller(w.k, begin + piece);
      F even[M], odd[M];
      for (int j = 0; j < M; ++j) even[j] = odd[j] = splat(0.0f);
      float scale = 1.0f;
      if constexpr (kRow.grid != Grid::Cast) {
        const int64_t group = group_size > 0 ? begin / group_size : 0;
        scale = group_scale(w, row, group);
        stream.values.set_zero(group_zero(w, row, group));
      }
      const auto step = [&](const uint8_t* from, int64_t from_column, int64_t column) {
        const F w0 = stream.at(from, from_column), w1 = stream.at(from, from_column + kLanes);
        for (int j = 0; j < M; ++j) {
          const float* x = a.x + (first + j) * a.x_stride + column;
          even[j] = fma(w0, load(x), even[j]);
          odd[j] = fma(w1, load(x + kLanes), odd[j]);
        }
      };
      int64_t i = begin;
      for (; i + 2 * kLanes <= stop; i += 2 * kLanes) step(codes, i, i);
      if (i <
          stop) {  // the row's last columns: x is padded with zeros, the codes are copied to where they may be overread
        uint8_t tail[2 * kLanes * 2] = {};
        const int64_t offset = i * kRow.bits / 8;
        std::memcpy(tail, codes + offset, static_cast<size_t>(row_bytes - offset));
        step(tail, 0, i);
      }
      for (int j = 0; j < M; ++j) totals[j] = fma(add(even[j], odd[j]), splat(scale), totals[j]);
    }
    for (int j = 0; j < M; ++j) a.y[(first + j) * a.y_stride + row - a.row_begin] = reduce_add(totals[j]);
  }
}

template <int Row>
void fused(const FusedArgs& a) {
  int first = 0;
  for (; first + 4 <= a.m; first += 4) fused_rows<Row, 4>(a, first);
  if (first + 2 <= a.m) {
    fused_rows<Row, 2>(a, first);
    first += 2;
  }
  if (first < a.m) fused_rows<Row, 1>(a, first);
}

}  // namespace

void BITFOLD_ISA(fused)(Kernels& kernels) {
  kernels.fused[kFp16] = fused<kFp16>;
  kernels.fused[kBf16] = fused<kBf16>;
  kernels.fused[kE4m3] = fused<kE4m3>;
  kernels.fused[kE5m2] = fused<kE5m2>;
  kernels.fused[kInt8] = fused<kInt8>;
  kernels.fused[kInt4] = fused<kInt4>;
  kernels.fused[kInt3] = fused<kInt3>;
  kernels.fused[kInt2] = fused<kInt2>;
  kernels.fused[kNf4] = fused<kNf4>;
  kernels.fused[kFp4] = fused<kFp4>;
}

}  // namespace bitfold::cpu
