// Columns of a row of GGUF's blocks, to fp32, with the floor's operations in the floor's order (block_value).
#include "cpu/kernels/spans.hpp"

namespace bitfold::cpu {
namespace {

// All columns of a span.
template <int Row, Stores To>
BITFOLD_SIMD void decode_whole(Place<Row> at, float* out) {
  using S = Span<Row>;
  I v[kVectors];
  codes_of(at, v);
  alignas(64) uint8_t codes[kSpan];
  for (int i = 0; i < kVectors; ++i) {
    int groups[kQuarters];
    for (int q = 0; q < kQuarters; ++q) groups[q] = S::group(i, q);
    store_quarters(codes, groups, v[i]);
  }
  F step_lanes, min_lanes;
  S::scales(at, &step_lanes, &min_lanes);
  alignas(64) float steps[kLanes], mins[kLanes];
  store(steps, step_lanes);
  if constexpr (S::kMin) store(mins, min_lanes);
  for (int g = 0; g < kGroups; ++g) {
    const F step = splat(steps[g * 16 / S::kSub]);
    for (int c = 16 * g; c < 16 * g + 16; c += kLanes) {
      F value = to_float(unpack<8, false>(codes + c));
      if constexpr (S::kZero != 0) value = sub(value, splat(static_cast<float>(S::kZero)));
      value = mul(step, value);
      if constexpr (S::kMin) value = sub(value, splat(mins[g * 16 / S::kSub]));
      put<To>(out + c, value);
    }
  }
}

// Blocks are asked for so many bytes ahead.
inline constexpr int64_t kAheadBytes = 4096;

template <int Row, Stores To>
BITFOLD_SIMD void decode_spans(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out) {
  const int64_t bytes = blocks_row_bytes<Row>(w.k);
  const uint8_t* blocks = static_cast<const uint8_t*>(w.codes) + row * bytes;
  for (int64_t i = begin; i < end;) {
    const int64_t span = i / kSpan, first = span * kSpan, stop = smaller(end, first + kSpan);
    if (i == first && stop == first + kSpan) {
      prefetch_span<Row>(blocks, span, kAheadBytes);
      decode_whole<Row, To>(span_at<Row>(blocks, span), out + (i - begin));
    } else {  // a part: all of it, aside
      float all[kSpan];
      SpanCopy<Row> copy;
      decode_whole<Row, Stores::Cached>(copy.span_in(blocks, w.k, span), all);
      std::memcpy(out + (i - begin), all + (i - first), static_cast<size_t>(stop - i) * sizeof(float));
    }
    i = stop;
  }
}

template <int Row>
void decode_span(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out, Stores stores) {
  if (stores == Stores::Cached) decode_spans<Row, Stores::Cached>(w, row, begin, end, out);
  else decode_spans<Row, Stores::PastCaches>(w, row, begin, end, out);
}

template <int Row = kQ4_0>
void fill(Kernels& kernels) {
  kernels.decode_span[Row] = decode_span<Row>;
  if constexpr (Row + 1 < kRowCount) fill<Row + 1>(kernels);
}

}  // namespace

void BITFOLD_ISA(decode_blocks)(Kernels& kernels) { fill(kernels); }

}  // namespace bitfold::cpu
