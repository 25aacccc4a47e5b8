// Products of GGUF's blocks: small batches, where every block is read once and multiplied in registers, and tiles for
// large ones.
//
// Codes are multiplied as they come out of a block (spans.hpp), four to a lane, so x is arranged likewise, once for all
// rows of the weight. A mask leaves one code of every lane, and what it is too large by (256 or 65536 times, where its
// byte lies) x is too small by, which is exact. Products with codes and products with the step are apart:
//
//   sum of x w = step * (sum of x code - centre * sum of x) - (min - centre * step) * sum of x
//
// in which the first sum of x is over the columns of a lane, so that what cancels does so early, and the second over
// those of a step. `centre` is the types' zero point, or the middle of their codes where they have a minimum. The sum
// of one output runs over its vectors in order, lane by lane; the lanes are added up last. Other rows of x don't
// matter.
#include "cpu/kernels/spans.hpp"

namespace bitfold::cpu {
namespace {

template <int Row>
inline constexpr float kCentre = static_cast<float>(Span<Row>::kMin ? 1 << (kFormats[Row].bits - 1) : Span<Row>::kZero);

// Step `step` of a vector: what a lane's code is multiplied by where it lies.
constexpr float unit(int step) { return step == 1 ? 256.0f : step == 2 ? 65536.0f : 1.0f; }
template <int Step>
BITFOLD_SIMD F code_at(I v) {
  if constexpr (Step == 3) return to_float(shift_right<24>(v));
  else return to_float(bit_and(v, splat(int32_t{255 << 8 * Step})));
}
// step.operator()<0>() to step.operator()<3>().
template <class Step>
BITFOLD_SIMD void each_step(Step step) {
  step.template operator()<0>();
  step.template operator()<1>();
  step.template operator()<2>();
  step.template operator()<3>();
}

// Of each span, in vectors: x, a vector for each step of each vector of codes; and sums, -centre times those of a
// lane's columns, one for each vector of codes, then those of each step, negative.
inline constexpr int kXVectors = 4 * kVectors;
inline constexpr int kSumVectors = kVectors + 1;
inline constexpr int kWord = 2;  // columns that have one sum, as far as the driver's buffers go
static_assert(kSumVectors * kLanes <= kSpan / kWord);

template <int Row>
void arrange(const float* x, int64_t k, int j, int rows, float* panel, float* sums) {
  using S = Span<Row>;
  I columns[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    int32_t lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = 16 * S::group(i, l / 4) + 4 * (l % 4);
    columns[i] = load_int(lanes);
  }
  float* to = panel + j * kLanes;
  sums += j * kLanes;
  for (int64_t c = 0; c < k; c += kSpan) {
    float padded[kSpan];
    const float* from = x + c;
    if (k - c < kSpan) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, from, static_cast<size_t>(k - c) * sizeof(float));
      from = padded;
    }
    for (int i = 0; i < kVectors; ++i) {
      F sum = splat(0.0f);
      for (int step = 0; step < 4; ++step) {
        const F lanes = gather(from + step, columns[i]);
        store(to, mul(lanes, splat(1.0f / unit(step))));
        to += rows * kLanes;
        sum = add(sum, lanes);
      }
      store(sums, mul(sum, splat(-kCentre<Row>)));
      sums += rows * kLanes;
    }
    float of_steps[kLanes] = {};
    for (int64_t i = 0; i < kSpan; ++i) of_steps[i / S::kSub] -= from[i];
    store(sums, load(of_steps));
    sums += rows * kLanes;
  }
}

// Columns that are multiplied at a time: x for them stays in the first cache. Rows whose totals wait there meanwhile.
template <int M>
inline constexpr int64_t kBlockColumns = 4096 / M;
// Blocks are asked for whole rows ahead, at least so many bytes.
inline constexpr int64_t kAheadBytes = 12288;

// Spans [first, first + count) of a row times M rows of x, added to totals[j].
template <int Row, int M>
[[gnu::noinline]] void multiply_spans(const uint8_t* row, int64_t first, int64_t count, int64_t ahead, const float* x,
                                      const float* x_sums, float* totals) {
  using S = Span<Row>;
  constexpr int64_t kBytes = kFormats[Row].block_bytes * kSpan / kFormats[Row].group;
  const Places<Row> places;
  F total[M];
  for (int j = 0; j < M; ++j) total[j] = load(totals + j * kLanes);
  for (int64_t span = first; span < first + count; ++span) {
    const Place<Row> at = span_at<Row>(row, span);
    for (int64_t byte = 0; byte < kBytes; byte += 64) prefetch(row + span * kBytes + ahead + byte);
    I v[kVectors];
    F steps, mins;
    S::codes(at, v);
    S::scales(at, &steps, &mins);
    for (int i = 0; i < kVectors; ++i) {
      F sum[M];
      for (int j = 0; j < M; ++j) sum[j] = load(x_sums + j * kLanes);
      each_step([&]<int Step>() {
        const F code = code_at<Step>(v[i]);
        for (int j = 0; j < M; ++j) sum[j] = fma(code, load(x + (Step * M + j) * kLanes), sum[j]);
      });
      const F step = permute(steps, places.at[i]);
      for (int j = 0; j < M; ++j) total[j] = fma(sum[j], step, total[j]);
      x += 4 * M * kLanes;
      x_sums += M * kLanes;
    }
    if constexpr (S::kMin) {
      const F rest = fma(steps, splat(-kCentre<Row>), mins);
      for (int j = 0; j < M; ++j) total[j] = fma(rest, load(x_sums + j * kLanes), total[j]);
    }
    x_sums += M * kLanes;
  }
  for (int j = 0; j < M; ++j) store(totals + j * kLanes, total[j]);
}

