// Eight lanes of NEON (AArch64), two registers each. See scalar.hpp for what each function means.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/common.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cpu {
namespace {

inline constexpr int kLanes = 8;
inline constexpr int kTileX = 3;  // 12 sums of two registers, 3 + 1 operands: all 32 registers
inline constexpr bool kOneLookup = false;
inline constexpr bool kOneWideLookup = false;
inline constexpr bool kOneDot = false;

struct F {
  float32x4_t low, high;
};
struct I {
  int32x4_t low, high;
};
struct Mask {
  uint32x4_t low, high;
};

BITFOLD_SIMD F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
BITFOLD_SIMD void store(float* p, F a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
BITFOLD_SIMD void stream(float* p, F a) { store(p, a); }
BITFOLD_SIMD void drain() {}
BITFOLD_SIMD F splat(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
BITFOLD_SIMD I splat(int32_t a) { return {vdupq_n_s32(a), vdupq_n_s32(a)}; }

BITFOLD_SIMD F hold(F a) { return a; }

BITFOLD_SIMD F load_bf16(const uint16_t* p) {
  const uint16x8_t words = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
}
BITFOLD_SIMD F halves_to_float(uint16x8_t bits) {
  const float16x8_t halves = vreinterpretq_f16_u16(bits);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
BITFOLD_SIMD F load_half(const uint16_t* p) { return halves_to_float(vld1q_u16(p)); }
BITFOLD_SIMD F load_e4m3_small(const uint8_t* p) {  // the sign is extended into the highest bit, and taken off the next
  const int16x8_t shifted = vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))), 7);
  return halves_to_float(vandq_u16(vreinterpretq_u16_s16(shifted), vdupq_n_u16(0xbfff)));
}
BITFOLD_SIMD void store_half(uint16_t* p, F a) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high)));
}
BITFOLD_SIMD uint32x4_t rounded_to_bf16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
BITFOLD_SIMD void store_bf16(uint16_t* p, F a) {
  vst1q_u16(p, vshrn_high_n_u32(vshrn_n_u32(rounded_to_bf16(a.low), 16), rounded_to_bf16(a.high), 16));
}
BITFOLD_SIMD void stream_half(uint16_t* p, F a) { store_half(p, a); }
BITFOLD_SIMD void stream_bf16(uint16_t* p, F a) { store_bf16(p, a); }

