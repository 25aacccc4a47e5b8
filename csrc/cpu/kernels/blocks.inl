// Products of GGUF's blocks: small batches, where every block is read once and multiplied in registers, and tiles for
// large ones.
//
// Codes are multiplied as they come out of a block (spans.hpp), four to a lane, so x is arranged likewise, once for all
// rows of the weight. A mask leaves one code of every lane where it lies, a power of two too large; x is as many times
// too small, which is exact. Products with codes and products with the step are apart:
//
//   sum of x w = step * (sum of x code - centre * sum of x) - (min - centre * step) * sum of x
//
// in which the first sum of x is over the columns of a lane, so that what cancels does so early, and the second over
// those of a step. `centre` is the type's zero point, or the middle of its codes where it has a minimum. The sum of one
// output runs over its vectors in order, lane by lane; the lanes are added up last. Other rows of x don't matter.
#include "cpu/kernels/spans.hpp"

namespace bitfold::cpu {
namespace {

template <int Row>
inline constexpr float kCentre = static_cast<float>(Span<Row>::kMin ? 1 << (kFormats[Row].bits - 1) : Span<Row>::kZero);

// x is kLift times itself, so that what a code is too large by makes it neither too large nor too small.
inline constexpr float kLift = 0x1p14f;
// fn.operator()<0>(), then <1>, and so on.
template <int Count, int First = 0, class Fn>
BITFOLD_SIMD void unroll(Fn fn) {
  if constexpr (First < Count) {
    fn.template operator()<First>();
    unroll<Count, First + 1>(fn);
  }
}
// Whether code `Step` of a lane, the bits `mask` of its byte, is brought down: as a number it would be negative.
constexpr bool comes_down(int mask, int step) { return step == 3 && mask >= 128; }
// What it is too large by.
constexpr float unit(int mask, int step) {
  return comes_down(mask, step) ? 1.0f : static_cast<float>(int64_t{1} << (8 * step + lowest_bit(mask)));
}
template <int Mask, int Step>
BITFOLD_SIMD F code_at(I v) {
  if constexpr (comes_down(Mask, Step)) return to_float(shift_right<24 + lowest_bit(Mask)>(v));
  else return to_float(bit_and(v, splat(int32_t{Mask << 8 * Step})));
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
        store(to, mul(lanes, splat(kLift / unit(S::mask(i), step))));
        to += rows * kLanes;
        sum = add(sum, lanes);
      }
      store(sums, mul(sum, splat(-kLift * kCentre<Row>)));
      sums += rows * kLanes;
    }
    float of_steps[kLanes] = {};
    for (int64_t i = 0; i < kSpan; ++i) of_steps[i / S::kSub] -= kLift * from[i];
    store(sums, load(of_steps));
    sums += rows * kLanes;
  }
}

// Columns that are multiplied at a time: x for them stays in the first cache. Rows whose totals wait there meanwhile.
template <int M>
inline constexpr int64_t kBlockColumns = 4096 / M;
// Blocks are asked for whole rows ahead, at least so many bytes.
inline constexpr int64_t kAheadBytes = 12288;

// Rows of the weight that share what is loaded of x: as many as there are registers for.
template <int M>
inline constexpr int kRowsAtOnce = kLanes == 16 && M > 1 ? 2 : 1;

// Spans [first, first + count) of R rows times M rows of x, added to totals[r][j].
template <int Row, int M, int R>
[[gnu::noinline]] void multiply_spans(const uint8_t* const (&rows)[R], int64_t first, int64_t count, int64_t ahead,
                                      const float* x, const float* x_sums, float* totals) {
  using S = Span<Row>;
  const Places<Row> places;
  F total[R][M];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < M; ++j) total[r][j] = load(totals + (r * M + j) * kLanes);
  }
  for (int64_t span = first; span < first + count; ++span) {
    I v[R][kVectors];
    F steps[R], mins[R];
    for (int r = 0; r < R; ++r) {
      prefetch_span<Row>(rows[r], span, ahead);
      const Place<Row> at = span_at<Row>(rows[r], span);
      S::bytes(at, v[r]);
      S::scales(at, &steps[r], &mins[r]);
    }
    unroll<kVectors>([&]<int Vector>() {
      F sum[R][M];
      for (int j = 0; j < M; ++j) {
        for (int r = 0; r < R; ++r) sum[r][j] = load(x_sums + j * kLanes);
      }
      unroll<4>([&]<int Step>() {
        F code[R];
        for (int r = 0; r < R; ++r) code[r] = code_at<S::mask(Vector), Step>(v[r][Vector]);
        for (int j = 0; j < M; ++j) {
          const F x_step = load(x + j * kLanes);
          for (int r = 0; r < R; ++r) sum[r][j] = fma(code[r], x_step, sum[r][j]);
        }
        x += M * kLanes;
      });
      for (int r = 0; r < R; ++r) {
        const F step = permute(steps[r], places.at[Vector]);
        for (int j = 0; j < M; ++j) total[r][j] = fma(sum[r][j], step, total[r][j]);
      }
      x_sums += M * kLanes;
    });
    if constexpr (S::kMin) {
      for (int r = 0; r < R; ++r) {
        const F rest = fma(steps[r], splat(-kCentre<Row>), mins[r]);
        for (int j = 0; j < M; ++j) total[r][j] = fma(rest, load(x_sums + j * kLanes), total[r][j]);
      }
    }
    x_sums += M * kLanes;
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < M; ++j) store(totals + (r * M + j) * kLanes, total[r][j]);
  }
}

