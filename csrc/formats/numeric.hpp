// Conversions between binary32 and the short floats, rounding to nearest even; host and device, no intrinsics.
#pragma once

#include <bit>
#include <cstdint>

// Always inlined: code that is built for one instruction set must never be linked into another's.
#define BITFOLD_INLINE [[gnu::always_inline]] constexpr inline

namespace bitfold {

BITFOLD_INLINE float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

BITFOLD_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The description of a small IEEE-like float: sign, exponent, mantissa.
struct Minifloat {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  uint32_t max_finite;  // pattern of the largest finite magnitude
  bool has_infinity;    // e4m3fn has none: its top exponent holds numbers, all mantissa bits set is NaN
};
inline constexpr Minifloat kHalf{5, 10, 15, 0x7bff, true};
inline constexpr Minifloat kFp8E4m3{4, 3, 7, 0x7e, false};
inline constexpr Minifloat kFp8E5m2{5, 2, 15, 0x7b, true};

template <Minifloat F>
BITFOLD_INLINE float minifloat_to_float(uint32_t pattern) {
  const uint32_t magnitude = pattern & ((1u << (F.exponent_bits + F.mantissa_bits)) - 1u);
  const uint32_t sign = ((pattern >> (F.exponent_bits + F.mantissa_bits)) & 1u) << 31;
  const int exponent = static_cast<int>(magnitude >> F.mantissa_bits);
  const uint32_t mantissa = magnitude & ((1u << F.mantissa_bits) - 1u);
  if (magnitude > F.max_finite) {
    const bool infinite = F.has_infinity && mantissa == 0;
    return std::bit_cast<float>(sign | (infinite ? 0x7f800000u : 0x7fc00000u));
  }
  if (exponent == 0) {  // subnormal: mantissa * 2^(1 - bias - mantissa_bits), exact in binary32
    const float step = std::bit_cast<float>(static_cast<uint32_t>(127 + 1 - F.bias - F.mantissa_bits) << 23);
    const float value = static_cast<float>(mantissa) * step;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | (static_cast<uint32_t>(exponent - F.bias + 127) << 23) |
                              (mantissa << (23 - F.mantissa_bits)));
}

// Nearest even. What would round beyond the largest finite value becomes infinity (or NaN where there is none), or,
// with Saturate, the largest finite value.
template <Minifloat F, bool Saturate>
BITFOLD_INLINE uint32_t float_to_minifloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 31) << (F.exponent_bits + F.mantissa_bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t beyond = F.max_finite + 1;  // infinity, or the NaN of a format without one
  if (magnitude > 0x7f800000u) return sign | beyond | (F.has_infinity ? 1u << (F.mantissa_bits - 1) : 0u);
  constexpr int kShift = 23 - F.mantissa_bits;
  const int exponent = static_cast<int>(magnitude >> 23) - 127 + F.bias;
  uint32_t rounded;
  if (exponent >= 1) {
    const uint32_t rebased = magnitude - (static_cast<uint32_t>(127 - F.bias) << 23);
    rounded = (rebased + ((1u << (kShift - 1)) - 1u) + ((rebased >> kShift) & 1u)) >> kShift;
  } else if (exponent < -F.mantissa_bits) {
    rounded = 0;  // less than half of the smallest subnormal
  } else {
    const int shift = kShift + 1 - exponent;
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    rounded = (mantissa + ((1u << (shift - 1)) - 1u) + ((mantissa >> shift) & 1u)) >> shift;
  }
  if (rounded > F.max_finite) rounded = Saturate ? F.max_finite : beyond;
  return sign | rounded;
}

BITFOLD_INLINE float half_to_float(uint16_t bits) { return minifloat_to_float<kHalf>(bits); }
BITFOLD_INLINE uint16_t float_to_half(float value) {
  return static_cast<uint16_t>(float_to_minifloat<kHalf, false>(value));
}

static_assert(float_to_half(65504.0f) == 0x7bff && float_to_half(65520.0f) == 0x7c00);
static_assert(float_to_half(5.9604645e-8f) == 1 && float_to_half(2.9802322e-8f) == 0);
static_assert(half_to_float(0x3555) == 0.333251953125f && half_to_float(1) == 5.9604644775390625e-8f);
static_assert(minifloat_to_float<kFp8E4m3>(0x7e) == 448.0f && float_to_minifloat<kFp8E4m3, true>(1e9f) == 0x7e);
static_assert(minifloat_to_float<kFp8E5m2>(0x7b) == 57344.0f && float_to_minifloat<kFp8E5m2, true>(-0.0f) == 0x80);

}  // namespace bitfold