BITFOLD_SIMD F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
BITFOLD_SIMD F sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
BITFOLD_SIMD F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
BITFOLD_SIMD F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
BITFOLD_SIMD F sqrt(F a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
BITFOLD_SIMD F abs(F a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
BITFOLD_SIMD F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }

BITFOLD_SIMD Mask greater(F a, F b) { return {vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)}; }
BITFOLD_SIMD Mask greater(I a, I b) { return {vcgtq_s32(a.low, b.low), vcgtq_s32(a.high, b.high)}; }
BITFOLD_SIMD Mask equal(F a, F b) { return {vceqq_f32(a.low, b.low), vceqq_f32(a.high, b.high)}; }
BITFOLD_SIMD Mask equal(I a, I b) { return {vceqq_s32(a.low, b.low), vceqq_s32(a.high, b.high)}; }
BITFOLD_SIMD Mask both(Mask a, Mask b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
BITFOLD_SIMD Mask either(Mask a, Mask b) { return {vorrq_u32(a.low, b.low), vorrq_u32(a.high, b.high)}; }
BITFOLD_SIMD Mask opposite(Mask a) { return {vmvnq_u32(a.low), vmvnq_u32(a.high)}; }
BITFOLD_SIMD bool any(Mask a) { return vmaxvq_u32(vorrq_u32(a.low, a.high)) != 0; }
BITFOLD_SIMD uint32_t bits(Mask a) {
  constexpr uint32_t kPlaces[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u32(vorrq_u32(vandq_u32(a.low, vld1q_u32(kPlaces)), vandq_u32(a.high, vld1q_u32(kPlaces + 4))));
}
BITFOLD_SIMD F select(Mask m, F a, F b) { return {vbslq_f32(m.low, a.low, b.low), vbslq_f32(m.high, a.high, b.high)}; }
BITFOLD_SIMD I select(Mask m, I a, I b) { return {vbslq_s32(m.low, a.low, b.low), vbslq_s32(m.high, a.high, b.high)}; }
// Of two that do not compare, the second, as everywhere: NEON's own minimum gives NaN.
BITFOLD_SIMD F min(F a, F b) { return select(greater(b, a), a, b); }
BITFOLD_SIMD F max(F a, F b) { return select(greater(a, b), a, b); }

BITFOLD_SIMD F round_even(F a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
BITFOLD_SIMD I to_int(F a) { return {vcvtq_s32_f32(a.low), vcvtq_s32_f32(a.high)}; }
BITFOLD_SIMD F to_float(I a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
BITFOLD_SIMD F as_float(I a) { return {vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)}; }
BITFOLD_SIMD I as_int(F a) { return {vreinterpretq_s32_f32(a.low), vreinterpretq_s32_f32(a.high)}; }

BITFOLD_SIMD I add(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
BITFOLD_SIMD I sub(I a, I b) { return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
BITFOLD_SIMD I bit_and(I a, I b) { return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)}; }
BITFOLD_SIMD I bit_xor(I a, I b) { return {veorq_s32(a.low, b.low), veorq_s32(a.high, b.high)}; }
BITFOLD_SIMD I bit_or(I a, I b) { return {vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high)}; }
template <int Count>
BITFOLD_SIMD I shift_left(I a) {
  return {vshlq_n_s32(a.low, Count), vshlq_n_s32(a.high, Count)};
}
template <int Count>
BITFOLD_SIMD I shift_right(I a) {
  if constexpr (Count == 0) return a;
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.low), Count)),
          vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.high), Count))};
}
template <int Count>
BITFOLD_SIMD I shift_right_signed(I a) {
  return {vshrq_n_s32(a.low, Count), vshrq_n_s32(a.high, Count)};
}
BITFOLD_SIMD I count_if(Mask m, I count) {  // a set mask is -1
  return {vsubq_s32(count.low, vreinterpretq_s32_u32(m.low)), vsubq_s32(count.high, vreinterpretq_s32_u32(m.high))};
}

struct Table16 {
  uint8x16x4_t bytes;  // 16 floats
};
BITFOLD_SIMD Table16 load_table(const float* values) {
  const auto* p = reinterpret_cast<const uint8_t*>(values);
  return {{{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}};
}
BITFOLD_SIMD float32x4_t lookup_four(Table16 table, int32x4_t index) {
  // Byte numbers 4i, 4i + 1, 4i + 2, 4i + 3 of each lane.
  const uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(index), vdupq_n_u32(15));
  const uint32x4_t first = vmulq_n_u32(low, 0x04040404u);
  const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)));
  return vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, bytes));
}
BITFOLD_SIMD F lookup(Table16 table, I index) {
  return {lookup_four(table, index.low), lookup_four(table, index.high)};
}

struct Table32 {
  Table16 low, high;
};
BITFOLD_SIMD Table32 load_table32(const float* values) { return {load_table(values), load_table(values + 16)}; }
BITFOLD_SIMD F lookup(Table32 table, I index) {
  const int32x4_t high = vdupq_n_s32(16);
  return select({vtstq_s32(index.low, high), vtstq_s32(index.high, high)}, lookup(table.high, index),
                lookup(table.low, index));
}

BITFOLD_SIMD I load_int(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
BITFOLD_SIMD void store_int(int32_t* p, I a) {
  vst1q_s32(p, a.low);
  vst1q_s32(p + 4, a.high);
}
BITFOLD_SIMD F gather(const float* p, I index) {
  int32_t at[8];
  vst1q_s32(at, index.low);
  vst1q_s32(at + 4, index.high);
  float out[8];
  for (int i = 0; i < 8; ++i) out[i] = p[at[i]];
  return load(out);
}
BITFOLD_SIMD F spread(const float* p, I index) { return gather(p, index); }

template <int Bits>
BITFOLD_SIMD I load_words(const uint8_t* p) {
  if constexpr (Bits == 3) {  // 24 bytes: overlapping loads, the second from its end
    constexpr uint8_t kFirst[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    constexpr uint8_t kSecond[16] = {4, 5, 6, 255, 7, 8, 9, 255, 10, 11, 12, 255, 13, 14, 15, 255};
    return {vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(kFirst))),
            vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(p + 8), vld1q_u8(kSecond)))};
  } else {
    return {vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p + 16))};
  }
}