template <int Row, int M>
void multiply(const FusedArgs& a) {
  constexpr int R = kRowsAtOnce<M>;
  constexpr int64_t kBlockSpans = kBlockColumns<M> / kSpan;
  static_assert(kBlockColumns<M> % kSpan == 0 && kFusedBlock % R == 0);
  const Weight& w = *a.w;
  const int64_t bytes = blocks_row_bytes<Row>(w.k), spans = w.k / kSpan;
  const int64_t ahead = ceil_div(kAheadBytes, bytes > 0 ? bytes : 1) * bytes;
  const auto x_at = [&](int64_t span) { return a.x + span * kXVectors * M * kLanes; };
  const auto sums_at = [&](int64_t span) { return a.x_sums + span * kSumVectors * M * kLanes; };
  for (int64_t top = a.row_begin; top < a.row_end; top += kFusedBlock) {
    const int64_t rows = smaller(a.row_end - top, kFusedBlock);
    alignas(64) float totals[kFusedBlock * M * kLanes];
    std::memset(totals, 0, sizeof(totals));
    // The last row is taken again where a block has no R rows left; what comes of that is not used.
    const auto row_blocks = [&](int64_t row) {
      return static_cast<const uint8_t*>(w.codes) + smaller(top + row, a.row_end - 1) * bytes;
    };
    for (int64_t span = 0; span < spans; span += kBlockSpans) {
      for (int64_t row = 0; row < rows; row += R) {
        const uint8_t* blocks[R];
        for (int r = 0; r < R; ++r) blocks[r] = row_blocks(row + r);
        multiply_spans<Row, M, R>(blocks, span, smaller(spans - span, kBlockSpans), ahead, x_at(span), sums_at(span),
                                  totals + row * M * kLanes);
      }
    }
    if (spans * kSpan < w.k) {
      for (int64_t row = 0; row < rows; row += R) {
        SpanCopy<Row> copies[R];
        const uint8_t* blocks[R];
        for (int r = 0; r < R; ++r) {
          const Place<Row> part = copies[r].span_in(row_blocks(row + r), w.k, spans);
          blocks[r] = reinterpret_cast<const uint8_t*>(part.block);
        }
        multiply_spans<Row, M, R>(blocks, 0, 1, 0, x_at(spans), sums_at(spans), totals + row * M * kLanes);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int j = 0; j < a.m; ++j) {
        const float sum = reduce_add(load(totals + (row * M + j) * kLanes));
        a.y[j * a.y_stride + top + row - a.row_begin] = sum * (1.0f / kLift);
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

// The floor's weights, as many times larger or smaller as x is the other.
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
      prefetch_span<Row>(row, c / kSpan, ahead);
      I v[kVectors];
      F steps, mins;
      S::bytes(at, v);
      S::scales(at, &steps, &mins);
      steps = mul(steps, splat(1.0f / kLift));
      if constexpr (S::kMin) mins = mul(mins, splat(1.0f / kLift));
      unroll<kVectors>([&]<int Vector>() {
        const F step = permute(steps, places.at[Vector]);
        F min = splat(0.0f);
        if constexpr (S::kMin) min = permute(mins, places.at[Vector]);
        unroll<4>([&]<int Step>() {
          constexpr float kUnit = unit(S::mask(Vector), Step);
          F value = code_at<S::mask(Vector), Step>(v[Vector]);
          if constexpr (S::kZero != 0) value = sub(value, splat(kUnit * static_cast<float>(S::kZero)));
          value = mul(step, value);
          if constexpr (S::kMin) value = sub(value, mul(min, splat(kUnit)));
          store(out, value);
          out += kTileRows * kLanes;
        });
      });
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
