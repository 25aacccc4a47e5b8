// Strided matrices of any dtype, read and written a few numbers at a time.
#pragma once

#include "cuda/device.hpp"
#include "formats/args.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda {

BITFOLD_DEVICE float read_float(const MatrixIn& in, int64_t at) {
  switch (in.dtype) {
    case DType::F32: return static_cast<const float*>(in.data)[at];
    case DType::F16: return half_to_float(static_cast<const uint16_t*>(in.data)[at]);
    case DType::BF16: return bf16_to_float(static_cast<const uint16_t*>(in.data)[at]);
    default: return static_cast<float>(static_cast<const double*>(in.data)[at]);
  }
}

// Eight numbers of 16 bits, fp16 or bf16.
BITFOLD_DEVICE void floats_of_pairs(const uint4& eight, DType dtype, float (&out)[8]) {
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = dtype == DType::F16 ? ptx::halves_to_floats(pairs[i]) : ptx::bf16s_to_floats(pairs[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

// Eight numbers in a row by loads of 16 bytes, where they lie so.
BITFOLD_DEVICE bool read_vectors(const MatrixIn& in, int64_t at, float (&out)[8]) {
  const auto* p = static_cast<const char*>(in.data) + at * (in.dtype == DType::F32 ? 4 : 2);
  if (in.dtype == DType::F64 || reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  const uint4 first = ptx::load16(p);
  if (in.dtype == DType::F32) {
    const uint4 second = ptx::load16(p + 16);
    const uint32_t bits[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    for (int i = 0; i < 8; ++i) out[i] = ptx::uint_as_float(bits[i]);
    return true;
  }
  floats_of_pairs(first, in.dtype, out);
  return true;
}

// out[i] = the number at `at` + i step, for `count` <= Count of them; the others are 0. The loads are independent, and
// all of them are on their way together.
template <int Count>
BITFOLD_DEVICE void read_floats(const MatrixIn& in, int64_t at, int64_t step, int count, float (&out)[Count]) {
  const auto read = [&](auto number) {
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = i < count ? number(at + i * step) : 0.0f;
  };
  const auto* halves = static_cast<const uint16_t*>(in.data);
  if constexpr (Count == 8) {
    if (step == 1 && count == Count && read_vectors(in, at, out)) return;
  }
  switch (in.dtype) {
    case DType::F32: return read([&](int64_t i) { return static_cast<const float*>(in.data)[i]; });
    case DType::F16: return read([&](int64_t i) { return half_to_float(halves[i]); });
    case DType::BF16: return read([&](int64_t i) { return bf16_to_float(halves[i]); });
    default: return read([&](int64_t i) { return static_cast<float>(static_cast<const double*>(in.data)[i]); });
  }
}

// The same as double, which is exact for every dtype.
template <int Count>
BITFOLD_DEVICE void read_floats(const MatrixIn& in, int64_t at, int64_t step, int count, double (&out)[Count]) {
  if (in.dtype == DType::F64) {
    const auto* numbers = static_cast<const double*>(in.data);
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = i < count ? numbers[at + i * step] : 0.0;
    return;
  }
  float floats[Count];
  read_floats(in, at, step, count, floats);
  for (int i = 0; i < Count; ++i) out[i] = static_cast<double>(floats[i]);
}

// to[at] = number, rounded once.
BITFOLD_DEVICE void write_number(void* to, DType dtype, int64_t at, float number) {
  switch (dtype) {
    case DType::F32: static_cast<float*>(to)[at] = number; break;
    case DType::F16: static_cast<uint16_t*>(to)[at] = float_to_half(number); break;
    case DType::BF16: static_cast<uint16_t*>(to)[at] = float_to_bf16(number); break;
    default: static_cast<double*>(to)[at] = static_cast<double>(number); break;
  }
}
BITFOLD_DEVICE void write_number(void* to, DType dtype, int64_t at, double number) {
  if (dtype == DType::F64) static_cast<double*>(to)[at] = number;
  else write_number(to, dtype, at, static_cast<float>(number));
}

}  // namespace bitfold::cuda
