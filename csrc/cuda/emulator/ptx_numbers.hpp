// Bits, halves and floats in one lane. Twin: gpu/ptx_numbers.hpp, which says what each means.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/emulator/device.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::ptx {

// ---- bits ----

template <int Lut>
BITFOLD_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(Lut >= 0 && Lut < 256);
  uint32_t d = 0;
  if constexpr (Lut & 0x01) d |= ~a & ~b & ~c;
  if constexpr (Lut & 0x02) d |= ~a & ~b & c;
  if constexpr (Lut & 0x04) d |= ~a & b & ~c;
  if constexpr (Lut & 0x08) d |= ~a & b & c;
  if constexpr (Lut & 0x10) d |= a & ~b & ~c;
  if constexpr (Lut & 0x20) d |= a & ~b & c;
  if constexpr (Lut & 0x40) d |= a & b & ~c;
  if constexpr (Lut & 0x80) d |= a & b & c;
  return d;
}

BITFOLD_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7u)) & 255u;
    if (nibble & 8u) byte = byte & 128u ? 255u : 0u;
    d |= byte << 8 * i;
  }
  return d;
}

BITFOLD_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31u));
}

BITFOLD_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu);
}
BITFOLD_DEVICE uint32_t max_s16x2(uint32_t a, uint32_t b) {
  return max_u16x2(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u;
}

BITFOLD_DEVICE int popc(uint32_t a) { return std::popcount(a); }
BITFOLD_DEVICE int clz(uint32_t a) { return std::countl_zero(a); }

BITFOLD_DEVICE int dp4a(int a, int b, int c) {
  uint32_t sum = static_cast<uint32_t>(c);  // wraps around
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<uint32_t>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
  }
  return static_cast<int>(sum);
}

// ---- conversions ----

BITFOLD_DEVICE float half_to_float(uint16_t a) { return bitfold::half_to_float(a); }
BITFOLD_DEVICE uint16_t float_to_half(float a) { return a != a ? uint16_t{0x7fff} : bitfold::float_to_half(a); }
BITFOLD_DEVICE uint16_t float_to_bf16(float a) { return a != a ? uint16_t{0x7fff} : bitfold::float_to_bf16(a); }
BITFOLD_DEVICE float bf16_to_float(uint16_t a) { return bitfold::bf16_to_float(a); }

BITFOLD_DEVICE float2 halves_to_floats(uint32_t a) {
  return {half_to_float(static_cast<uint16_t>(a)), half_to_float(static_cast<uint16_t>(a >> 16))};
}
BITFOLD_DEVICE float2 bf16s_to_floats(uint32_t a) {
  return {bf16_to_float(static_cast<uint16_t>(a)), bf16_to_float(static_cast<uint16_t>(a >> 16))};
}
BITFOLD_DEVICE uint32_t floats_to_halves(float low, float high) {
  return uint32_t{float_to_half(low)} | uint32_t{float_to_half(high)} << 16;
}
BITFOLD_DEVICE uint32_t floats_to_bf16s(float low, float high) {
  return uint32_t{float_to_bf16(low)} | uint32_t{float_to_bf16(high)} << 16;
}

BITFOLD_DEVICE uint32_t e4m3s_to_halves(uint32_t a) {
  return floats_to_halves(minifloat_to_float<kFp8E4m3>(a & 255u), minifloat_to_float<kFp8E4m3>(a >> 8 & 255u));
}

// ---- arithmetic of pairs: in double, then to 16 bits with one rounding ----

namespace detail {

// x in binary32 such that rounding it once more gives what rounding x would have given: what doesn't fit leaves a one
// in the last place ("round to odd"). Serves whatever has at most 22 bits of mantissa.
inline float narrow_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (!(static_cast<double>(nearest) != x) || x != x) return nearest;
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(x)) bits -= 1;  // toward zero
  return std::bit_cast<float>(bits | 1u);
}

