// The packed KV cache. Codes are columns in lanes and rows one after the other, for keys and for values, so that one
// product serves both: no sum is ever taken across lanes, and each code becomes a float once for up to kRows rows.
#include "cpu/isa.hpp"
#include "cpu/kv.hpp"

namespace bitfold::cpu {
namespace {

constexpr int kRows = 4;                        // whose sums are held in registers
constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of columns, beside one another

constexpr int64_t kAhead = 4096;  // bytes
template <int Source>
constexpr int64_t kBits = Source == kKvFloats ? 32 : kKvFormats[Source % kKvFormatCount].bits;

// kLanes numbers from column c of a row on; they are meant times kUnit.
template <int Source>
struct Codes;
template <>
struct Codes<static_cast<int>(KvFormat::Int8)> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* row, int64_t c) { return to_float(unpack<8, false>(row + c)); }
};
template <>
struct Codes<static_cast<int>(KvFormat::Fp8)> {
  static constexpr float kUnit = 256.0f;
  BITFOLD_SIMD static F at(const uint8_t* row, int64_t c) { return load_e4m3_small(row + c); }
};
template <>
struct Codes<static_cast<int>(KvFormat::Int4)> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* row, int64_t c) { return to_float(unpack<4, false>(row + c / 2)); }
};
template <>
struct Codes<kKvFloats> {
  static constexpr float kUnit = 1.0f;
  BITFOLD_SIMD static F at(const uint8_t* row, int64_t c) { return load(reinterpret_cast<const float*>(row) + c); }
};