template <int Bits, bool HighFirst>
BITFOLD_SIMD I unpack(const uint8_t* p) {
  if constexpr (Bits == 8) {
    const uint16x8_t words = vmovl_u8(vld1_u8(p));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words))), vreinterpretq_s32_u32(vmovl_high_u16(words))};
  } else {
    constexpr int kSwap = HighFirst ? 1 : 0;
    constexpr int32_t kCounts[8] = {-Bits * (0 ^ kSwap), -Bits * (1 ^ kSwap), -Bits * (2 ^ kSwap), -Bits * (3 ^ kSwap),
                                    -Bits * (4 ^ kSwap), -Bits * (5 ^ kSwap), -Bits * (6 ^ kSwap), -Bits * (7 ^ kSwap)};
    const uint32x4_t word = vdupq_n_u32(load_word<Bits>(p)), mask = vdupq_n_u32((1u << Bits) - 1u);
    return {vreinterpretq_s32_u32(vandq_u32(vshlq_u32(word, vld1q_s32(kCounts)), mask)),
            vreinterpretq_s32_u32(vandq_u32(vshlq_u32(word, vld1q_s32(kCounts + 4)), mask))};
  }
}
BITFOLD_SIMD void store_bytes(uint8_t* p, I a) {
  const uint16x8_t words =
      vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a.low)), vmovn_u32(vreinterpretq_u32_s32(a.high)));
  vst1_u8(p, vmovn_u16(words));
}

BITFOLD_SIMD void transpose_four(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
  b = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
  c = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
  d = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
}
BITFOLD_SIMD void transpose(F (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
    transpose_four(rows[i].low, rows[i + 1].low, rows[i + 2].low, rows[i + 3].low);
    transpose_four(rows[i].high, rows[i + 1].high, rows[i + 2].high, rows[i + 3].high);
  }
  for (int i = 0; i < 4; ++i) {
    const float32x4_t above = rows[i].high;
    rows[i].high = rows[i + 4].low;
    rows[i + 4].low = above;
  }
}

template <class Op>
BITFOLD_SIMD F across(const F (&rows)[kLanes], Op op) {
  F columns[kLanes];
  for (int i = 0; i < kLanes; ++i) columns[i] = rows[i];
  transpose(columns);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) columns[i] = op(columns[i], columns[i + half]);
  }
  return columns[0];
}

BITFOLD_SIMD float reduce_add(F a) {
  const float32x4_t four = vaddq_f32(a.low, a.high);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
BITFOLD_SIMD void add_reduced(const F (&sums)[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] += reduce_add(sums[i]);
}
BITFOLD_SIMD float reduce_max(F a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }
BITFOLD_SIMD float reduce_min(F a) { return vminvq_f32(vminq_f32(a.low, a.high)); }

BITFOLD_SIMD uint8x16_t as_bytes(int32x4_t a) { return vreinterpretq_u8_s32(a); }
BITFOLD_SIMD int32x4_t as_lanes(uint8x16_t a) { return vreinterpretq_s32_u8(a); }

BITFOLD_SIMD I load_halves(const uint8_t* p, int64_t) { return load_words<8>(p); }
BITFOLD_SIMD I load_quarters(const uint8_t* p, int64_t stride) {
  return {as_lanes(vld1q_u8(p)), as_lanes(vld1q_u8(p + stride))};
}
BITFOLD_SIMD void store_quarters(uint8_t* to, const int (&at)[2], I a) {
  vst1q_u8(to + 16 * at[0], as_bytes(a.low));
  vst1q_u8(to + 16 * at[1], as_bytes(a.high));
}
BITFOLD_SIMD I shift_right(I a, I counts) {
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.low), vnegq_s32(counts.low))),
          vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.high), vnegq_s32(counts.high)))};
}

