// Bits, halves and floats in one lane. A pair of halves (or bf16s) is a uint32_t, the first in the low 16 bits. Every
// result is rounded once, to nearest even; a NaN that comes out of a half instruction is 0x7fff. Twin:
// emulator/ptx_numbers.hpp.
#pragma once

#include <cstdint>

#include "cuda/gpu/device.hpp"

namespace bitfold::cuda::ptx {

// ---- bits ----

// Bit by bit the function whose table is Lut: the bit at 4 a + 2 b + c. As C: f(0xf0, 0xcc, 0xaa).
template <int Lut>
BITFOLD_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Lut));
  return d;
}

// Four bytes chosen from the eight of b:a by the nibbles of the selector; its bit 3 gives the byte's sign in all bits.
BITFOLD_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The low word of high:low >> (shift & 31).
BITFOLD_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// The larger of both upper halfwords, and of both lower ones, as numbers without a sign.
BITFOLD_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
// The same of numbers with one.
BITFOLD_DEVICE uint32_t max_s16x2(uint32_t a, uint32_t b) { return __vmaxs2(a, b); }

BITFOLD_DEVICE int popc(uint32_t a) { return __popc(a); }
BITFOLD_DEVICE int clz(uint32_t a) { return __clz(static_cast<int>(a)); }

// c + the four products of signed bytes.
BITFOLD_DEVICE int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

// ---- pairs of halves ----

BITFOLD_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
BITFOLD_DEVICE uint32_t hsub2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
BITFOLD_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
BITFOLD_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// The larger of each; of a number and a NaN the number.
BITFOLD_DEVICE uint32_t hmax2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
BITFOLD_DEVICE uint32_t hmin2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
BITFOLD_DEVICE uint32_t habs2(uint32_t a) { return a & 0x7fff7fffu; }

// ---- pairs of bf16s: sm_80 has the fused one alone, and the others are cases of it ----

BITFOLD_DEVICE uint32_t hfma2_bf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
BITFOLD_DEVICE uint32_t hadd2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(a, 0x3f803f80u, b); }  // a 1 + b
BITFOLD_DEVICE uint32_t hsub2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(b, 0xbf80bf80u, a); }  // a - b 1
BITFOLD_DEVICE uint32_t hmul2_bf16(uint32_t a, uint32_t b) { return hfma2_bf16(a, b, 0x80008000u); }  // a b + -0

// ---- conversions ----

BITFOLD_DEVICE float half_to_float(uint16_t a) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
  return d;
}
BITFOLD_DEVICE uint16_t float_to_half(float a) {
  uint16_t d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(a));
  return d;
}
BITFOLD_DEVICE uint16_t float_to_bf16(float a) {
  uint16_t d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(a));
  return d;
}
BITFOLD_DEVICE float bf16_to_float(uint16_t a) { return __uint_as_float(static_cast<uint32_t>(a) << 16); }

BITFOLD_DEVICE float2 halves_to_floats(uint32_t a) {
  return {half_to_float(static_cast<uint16_t>(a)), half_to_float(static_cast<uint16_t>(a >> 16))};
}
BITFOLD_DEVICE float2 bf16s_to_floats(uint32_t a) {
  return {__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u)};
}
BITFOLD_DEVICE uint32_t floats_to_halves(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
BITFOLD_DEVICE uint32_t floats_to_bf16s(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The two fp8 numbers in the low 16 bits: every e4m3 is a half.
BITFOLD_DEVICE uint32_t e4m3s_to_halves(uint32_t a) {
#if __CUDA_ARCH__ >= 890
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(a)));
  return d;
#else
  // A half's exponent has a bias of 15 where this one has 7. Of all magnitudes the NaN alone carries into bit 14 when a
  // unit of its last place is added, and that bit makes it a half's NaN.
  const uint32_t bytes = prmt(a, 0, 0x1404);
  const uint32_t magnitude = bytes >> 1 & 0x3f803f80u;
  return hmul2((bytes & 0x80008000u) | ((magnitude + 0x00800080u) & 0x40004000u) | magnitude, 0x5c005c00u);
#endif
}

// ---- floats ----

// One operation, one rounding: the compiler makes no fused one of two of these. A NaN that comes out is 0x7fffffff.
BITFOLD_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BITFOLD_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
BITFOLD_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
BITFOLD_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
BITFOLD_DEVICE float sqrt(float a) { return __fsqrt_rn(a); }

// Towards zero; beyond the ints the nearest of them, and 0 for NaN.
BITFOLD_DEVICE int float_to_int(float a) { return __float2int_rz(a); }

BITFOLD_DEVICE int float_as_int(float a) { return __float_as_int(a); }
BITFOLD_DEVICE uint32_t float_as_uint(float a) { return __float_as_uint(a); }
BITFOLD_DEVICE float int_as_float(int a) { return __int_as_float(a); }
BITFOLD_DEVICE float uint_as_float(uint32_t a) { return __uint_as_float(a); }

}  // namespace bitfold::cuda::ptx