template <int Source, int M, int V, bool Ahead>
BITFOLD_SIMD void product_tile(const KvProduct& p, int64_t r, int64_t c) {
  F sums[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sums[m][v] = splat(0.0f);
  }
  const auto* row = static_cast<const uint8_t*>(p.codes);
  const float* factors = p.factors + r * p.factor_stride;
  for (int64_t l = 0; l < p.depth; ++l, row += p.code_stride) {
    if constexpr (Ahead) {
      prefetch(row + c * kBits<Source> / 8 + kAhead);
      if (l % 16 == 0) prefetch_page(row);
    }
    F codes[V];
    for (int v = 0; v < V; ++v) codes[v] = Codes<Source>::at(row, c + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const F factor = splat(factors[m * p.factor_stride + l]);
      for (int v = 0; v < V; ++v) sums[m][v] = fma(factor, codes[v], sums[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float* to = p.sums + (r + m) * p.sum_stride + c + v * kLanes;
      store(to, fma(sums[m][v], splat(Codes<Source>::kUnit), load(to)));
    }
  }
}

template <int Source, int M, bool Ahead>
BITFOLD_SIMD void product_rows(const KvProduct& p, int64_t r) {
  int64_t c = 0;
  for (; c + kVectors * kLanes <= p.columns; c += kVectors * kLanes) product_tile<Source, M, kVectors, Ahead>(p, r, c);
  for (; c < p.columns; c += kLanes) product_tile<Source, M, 1, Ahead>(p, r, c);
}

// The first rows also ask for the codes that come next: blocks lie one after the other.
template <int Source>
void product(const KvProduct& p) {
  constexpr bool kCodes = Source != kKvFloats;
  int64_t r = 0;
  if (p.rows >= kRows) product_rows<Source, kRows, kCodes>(p, r);
  for (r = p.rows >= kRows ? kRows : 0; r + kRows <= p.rows; r += kRows) product_rows<Source, kRows, false>(p, r);
  if (r + 2 <= p.rows) {
    product_rows<Source, 2, kCodes>(p, r);
    r += 2;
  }
  if (r < p.rows) product_rows<Source, 1, kCodes>(p, r);
}

float fold(const KvFold& f) {
  F sums = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= f.count; i += kLanes) {
    const F x = load(f.x + i);
    store(f.out + i, mul(x, load(f.steps + i)));
    if (f.offsets != nullptr) sums = fma(x, load(f.offsets + i), sums);
  }
  float sum = reduce_add(sums);
  for (; i < f.count; ++i) {
    f.out[i] = f.x[i] * f.steps[i];
    if (f.offsets != nullptr) sum += f.x[i] * f.offsets[i];
  }
  return sum;
}

// Of x <= 0, to 2e-7 of itself; what is below e^-87 is 0, NaN is NaN. With x = k ln 2 + r, e^x = 2^k e^r.
BITFOLD_SIMD F exponential(F x) {
  const F least = splat(-87.0f);
  const F k = round_even(mul(max(x, least), splat(1.44269504f)));
  const F r = fma(k, splat(-1.90821493e-10f), fma(k, splat(-0.693147182f), x));
  F sum = splat(1.0f / 5040);
  for (const float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = fma(sum, r, splat(next));
  const F power = as_float(shift_left<23>(add(to_int(k), splat(127))));
  return select(greater(least, x), splat(0.0f), mul(sum, power));
}

KvSoftmaxSum softmax(const KvSoftmax& s) {
  F largest = splat(-3.40282347e38f);
  for (int64_t i = 0; i < s.count; i += kLanes) largest = max(load(s.x + i), largest);
  const float most = reduce_max(largest);
  F sums = splat(0.0f);
  for (int64_t i = 0; i < s.count; i += kLanes) {
    const F weight = exponential(sub(load(s.x + i), splat(most)));
    store(s.x + i, weight);
    sums = add(sums, weight);
  }
  return {most, reduce_add(sums)};
}

struct Extent {
  float low, high;
  bool finite;
};

BITFOLD_SIMD Extent extent(const KvQuantize& q) {
  F low = load(q.x), high = low, none = splat(0.0f);
  for (int64_t i = 0; i < q.count; i += kLanes) {
    const F x = load(q.x + i);
    low = min(x, low);
    high = max(x, high);
    none = fma(x, splat(0.0f), none);  // NaN where x is not finite
  }
  return {reduce_min(low), reduce_max(high), reduce_add(none) == 0.0f};
}

template <int Source>
KvStep quantize(const KvQuantize& q) {
  constexpr KvFormatRow kRow = kKvFormats[Source];
  const Extent range = extent(q);
  const float largest = range.high > -range.low ? range.high : -range.low;
  const float spread = kRow.offsets ? range.high - range.low : largest;
  const float step = spread / kRow.most + 0.0f;  // here and in offset: no -0
  const bool sound = range.finite && step - step == 0.0f;
  if (!sound || step == 0.0f) std::memset(q.codes, 0, static_cast<size_t>(q.count));
  if (!sound) return {std::bit_cast<float>(0x7fc00000u), 0.0f};
  const float offset = kRow.offsets ? range.low + 0.0f : 0.0f;
  if (step == 0.0f) return {step, offset};
  for (int64_t i = 0; i < q.count; i += kLanes) {
    const F scaled = div(sub(load(q.x + i), splat(offset)), splat(step));
    if constexpr (kRow.offsets) {
      store_bytes(q.codes + i, to_int(min(max(round_even(scaled), splat(0.0f)), splat(kRow.most))));
    } else {
      float numbers[kLanes];
      store(numbers, scaled);
      for (int l = 0; l < kLanes; ++l)
        q.codes[i + l] = static_cast<uint8_t>(float_to_minifloat<kFp8E4m3, true>(numbers[l]));
    }
  }
  return {step, offset};
}

// A row of codes and what its codes become. A product and a sum, not fma: the bits of code * step + offset as anybody
// computes them.
template <int Source>
struct DecodedRow {
  BITFOLD_SIMD DecodedRow(const KvDecode& d, int64_t r)
      : codes(d.codes + r * d.code_stride),
        step(splat(d.steps[r] * Codes<Source>::kUnit)),
        offset(splat(kOffsets ? d.offsets[r] : 0.0f)) {}

  BITFOLD_SIMD F at(int64_t c) const {
    const F x = mul(Codes<Source>::at(codes, c), step);
    return kOffsets ? add(x, offset) : x;
  }

  static constexpr bool kOffsets = kKvFormats[Source].offsets;
  const uint8_t* codes;
  F step, offset;
};

template <int Source>
void decode(const KvDecode& given) {
  const KvDecode d = given;  // which no store can change
  if (!d.transposed) {
    for (int64_t r = 0; r < d.rows; ++r) {
      const DecodedRow<Source> row(d, r);
      for (int64_t c = 0; c < d.columns; c += kLanes) store(d.out + r * d.out_stride + c, row.at(c));
    }
    return;
  }
  for (int64_t r = 0; r < d.rows; r += kLanes) {
    for (int64_t c = 0; c < d.columns; c += kLanes) {
      F square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = r + i < d.rows ? DecodedRow<Source>(d, r + i).at(c) : splat(0.0f);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(d.out + (c + i) * d.out_stride + r, square[i]);
    }
  }
}

template <int Source>
void fill(Kernels& kernels) {
  kernels.kv_product[Source] = product<Source>;
  if constexpr (Source < kKvFormatCount) {
    kernels.kv_quantize[Source] = quantize<Source>;
    kernels.kv_decode[Source] = decode<Source>;
  }
}

}  // namespace

void BITFOLD_ISA(kv)(Kernels& kernels) {
  fill<static_cast<int>(KvFormat::Int8)>(kernels);
  fill<static_cast<int>(KvFormat::Fp8)>(kernels);
  fill<static_cast<int>(KvFormat::Int4)>(kernels);
  fill<kKvFloats>(kernels);
  kernels.kv_fold = fold;
  kernels.kv_softmax = softmax;
}

}  // namespace bitfold::cpu
