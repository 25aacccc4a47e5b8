// Eight lanes of AVX2, FMA and F16C. See scalar.hpp for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/common.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cpu {
namespace {

inline constexpr int kLanes = 8;
inline constexpr int kTileX = 3;  // 12 sums, 3 + 1 operands: all 16 registers
inline constexpr bool kOneLookup = false;
inline constexpr bool kOneWideLookup = false;
inline constexpr bool kOneDot = false;

using F = __m256;
struct I {
  __m256i v;
};
struct Mask {
  __m256i v;
};

BITFOLD_SIMD F load(const float* p) { return _mm256_loadu_ps(p); }
BITFOLD_SIMD void store(float* p, F a) { _mm256_storeu_ps(p, a); }
BITFOLD_SIMD void stream(float* p, F a) { _mm256_stream_ps(p, a); }
BITFOLD_SIMD void drain() { _mm_sfence(); }
BITFOLD_SIMD F splat(float a) { return _mm256_set1_ps(a); }
BITFOLD_SIMD I splat(int32_t a) { return {_mm256_set1_epi32(a)}; }

BITFOLD_SIMD F hold(F a) {
  asm("" : "+x"(a));
  return a;
}

BITFOLD_SIMD __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
BITFOLD_SIMD F load_half(const uint16_t* p) { return _mm256_cvtph_ps(load16(p)); }
BITFOLD_SIMD F load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
}
BITFOLD_SIMD __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
BITFOLD_SIMD F load_e4m3_small(const uint8_t* p) {  // the sign is extended into the highest bit, and taken off the next
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(load8(p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(static_cast<int16_t>(0xbfff))));
}
BITFOLD_SIMD __m128i to_halves(F a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BITFOLD_SIMD __m128i to_bf16(F a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
}
BITFOLD_SIMD void store_half(uint16_t* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_halves(a)); }
BITFOLD_SIMD void store_bf16(uint16_t* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
BITFOLD_SIMD void stream_half(uint16_t* p, F a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_halves(a)); }
BITFOLD_SIMD void stream_bf16(uint16_t* p, F a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }

BITFOLD_SIMD F add(F a, F b) { return _mm256_add_ps(a, b); }
BITFOLD_SIMD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
BITFOLD_SIMD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
BITFOLD_SIMD F div(F a, F b) { return _mm256_div_ps(a, b); }
BITFOLD_SIMD F sqrt(F a) { return _mm256_sqrt_ps(a); }
BITFOLD_SIMD F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
BITFOLD_SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
BITFOLD_SIMD F min(F a, F b) { return _mm256_min_ps(a, b); }
BITFOLD_SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
BITFOLD_SIMD F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BITFOLD_SIMD I to_int(F a) { return {_mm256_cvttps_epi32(a)}; }
BITFOLD_SIMD F to_float(I a) { return _mm256_cvtepi32_ps(a.v); }
BITFOLD_SIMD F as_float(I a) { return _mm256_castsi256_ps(a.v); }
BITFOLD_SIMD I as_int(F a) { return {_mm256_castps_si256(a)}; }

BITFOLD_SIMD I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
BITFOLD_SIMD I sub(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
BITFOLD_SIMD I bit_and(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
BITFOLD_SIMD I bit_xor(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
BITFOLD_SIMD I bit_or(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int Count>
BITFOLD_SIMD I shift_left(I a) {
  return {_mm256_slli_epi32(a.v, Count)};
}
template <int Count>
BITFOLD_SIMD I shift_right(I a) {
  return {_mm256_srli_epi32(a.v, Count)};
}

template <int Count>
BITFOLD_SIMD I shift_right_signed(I a) {
  return {_mm256_srai_epi32(a.v, Count)};
}

BITFOLD_SIMD Mask greater(F a, F b) { return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ))}; }
BITFOLD_SIMD Mask greater(I a, I b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
BITFOLD_SIMD Mask equal(F a, F b) { return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))}; }
BITFOLD_SIMD Mask equal(I a, I b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
BITFOLD_SIMD Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.v, b.v)}; }
BITFOLD_SIMD Mask either(Mask a, Mask b) { return {_mm256_or_si256(a.v, b.v)}; }
BITFOLD_SIMD Mask opposite(Mask a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi32(-1))}; }
BITFOLD_SIMD bool any(Mask a) { return _mm256_testz_si256(a.v, a.v) == 0; }
BITFOLD_SIMD uint32_t bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a.v))); }
BITFOLD_SIMD F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m.v)); }
BITFOLD_SIMD I select(Mask m, I a, I b) { return {_mm256_blendv_epi8(b.v, a.v, m.v)}; }
BITFOLD_SIMD I count_if(Mask m, I count) { return {_mm256_sub_epi32(count.v, m.v)}; }

