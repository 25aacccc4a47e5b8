// Sixteen lanes of AVX-512 (F, BW, VL, DQ). See scalar.hpp for what each function means. Tests on machines without it
// define BITFOLD_EMULATE_AVX512: SIMDe then gives the same intrinsics a slow body.
#pragma once

#ifdef BITFOLD_EMULATE_AVX512
#include "cpu/simd/avx512_emulated.hpp"
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "cpu/simd/common.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cpu {
namespace {

inline constexpr int kLanes = 16;
inline constexpr int kTileX = 6;  // 24 sums, 6 + 1 operands of 32 registers
inline constexpr bool kOneLookup = true;
inline constexpr bool kOneWideLookup = true;
#ifdef __AVX512VNNI__  // avx512_vnni
inline constexpr bool kOneDot = true;
#else
inline constexpr bool kOneDot = false;
#endif

using F = __m512;
struct I {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

BITFOLD_SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
BITFOLD_SIMD void store(float* p, F a) { _mm512_storeu_ps(p, a); }
BITFOLD_SIMD F splat(float a) { return _mm512_set1_ps(a); }
BITFOLD_SIMD I splat(int32_t a) { return {_mm512_set1_epi32(a)}; }

BITFOLD_SIMD F hold(F a) {
#ifndef BITFOLD_EMULATE_AVX512
  asm("" : "+v"(a));
#endif
  return a;
}

BITFOLD_SIMD __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BITFOLD_SIMD F load_half(const uint16_t* p) { return _mm512_cvtph_ps(load32(p)); }
BITFOLD_SIMD F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16));
}
BITFOLD_SIMD __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
BITFOLD_SIMD F load_e4m3_small(const uint8_t* p) {  // the sign is extended into the highest bit, and taken off the next
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load16(p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff))));
}
BITFOLD_SIMD __m256i to_halves(F a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BITFOLD_SIMD __m256i to_bf16(F a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}
BITFOLD_SIMD void store_half(uint16_t* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_halves(a)); }
BITFOLD_SIMD void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
#ifdef BITFOLD_EMULATE_AVX512
BITFOLD_SIMD void stream(float* p, F a) { store(p, a); }
#else
BITFOLD_SIMD void stream(float* p, F a) { _mm512_stream_ps(p, a); }
#endif
BITFOLD_SIMD void stream_half(uint16_t* p, F a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_halves(a)); }
BITFOLD_SIMD void stream_bf16(uint16_t* p, F a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
BITFOLD_SIMD void drain() { _mm_sfence(); }

BITFOLD_SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
BITFOLD_SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
BITFOLD_SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
BITFOLD_SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
BITFOLD_SIMD F sqrt(F a) { return _mm512_sqrt_ps(a); }
BITFOLD_SIMD F abs(F a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }  // SIMDe's abs leaves -0
BITFOLD_SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
BITFOLD_SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
BITFOLD_SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
BITFOLD_SIMD F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BITFOLD_SIMD I to_int(F a) { return {_mm512_cvttps_epi32(a)}; }
BITFOLD_SIMD F to_float(I a) { return _mm512_cvtepi32_ps(a.v); }
BITFOLD_SIMD F as_float(I a) { return _mm512_castsi512_ps(a.v); }
BITFOLD_SIMD I as_int(F a) { return {_mm512_castps_si512(a)}; }

BITFOLD_SIMD I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
BITFOLD_SIMD I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BITFOLD_SIMD I bit_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
BITFOLD_SIMD I bit_xor(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
BITFOLD_SIMD I bit_or(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int Count>
BITFOLD_SIMD I shift_left(I a) {
  return {_mm512_slli_epi32(a.v, Count)};
}
template <int Count>
BITFOLD_SIMD I shift_right(I a) {
  return {_mm512_srli_epi32(a.v, Count)};
}

template <int Count>
BITFOLD_SIMD I shift_right_signed(I a) {
  return {_mm512_srai_epi32(a.v, Count)};
}

BITFOLD_SIMD Mask greater(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)}; }
BITFOLD_SIMD Mask greater(I a, I b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
BITFOLD_SIMD Mask equal(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)}; }
BITFOLD_SIMD Mask equal(I a, I b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
BITFOLD_SIMD Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
BITFOLD_SIMD Mask either(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
BITFOLD_SIMD Mask opposite(Mask a) { return {static_cast<__mmask16>(~a.v)}; }
BITFOLD_SIMD bool any(Mask a) { return a.v != 0; }
BITFOLD_SIMD uint32_t bits(Mask a) { return a.v; }
BITFOLD_SIMD F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m.v, b, a); }
BITFOLD_SIMD I select(Mask m, I a, I b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }
BITFOLD_SIMD I count_if(Mask m, I count) {
  return {_mm512_mask_add_epi32(count.v, m.v, count.v, _mm512_set1_epi32(1))};
}

