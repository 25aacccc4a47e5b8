// Rows of floats between the dtypes; decoding the cast families is nothing else.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

template <Stores To, class Load, class LoadOne>
BITFOLD_SIMD void widen(int64_t count, float* to, Load load_lanes, LoadOne load_one) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) put<To>(to + i, load_lanes(i));
  for (; i < count; ++i) to[i] = load_one(i);
}

template <Stores To>
void convert_to_float(const void* from, DType dtype, int64_t count, float* to) {
  if (dtype == DType::F32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == DType::F16) {
    const auto* p = static_cast<const uint16_t*>(from);
    widen<To>(count, to, [&](int64_t i) { return load_half(p + i); }, [&](int64_t i) { return half_to_float(p[i]); });
  } else if (dtype == DType::BF16) {
    const auto* p = static_cast<const uint16_t*>(from);
    widen<To>(count, to, [&](int64_t i) { return load_bf16(p + i); }, [&](int64_t i) { return bf16_to_float(p[i]); });
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

// Vectors as long as `to` lies on a multiple of theirs; what is left over as always.
void stream_from_float(const float* from, int64_t count, DType dtype, void* to) {
  int64_t i = 0;
  if (dtype == DType::F32) {
    for (; i + kLanes <= count; i += kLanes) put<Stores::PastCaches>(static_cast<float*>(to) + i, load(from + i));
  } else if (dtype != DType::F64 && reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(uint16_t)) == 0) {
    auto* p = static_cast<uint16_t*>(to);
    if (dtype == DType::F16) {
      for (; i + kLanes <= count; i += kLanes) stream_half(p + i, load(from + i));
    } else {
      for (; i + kLanes <= count; i += kLanes) stream_bf16(p + i, load(from + i));
    }
  }
  convert_from_float(from + i, count - i, dtype, static_cast<char*>(to) + i * dtype_bits(dtype) / 8);
}

void decode_cast(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out, Stores stores) {
  const auto* codes = static_cast<const uint16_t*>(w.codes) + row * w.plane_columns() + begin;
  const auto convert =
      stores == Stores::Cached ? convert_to_float<Stores::Cached> : convert_to_float<Stores::PastCaches>;
  convert(codes, w.format.row == kFp16 ? DType::F16 : DType::BF16, end - begin, out);
}

}  // namespace

void BITFOLD_ISA(convert)(Kernels& kernels) {
  kernels.to_float = convert_to_float<Stores::Cached>;
  kernels.from_float = convert_from_float;
  kernels.stream_from_float = stream_from_float;
  kernels.drain = [] { drain(); };
  kernels.decode_span[kFp16] = decode_cast;
  kernels.decode_span[kBf16] = decode_cast;
}

}  // namespace bitfold::cpu
