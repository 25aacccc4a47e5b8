// The range of a group, and the codes of its weights a vector at a time.
#include "cpu/isa.hpp"
#include "search/codes.inl"

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
void quantize(const QuantizeArgs& a) {
  const search::Codes<Row> codes(a.scale, a.zero);
  each_code(a.w, a.count, a.codes, codes);
  if constexpr (Row == kFp4) {  // the places of sorted entries
    for (int64_t i = 0; i < a.count; ++i) a.codes[i] = search::stored_code<Row>(a.codes[i]);
  }
}

}  // namespace

void BITFOLD_ISA(encode)(Kernels& kernels) {
  kernels.group_range = group_range;
  kernels.quantize[kE4m3] = quantize<kE4m3>;
  kernels.quantize[kE5m2] = quantize<kE5m2>;
  kernels.quantize[kInt8] = quantize<kInt8>;
  kernels.quantize[kInt4] = quantize<kInt4>;
  kernels.quantize[kInt3] = quantize<kInt3>;
  kernels.quantize[kInt2] = quantize<kInt2>;
  kernels.quantize[kNf4] = quantize<kNf4>;
  kernels.quantize[kFp4] = quantize<kFp4>;
}

}  // namespace bitfold::cpu