struct Table16 {
  F low;
  F high;
};
BITFOLD_SIMD Table16 load_table(const float* values) { return {load(values), load(values + 8)}; }
BITFOLD_SIMD F lookup(Table16 table, I index) {
  const F low = _mm256_permutevar8x32_ps(table.low, index.v);
  const F high = _mm256_permutevar8x32_ps(table.high, index.v);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)));  // bit 3 decides
}

struct Table32 {
  Table16 low, high;
};
BITFOLD_SIMD Table32 load_table32(const float* values) { return {load_table(values), load_table(values + 16)}; }
BITFOLD_SIMD F lookup(Table32 table, I index) {
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 27));  // bit 4 decides
  return _mm256_blendv_ps(lookup(table.low, index), lookup(table.high, index), high);
}

BITFOLD_SIMD I load_int(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
BITFOLD_SIMD void store_int(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
BITFOLD_SIMD F gather(const float* p, I index) { return _mm256_i32gather_ps(p, index.v, 4); }
BITFOLD_SIMD F spread(const float* p, I index) { return _mm256_permutevar8x32_ps(load(p), index.v); }

template <int Bits>
BITFOLD_SIMD I load_words(const uint8_t* p) {
  if constexpr (Bits == 3) {
    const __m256i halves =
        _mm256_set_m128i(_mm_maskload_epi32(reinterpret_cast<const int*>(p + 12), _mm_setr_epi32(-1, -1, -1, 0)),
                         _mm_maskload_epi32(reinterpret_cast<const int*>(p), _mm_setr_epi32(-1, -1, -1, 0)));
    const __m128i bytes = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return {_mm256_shuffle_epi8(halves, _mm256_set_m128i(bytes, bytes))};
  } else {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
}

template <int Bits, bool HighFirst>
BITFOLD_SIMD I unpack(const uint8_t* p) {
  if constexpr (Bits == 8) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  } else {
    const uint32_t word = load_word<Bits>(p);
    constexpr int kSwap = HighFirst ? 1 : 0;
    const __m256i counts =
        _mm256_setr_epi32(Bits * (0 ^ kSwap), Bits * (1 ^ kSwap), Bits * (2 ^ kSwap), Bits * (3 ^ kSwap),
                          Bits * (4 ^ kSwap), Bits * (5 ^ kSwap), Bits * (6 ^ kSwap), Bits * (7 ^ kSwap));
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(word)), counts);
    return {_mm256_and_si256(shifted, _mm256_set1_epi32((1 << Bits) - 1))};
  }
}
BITFOLD_SIMD void store_bytes(uint8_t* p, I a) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

