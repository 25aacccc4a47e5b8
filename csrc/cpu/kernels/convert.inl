// Rows of floats between the dtypes; decoding the cast families is nothing else.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

template <class Load, class LoadOne>
BITFOLD_SIMD void widen(int64_t count, float* to, Load load_lanes, LoadOne load_one) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_lanes(i));
  for (; i < count; ++i) to[i] = load_one(i);
}

void convert_to_float(const void* from, DType dtype, int64_t count, float* to) {
  if (dtype == DType::F32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == DType::F16) {
    const auto* p = static_cast<const uint16_t*>(from);
    widen(count, to, [&](int64_t i) { return load_half(p + i); }, [&](int64_t i) { return half_to_float(p[i]); });
  } else if (dtype == DType::BF16) {
    const auto* p = static_cast<const uint16_t*>(from);
    widen(count, to, [&](int64_t i) { return load_bf16(p + i); }, [&](int64_t i) { return bf16_to_float(p[i]); });
  } else {
    const auto* p = static_cast<const double*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(p[i]);
  }
}

void convert_from_float(const float* from, int64_t count, DType dtype, void* to) {
  int64_t i = 0;
  if (dtype == DType::F32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == DType::F16) {
    auto* p = static_cast<uint16_t*>(to);
    for (; i + kLanes <= count; i += kLanes) store_half(p + i, load(from + i));
    for (; i < count; ++i) p[i] = float_to_half(from[i]);
  } else if (dtype == DType::BF16) {
    auto* p = static_cast<uint16_t*>(to);
    for (; i + kLanes <= count; i += kLanes) store_bf16(p + i, load(from + i));
    for (; i < count; ++i) p[i] = float_to_bf16(from[i]);
  } else {
    auto* p = static_cast<double*>(to);
    for (; i < count; ++i) p[i] = static_cast<double>(from[i]);
  }
}

void decode_cast(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out) {
  const auto* codes = static_cast<const uint16_t*>(w.codes) + row * w.plane_columns() + begin;
  convert_to_float(codes, w.format.row == kFp16 ? DType::F16 : DType::BF16, end - begin, out);
}

}  // namespace

void BITFOLD_ISA(convert)(Kernels& kernels) {
  kernels.to_float = convert_to_float;
  kernels.from_float = convert_from_float;
  kernels.decode_span[kFp16] = decode_cast;
  kernels.decode_span[kBf16] = decode_cast;
}

}  // namespace bitfold::cpu
