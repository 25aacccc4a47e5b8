// Choosing codes: the range of a group, and the nearest code of every weight in it. docs/formats.md gives the
// operations one by one.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

// Runs `step(lanes) -> I` over count floats and writes a byte for each; the last lanes are padded with zeros.
template <class Step>
BITFOLD_SIMD void each_code(const float* w, int64_t count, uint8_t* codes, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bytes(codes + i, step(load(w + i)));
  if (i == count) return;
  float lanes[kLanes] = {};
  uint8_t bytes[kLanes];
  std::memcpy(lanes, w + i, static_cast<size_t>(count - i) * sizeof(float));
  store_bytes(bytes, step(load(lanes)));
  std::memcpy(codes + i, bytes, static_cast<size_t>(count - i));
}

// Floats that are asked for ahead: the weight is read here for the first time.
constexpr int64_t kAhead = 3072;

GroupRange group_range(const float* w, int64_t count) {
  F low = splat(0.0f), high = splat(0.0f);
  I odd = splat(0);  // lanes that met a NaN or an infinity
  const I largest = splat(int32_t{0x7f7fffff});
  int64_t i = 0;
  const auto step = [&](F lanes) {
    low = min(lanes, low);
    high = max(lanes, high);
    odd = count_if(greater(bit_and(as_int(lanes), splat(int32_t{0x7fffffff})), largest), odd);
  };
  for (; i + kLanes <= count; i += kLanes) {
    prefetch(w + i + kAhead);
    step(load(w + i));
  }
  if (i < count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, w + i, static_cast<size_t>(count - i) * sizeof(float));
    step(load(lanes));
  }
  return {reduce_min(low), reduce_max(high), reduce_max(to_float(odd)) == 0.0f};
}

template <int Row>
void quantize_integer(const QuantizeArgs& a) {
  constexpr float kMax = (1 << kFormats[Row].bits) - 1;
  const F scale = splat(a.scale), zero = splat(static_cast<float>(a.zero)), top = splat(kMax);
  each_code(a.w, a.count, a.codes,
            [&](F lanes) { return to_int(min(max(add(round_even(div(lanes, scale)), zero), splat(0.0f)), top)); });
}

template <Minifloat M>
void quantize_minifloat(const QuantizeArgs& a) {
  constexpr int kShift = 23 - M.mantissa_bits;
  const F scale = splat(a.scale);
  const I one = splat(1);
  const I smallest_normal = splat(int32_t{(127 + 1 - M.bias) << 23});
  const F steps = splat(std::bit_cast<float>(uint32_t{127 - 1 + M.bias + M.mantissa_bits} << 23));
  each_code(a.w, a.count, a.codes, [&](F lanes) {
    const I bits = as_int(div(lanes, scale));
    const I magnitude = bit_and(bits, splat(int32_t{0x7fffffff}));
    const I sign = bit_and(shift_right<24>(bits), splat(int32_t{0x80}));
    const I subnormal = to_int(round_even(mul(as_float(magnitude), steps)));
    const I rebased = sub(magnitude, splat(int32_t{(127 - M.bias) << 23}));
    const I even = bit_and(shift_right<kShift>(rebased), one);
    const I normal = shift_right<kShift>(add(rebased, add(even, splat(int32_t{(1 << (kShift - 1)) - 1}))));
    const I rounded = select(greater(smallest_normal, magnitude), subnormal, normal);
    const I last = splat(static_cast<int32_t>(M.max_finite));
    return bit_or(sign, select(greater(rounded, last), last, rounded));
  });
}

template <const SortedCodebook<16>& Codebook, bool Sorted>
void quantize_codebook(const QuantizeArgs& a) {
  const F inverse = splat(1.0f / (a.scale > 1e-38f ? a.scale : 1e-38f));
  each_code(a.w, a.count, a.codes, [&](F lanes) {
    const F t = max(min(mul(lanes, inverse), splat(1.0f)), splat(-1.0f));
    I above = splat(0);
    for (const float midpoint : Codebook.midpoints) above = count_if(greater(t, splat(midpoint)), above);
    return above;
  });
  if constexpr (!Sorted) {  // the code is not the place in the sorted table
    for (int64_t i = 0; i < a.count; ++i) a.codes[i] = Codebook.codes[a.codes[i]];
  }
}

}  // namespace

void BITFOLD_ISA(encode)(Kernels& kernels) {
  kernels.group_range = group_range;
  kernels.quantize[kE4m3] = quantize_minifloat<kFp8E4m3>;
  kernels.quantize[kE5m2] = quantize_minifloat<kFp8E5m2>;
  kernels.quantize[kInt8] = quantize_integer<kInt8>;
  kernels.quantize[kInt4] = quantize_integer<kInt4>;
  kernels.quantize[kInt3] = quantize_integer<kInt3>;
  kernels.quantize[kInt2] = quantize_integer<kInt2>;
  kernels.quantize[kNf4] = quantize_codebook<kNf4Sorted, true>;
  kernels.quantize[kFp4] = quantize_codebook<kFp4Sorted, false>;
}

}  // namespace bitfold::cpu