struct Table16 {
  F values;
};
BITFOLD_SIMD Table16 load_table(const float* values) { return {load(values)}; }
BITFOLD_SIMD F lookup(Table16 table, I index) { return _mm512_permutexvar_ps(index.v, table.values); }

struct Table32 {
  F low, high;
};
BITFOLD_SIMD Table32 load_table32(const float* values) { return {load(values), load(values + 16)}; }
BITFOLD_SIMD F lookup(Table32 table, I index) { return _mm512_permutex2var_ps(table.low, index.v, table.high); }

BITFOLD_SIMD I load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
BITFOLD_SIMD void store_int(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
BITFOLD_SIMD F gather(const float* p, I index) { return _mm512_i32gather_ps(index.v, p, 4); }
BITFOLD_SIMD F spread(const float* p, I index) { return _mm512_permutexvar_ps(index.v, load(p)); }

template <int Bits>
BITFOLD_SIMD I load_words(const uint8_t* p) {
  if constexpr (Bits == 3) {
    const __m512i dwords = _mm512_maskz_loadu_epi32(0xfff, p);
    const __m512i lanes =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0), dwords);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return {_mm512_shuffle_epi8(lanes, bytes)};
  } else {
    return {_mm512_loadu_si512(p)};
  }
}

template <int Bits, bool HighFirst>
BITFOLD_SIMD I unpack(const uint8_t* p) {
  if constexpr (Bits == 8) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  } else {
    const uint32_t low = load_word<Bits>(p), high = load_word<Bits>(p + Bits);
    constexpr int kSwap = HighFirst ? 1 : 0;
    const __m512i counts =
        _mm512_setr_epi32(Bits * (0 ^ kSwap), Bits * (1 ^ kSwap), Bits * (2 ^ kSwap), Bits * (3 ^ kSwap),
                          Bits * (4 ^ kSwap), Bits * (5 ^ kSwap), Bits * (6 ^ kSwap), Bits * (7 ^ kSwap),
                          Bits * (0 ^ kSwap), Bits * (1 ^ kSwap), Bits * (2 ^ kSwap), Bits * (3 ^ kSwap),
                          Bits * (4 ^ kSwap), Bits * (5 ^ kSwap), Bits * (6 ^ kSwap), Bits * (7 ^ kSwap));
    const __m512i words = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(static_cast<int32_t>(low)),
                                                  _mm512_set1_epi32(static_cast<int32_t>(high)));
    return {_mm512_and_si512(_mm512_srlv_epi32(words, counts), _mm512_set1_epi32((1 << Bits) - 1))};
  }
}
BITFOLD_SIMD void store_bytes(uint8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

BITFOLD_SIMD void transpose(F (&rows)[kLanes]) {
  F pairs[kLanes];  // of rows, in each quarter: columns 0 and 1, or 2 and 3
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  F fours[kLanes];  // column i % 4 of rows i / 4 * 4 .. + 4, in each quarter
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
      fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {  // quarter q of fours[i] is column 4 q + i
    const F low_even = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
    const F low_odd = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
    const F high_even = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
    const F high_odd = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

template <class Op>
BITFOLD_SIMD F across(const F (&rows)[kLanes], Op op) {
  F fours[4];  // in each quarter what is left of rows 4 i .. 4 i + 3
  for (int i = 0; i < 4; ++i) {
    const F* r = rows + 4 * i;
    const __m512d a = _mm512_castps_pd(op(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1])));
    const __m512d b = _mm512_castps_pd(op(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3])));
    fours[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto join = [&](F a, F b) { return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  return join(join(fours[0], fours[1]), join(fours[2], fours[3]));
}

BITFOLD_SIMD __m256 upper_half(F a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
BITFOLD_SIMD float reduce_add(F a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper_half(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
BITFOLD_SIMD void add_reduced(const F (&sums)[4], float* to) {
  const F two_a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  const F two_b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
  const F four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(two_a), _mm512_castps_pd(two_b))),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(two_a), _mm512_castps_pd(two_b))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), upper_half(four));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), all));
}
BITFOLD_SIMD float reduce_max(F a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), upper_half(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
BITFOLD_SIMD float reduce_min(F a) {
  const __m256 eight = _mm256_min_ps(_mm512_castps512_ps256(a), upper_half(a));
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

BITFOLD_SIMD I load_halves(const uint8_t* p, int64_t stride) {
  return {_mm512_inserti64x4(_mm512_castsi256_si512(load32(p)), load32(p + stride), 1)};
}
BITFOLD_SIMD I load_quarters(const uint8_t* p, int64_t stride) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + stride), 1);
  const __m256i high =
      _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p + 2 * stride)), load16(p + 3 * stride), 1);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