BITFOLD_SIMD void transpose(F (&rows)[kLanes]) {
  F pairs[kLanes];  // of rows, in each half: columns 0 and 1, or 2 and 3
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  F fours[kLanes];  // column i % 4 of rows i / 4 * 4 .. + 4, in each half
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + j + 2]);
      fours[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

template <class Op>
BITFOLD_SIMD F across(const F (&rows)[kLanes], Op op) {
  F fours[2];  // in each half what is left of rows 4 i .. 4 i + 3
  for (int i = 0; i < 2; ++i) {
    const F* r = rows + 4 * i;
    const __m256d a = _mm256_castps_pd(op(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1])));
    const __m256d b = _mm256_castps_pd(op(_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3])));
    fours[i] = op(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return op(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}

BITFOLD_SIMD float reduce_add(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
BITFOLD_SIMD void add_reduced(const F (&sums)[4], float* to) {
  const F four = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), all));
}
BITFOLD_SIMD float reduce_max(F a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
BITFOLD_SIMD float reduce_min(F a) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

BITFOLD_SIMD I load_halves(const uint8_t* p, int64_t) { return load_words<8>(p); }
BITFOLD_SIMD I load_quarters(const uint8_t* p, int64_t stride) {
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + stride), 1)};
}
BITFOLD_SIMD void store_quarters(uint8_t* to, const int (&at)[2], I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[0]), _mm256_castsi256_si128(a.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * at[1]), _mm256_extracti128_si256(a.v, 1));
}
BITFOLD_SIMD I shift_right(I a, I counts) { return {_mm256_srlv_epi32(a.v, counts.v)}; }

struct Bytes16 {
  __m256i values;
};
BITFOLD_SIMD Bytes16 load_bytes16(const uint8_t* values) { return {_mm256_broadcastsi128_si256(load16(values))}; }
BITFOLD_SIMD I lookup_bytes(Bytes16 table, I index) { return {_mm256_shuffle_epi8(table.values, index.v)}; }
BITFOLD_SIMD I spread_bits(uint64_t bits) {
  const __m256i word = _mm256_set1_epi32(static_cast<int32_t>(bits));
  const __m256i bytes =
      _mm256_shuffle_epi8(word, _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, wanted), wanted);
  return {_mm256_and_si256(set, _mm256_set1_epi8(16))};
}

BITFOLD_SIMD F permute(F a, I index) { return _mm256_permutevar8x32_ps(a, index.v); }
BITFOLD_SIMD I widen_bytes(uint64_t low, uint64_t) {
  return {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(low)))};
}
BITFOLD_SIMD F widen_halves(uint64_t low, uint64_t) {
  return _mm256_cvtph_ps(_mm_cvtsi64_si128(static_cast<int64_t>(low)));
}
BITFOLD_SIMD F splat_half(uint16_t bits) { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(bits))); }

BITFOLD_SIMD void transpose_quarters(I (&v)[4]) {
  const __m256i a = _mm256_unpacklo_epi32(v[0].v, v[1].v), b = _mm256_unpackhi_epi32(v[0].v, v[1].v);
  const __m256i c = _mm256_unpacklo_epi32(v[2].v, v[3].v), d = _mm256_unpackhi_epi32(v[2].v, v[3].v);
  v[0].v = _mm256_unpacklo_epi64(a, c);
  v[1].v = _mm256_unpackhi_epi64(a, c);
  v[2].v = _mm256_unpacklo_epi64(b, d);
  v[3].v = _mm256_unpackhi_epi64(b, d);
}
BITFOLD_SIMD F low_halves(I a) {
  const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
template <int Count>
BITFOLD_SIMD I shift_words_left(I a) {
  return {_mm256_slli_epi16(a.v, Count)};
}
template <int Count>
BITFOLD_SIMD I shift_words_right_signed(I a) {
  return {_mm256_srai_epi16(a.v, Count)};
}
template <int Part>
BITFOLD_SIMD F halves_of(I a) {
  return _mm256_cvtph_ps(_mm256_extracti128_si256(a.v, Part));
}
// Pairs of products of bytes saturate at 16 bits: two of 127 x 127 fit, two of 255 x 127 don't.
template <bool Wide>
BITFOLD_SIMD I dot_bytes(I sum, I w, I x) {
  if constexpr (Wide) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w.v, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x.v, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w.v, 8), _mm256_srai_epi16(x.v, 8));
    return {_mm256_add_epi32(sum.v, _mm256_add_epi32(even, odd))};
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(w.v, x.v);
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
}
BITFOLD_SIMD I dot_pairs(I sum, I a, I b) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))}; }

}  // namespace
}  // namespace bitfold::cpu