struct Bytes16 {
  uint8x16_t values;
};
BITFOLD_SIMD Bytes16 load_bytes16(const uint8_t* values) { return {vld1q_u8(values)}; }
BITFOLD_SIMD I lookup_bytes(Bytes16 table, I index) {
  return {as_lanes(vqtbl1q_u8(table.values, as_bytes(index.low))),
          as_lanes(vqtbl1q_u8(table.values, as_bytes(index.high)))};
}
BITFOLD_SIMD int32x4_t spread_sixteen(uint64_t bits) {
  const auto low = vdup_n_u8(static_cast<uint8_t>(bits)), high = vdup_n_u8(static_cast<uint8_t>(bits >> 8));
  const uint8x16_t wanted = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  return as_lanes(vandq_u8(vtstq_u8(vcombine_u8(low, high), wanted), vdupq_n_u8(16)));
}
BITFOLD_SIMD I spread_bits(uint64_t bits) { return {spread_sixteen(bits), spread_sixteen(bits >> 16)}; }

BITFOLD_SIMD F permute(F a, I index) {
  float lanes[8];
  store(lanes, a);
  return gather(lanes, index);
}
BITFOLD_SIMD I widen_bytes(uint64_t low, uint64_t) {
  const uint16x8_t words = vmovl_u8(vcreate_u8(low));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words))), vreinterpretq_s32_u32(vmovl_high_u16(words))};
}
BITFOLD_SIMD F widen_halves(uint64_t low, uint64_t) {
  return {vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(low))), vdupq_n_f32(0.0f)};
}
BITFOLD_SIMD F splat_half(uint16_t bits) { return halves_to_float(vdupq_n_u16(bits)); }

BITFOLD_SIMD void transpose_quarters(I (&v)[4]) {
  F f[4];
  for (int i = 0; i < 4; ++i) f[i] = as_float(v[i]);
  transpose_four(f[0].low, f[1].low, f[2].low, f[3].low);
  transpose_four(f[0].high, f[1].high, f[2].high, f[3].high);
  for (int i = 0; i < 4; ++i) v[i] = as_int(f[i]);
}
BITFOLD_SIMD F low_halves(I a) {
  return halves_to_float(
      vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a.low)), vmovn_u32(vreinterpretq_u32_s32(a.high))));
}
template <int Count>
BITFOLD_SIMD I shift_words_left(I a) {
  return {vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(a.low), Count)),
          vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(a.high), Count))};
}
template <int Count>
BITFOLD_SIMD I shift_words_right_signed(I a) {
  return {vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(a.low), Count)),
          vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(a.high), Count))};
}
template <int Part>
BITFOLD_SIMD F halves_of(I a) {
  return halves_to_float(vreinterpretq_u16_s32(Part == 0 ? a.low : a.high));
}
BITFOLD_SIMD int32x4_t dot_sixteen(int32x4_t sum, int32x4_t w, int32x4_t x) {
  const uint8x16_t codes = as_bytes(w);
  const int8x16_t values = vreinterpretq_s8_s32(x);
  const int16x8_t w_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), x_low = vmovl_s8(vget_low_s8(values));
  const int16x8_t w_high = vreinterpretq_s16_u16(vmovl_high_u8(codes)), x_high = vmovl_high_s8(values);
  const int32x4_t low = vpaddq_s32(vmull_s16(vget_low_s16(w_low), vget_low_s16(x_low)), vmull_high_s16(w_low, x_low));
  const int32x4_t high =
      vpaddq_s32(vmull_s16(vget_low_s16(w_high), vget_low_s16(x_high)), vmull_high_s16(w_high, x_high));
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
template <bool Wide>
BITFOLD_SIMD I dot_bytes(I sum, I w, I x) {
  return {dot_sixteen(sum.low, w.low, x.low), dot_sixteen(sum.high, w.high, x.high)};
}
BITFOLD_SIMD int32x4_t dot_eight(int32x4_t sum, int32x4_t a, int32x4_t b) {
  const int16x8_t p = vreinterpretq_s16_s32(a), q = vreinterpretq_s16_s32(b);
  return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(p), vget_low_s16(q)), vmull_high_s16(p, q)));
}
BITFOLD_SIMD I dot_pairs(I sum, I a, I b) {
  return {dot_eight(sum.low, a.low, b.low), dot_eight(sum.high, a.high, b.high)};
}

}  // namespace
}  // namespace bitfold::cpu