BITFOLD_SIMD void store_quarters(uint8_t* to, const int (&at)[4], I a) {
  const __m256i low = _mm512_castsi512_si256(a.v), high = _mm512_extracti64x4_epi64(a.v, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[0]), _mm256_castsi256_si128(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[1]), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[2]), _mm256_castsi256_si128(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[3]), _mm256_extracti128_si256(high, 1));
}
BITFOLD_SIMD I shift_right(I a, I counts) { return {_mm512_srlv_epi32(a.v, counts.v)}; }

struct Bytes16 {
  __m512i values;
};
BITFOLD_SIMD Bytes16 load_bytes16(const uint8_t* values) { return {_mm512_broadcast_i32x4(load16(values))}; }
BITFOLD_SIMD I lookup_bytes(Bytes16 table, I index) { return {_mm512_shuffle_epi8(table.values, index.v)}; }
BITFOLD_SIMD I spread_bits(uint64_t bits) { return {_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(16))}; }

BITFOLD_SIMD F permute(F a, I index) { return _mm512_permutexvar_ps(index.v, a); }
BITFOLD_SIMD I widen_bytes(uint64_t low, uint64_t high) {
  return {_mm512_cvtepu8_epi32(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)))};
}
BITFOLD_SIMD F widen_halves(uint64_t low, uint64_t high) {
  return _mm512_cvtph_ps(_mm256_set_epi64x(0, 0, static_cast<int64_t>(high), static_cast<int64_t>(low)));
}
BITFOLD_SIMD F splat_half(uint16_t bits) { return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(bits))); }

BITFOLD_SIMD F unpack_doubles_low(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
BITFOLD_SIMD F unpack_doubles_high(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
BITFOLD_SIMD void transpose_quarters(I (&v)[4]) {
  const F a = _mm512_unpacklo_ps(as_float(v[0]), as_float(v[1])),
          b = _mm512_unpackhi_ps(as_float(v[0]), as_float(v[1]));
  const F c = _mm512_unpacklo_ps(as_float(v[2]), as_float(v[3])),
          d = _mm512_unpackhi_ps(as_float(v[2]), as_float(v[3]));
  v[0] = as_int(unpack_doubles_low(a, c));
  v[1] = as_int(unpack_doubles_high(a, c));
  v[2] = as_int(unpack_doubles_low(b, d));
  v[3] = as_int(unpack_doubles_high(b, d));
}
BITFOLD_SIMD F low_halves(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v)); }
template <int Count>
BITFOLD_SIMD I shift_words_left(I a) {
  return {_mm512_slli_epi16(a.v, Count)};
}
template <int Count>
BITFOLD_SIMD I shift_words_right_signed(I a) {
  return {_mm512_srai_epi16(a.v, Count)};
}
template <int Part>
BITFOLD_SIMD F halves_of(I a) {
  return _mm512_cvtph_ps(Part == 0 ? _mm512_castsi512_si256(a.v) : _mm512_extracti64x4_epi64(a.v, 1));
}
#ifdef __AVX512VNNI__
template <bool Wide>
BITFOLD_SIMD I dot_bytes(I sum, I w, I x) {
  return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)};
}
BITFOLD_SIMD I dot_pairs(I sum, I a, I b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
#else
// Pairs of products of bytes saturate at 16 bits: two of 127 x 127 fit, two of 255 x 127 don't.
template <bool Wide>
BITFOLD_SIMD I dot_bytes(I sum, I w, I x) {
  if constexpr (Wide) {
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w.v, _mm512_set1_epi32(0x00ff00ff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_srai_epi16(x.v, 8));
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
  } else {
    const __m512i pairs = _mm512_maddubs_epi16(w.v, x.v);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
}
BITFOLD_SIMD I dot_pairs(I sum, I a, I b) { return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))}; }
#endif

}  // namespace
}  // namespace bitfold::cpu