template <int Row, int M>
void multiply(const FusedArgs& a) {
  static_assert(kBlockColumns<M> % kSpan == 0);
  constexpr int64_t kBlockSpans = kBlockColumns<M> / kSpan;
  const Weight& w = *a.w;
  const int64_t bytes = blocks_row_bytes<Row>(w.k), spans = w.k / kSpan;
  const int64_t ahead = ceil_div(kAheadBytes, bytes > 0 ? bytes : 1) * bytes;
  const auto* blocks = static_cast<const uint8_t*>(w.codes);
  const auto x_at = [&](int64_t span) { return a.x + span * kXVectors * M * kLanes; };
  const auto sums_at = [&](int64_t span) { return a.x_sums + span * kSumVectors * M * kLanes; };
  for (int64_t top = a.row_begin; top < a.row_end; top += kFusedBlock) {
    const int64_t rows = smaller(a.row_end - top, kFusedBlock);
    alignas(64) float totals[kFusedBlock * M * kLanes];
    std::memset(totals, 0, sizeof(totals));
    for (int64_t span = 0; span < spans; span += kBlockSpans) {
      for (int64_t row = 0; row < rows; ++row) {
        multiply_spans<Row, M>(blocks + (top + row) * bytes, span, smaller(spans - span, kBlockSpans), ahead,
                               x_at(span), sums_at(span), totals + row * M * kLanes);
      }
    }
    if (spans * kSpan < w.k) {
      for (int64_t row = 0; row < rows; ++row) {
        SpanCopy<Row> copy;
        const auto* part =
            reinterpret_cast<const uint8_t*>(copy.span_in(blocks + (top + row) * bytes, w.k, spans).block);
        multiply_spans<Row, M>(part, 0, 1, 0, x_at(spans), sums_at(spans), totals + row * M * kLanes);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int j = 0; j < a.m; ++j) {
        a.y[j * a.y_stride + top + row - a.row_begin] = reduce_add(load(totals + (row * M + j) * kLanes));
      }
    }
  }
}

template <int Row>
void fused(const FusedArgs& a) {
  if (a.m == 1) return multiply<Row, 1>(a);
  if (a.m == 2) return multiply<Row, 2>(a);
  if (a.m <= 4) return multiply<Row, 4>(a);
  return multiply<Row, 8>(a);
}

// The floor's weights, those of steps 1 and 2 as many times larger as x is smaller there.
template <int Row>
void decode_tile(const Weight& w, int64_t first, int rows, int64_t begin, int64_t end, float* tile, float*) {
  using S = Span<Row>;
  const Places<Row> places;
  const int64_t bytes = blocks_row_bytes<Row>(w.k);
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(w.codes) + (first + r) * bytes;
    // The rows of the next tile are asked for while these are decoded.
    const int64_t ahead = first + r + kTileRows < w.n ? kTileRows * bytes : 0;
    float* out = tile + r * kLanes;
    for (int64_t c = begin; c < end; c += kSpan) {
      SpanCopy<Row> copy;
      const Place<Row> at = copy.span_in(row, w.k, c / kSpan);
      const uint8_t* from = row + c / kFormats[Row].group * kFormats[Row].block_bytes;
      for (int64_t byte = 0; byte < kFormats[Row].block_bytes * kSpan / kFormats[Row].group; byte += 64) {
        prefetch(from + ahead + byte);
      }
      I v[kVectors];
      F steps, mins;
      S::codes(at, v);
      S::scales(at, &steps, &mins);
      for (int i = 0; i < kVectors; ++i) {
        const F step = permute(steps, places.at[i]);
        F min = splat(0.0f);
        if constexpr (S::kMin) min = permute(mins, places.at[i]);
        each_step([&]<int Step>() {
          F value = code_at<Step>(v[i]);
          if constexpr (S::kZero != 0) value = sub(value, splat(unit(Step) * static_cast<float>(S::kZero)));
          value = mul(step, value);
          if constexpr (S::kMin) value = sub(value, mul(min, splat(unit(Step))));
          store(out, value);
          out += kTileRows * kLanes;
        });
      }
    }
  }
}

template <int Row = kQ4_0>
void fill(Kernels& kernels) {
  kernels.linear[Row] = {fused<Row>, arrange<Row>, decode_tile<Row>, kSpan, kWord};
  if constexpr (Row + 1 < kRowCount) fill<Row + 1>(kernels);
}

}  // namespace

void BITFOLD_ISA(blocks)(Kernels& kernels) { fill(kernels); }

}  // namespace bitfold::cpu