// a + b in the same sense, to double.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  if (!std::isfinite(sum) || error == 0) return sum;
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if ((error < 0) != (sum < 0)) bits -= 1;  // the sum was rounded away from zero
  return std::bit_cast<double>(bits | 1u);
}

template <class F>
uint32_t halves(F of) {
  return uint32_t{float_to_half(narrow_to_odd(of(0)))} | uint32_t{float_to_half(narrow_to_odd(of(16)))} << 16;
}
template <class F>
uint32_t bf16s(F of) {
  return uint32_t{float_to_bf16(narrow_to_odd(of(0)))} | uint32_t{float_to_bf16(narrow_to_odd(of(16)))} << 16;
}
inline double half(uint32_t pair, int shift) { return half_to_float(static_cast<uint16_t>(pair >> shift)); }
inline double bf16(uint32_t pair, int shift) { return bf16_to_float(static_cast<uint16_t>(pair >> shift)); }

}  // namespace detail

BITFOLD_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
  return detail::halves([=](int i) { return detail::half(a, i) + detail::half(b, i); });
}
BITFOLD_DEVICE uint32_t hsub2(uint32_t a, uint32_t b) {
  return detail::halves([=](int i) { return detail::half(a, i) - detail::half(b, i); });
}
BITFOLD_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  return detail::halves([=](int i) { return detail::half(a, i) * detail::half(b, i); });
}
BITFOLD_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  return detail::halves(
      [=](int i) { return detail::add_to_odd(detail::half(a, i) * detail::half(b, i), detail::half(c, i)); });
}
BITFOLD_DEVICE uint32_t habs2(uint32_t a) { return a & 0x7fff7fffu; }
BITFOLD_DEVICE uint32_t hmax2(uint32_t a, uint32_t b) {
  return detail::halves([=](int i) { return std::fmax(detail::half(a, i), detail::half(b, i)); });
}
BITFOLD_DEVICE uint32_t hmin2(uint32_t a, uint32_t b) {
  return detail::halves([=](int i) { return std::fmin(detail::half(a, i), detail::half(b, i)); });
}

BITFOLD_DEVICE uint32_t hfma2_bf16(uint32_t a, uint32_t b, uint32_t c) {
  return detail::bf16s(
      [=](int i) { return detail::add_to_odd(detail::bf16(a, i) * detail::bf16(b, i), detail::bf16(c, i)); });
}
BITFOLD_DEVICE uint32_t hadd2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(a, 0x3f803f80u, b); }
BITFOLD_DEVICE uint32_t hsub2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(b, 0xbf80bf80u, a); }
BITFOLD_DEVICE uint32_t hmul2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(a, b, 0x80008000u); }

// ---- floats ----

namespace detail {

// The NaN of a GPU's arithmetic is one pattern; a CPU's is another, or an operand's.
inline float made(float a) { return a != a ? std::bit_cast<float>(0x7fffffffu) : a; }

}  // namespace detail

BITFOLD_DEVICE float fma(float a, float b, float c) { return detail::made(std::fma(a, b, c)); }
BITFOLD_DEVICE float add(float a, float b) { return detail::made(a + b); }
BITFOLD_DEVICE float mul(float a, float b) { return detail::made(a * b); }
BITFOLD_DEVICE float div(float a, float b) { return detail::made(a / b); }
BITFOLD_DEVICE float sqrt(float a) { return detail::made(std::sqrt(a)); }

BITFOLD_DEVICE int float_to_int(float a) {
  if (a != a) return 0;
  if (a >= 0x1p31f) return INT32_MAX;
  return a < -0x1p31f ? INT32_MIN : static_cast<int>(a);
}

BITFOLD_DEVICE int float_as_int(float a) { return std::bit_cast<int>(a); }
BITFOLD_DEVICE uint32_t float_as_uint(float a) { return std::bit_cast<uint32_t>(a); }
BITFOLD_DEVICE float int_as_float(int a) { return std::bit_cast<float>(a); }
BITFOLD_DEVICE float uint_as_float(uint32_t a) { return std::bit_cast<float>(a); }

}  // namespace bitfold::cuda::ptx
