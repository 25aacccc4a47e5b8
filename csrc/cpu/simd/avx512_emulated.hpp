// For tests on CPUs without AVX-512: the same intrinsics from SIMDe, and what its version 0.7 lacks from two AVX2
// halves.
#pragma once

#include <cstdint>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

namespace bitfold::cpu {
namespace {

struct Halves {
  __m256i low, high;
};
inline Halves halves(__m512i a) {
  Halves out;
  __builtin_memcpy(&out, &a, sizeof(out));
  return out;
}
inline Halves halves(__m512 a) {
  Halves out;
  __builtin_memcpy(&out, &a, sizeof(out));
  return out;
}
template <class Out, class Half>
inline Out join(Half low, Half high) {
  const Half both[2] = {low, high};
  Out out;
  __builtin_memcpy(&out, both, sizeof(out));
  return out;
}

inline __m512 emulated_cvtepi32_ps(__m512i a) {
  const Halves h = halves(a);
  return join<__m512>(_mm256_cvtepi32_ps(h.low), _mm256_cvtepi32_ps(h.high));
}
inline __m512i emulated_cvttps_epi32(__m512 a) {
  const Halves h = halves(a);
  return join<__m512i>(_mm256_cvttps_epi32(_mm256_castsi256_ps(h.low)),
                       _mm256_cvttps_epi32(_mm256_castsi256_ps(h.high)));
}
inline __m512i emulated_cvtepu16_epi32(__m256i a) {
  return join<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                       _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512i emulated_cvtepu8_epi32(__m128i a) {
  return join<__m512i>(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
template <class Lane, class Out>
inline Out truncated(__m512i a) {
  int32_t from[16];
  Lane to[16];
  __builtin_memcpy(from, &a, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = static_cast<Lane>(from[i]);
  Out out;
  __builtin_memcpy(&out, to, sizeof(out));
  return out;
}
inline __m512 emulated_cvtph_ps(__m256i a) {
  return join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m256i emulated_cvtps_ph(__m512 a, int) {
  const Halves h = halves(a);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_setr_m128i(_mm256_cvtps_ph(_mm256_castsi256_ps(h.low), kNearest),
                           _mm256_cvtps_ph(_mm256_castsi256_ps(h.high), kNearest));
}

inline __m512i emulated_maskz_loadu_epi32(unsigned mask, const void* p) {
  int32_t to[16] = {};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1u) != 0) __builtin_memcpy(to + i, static_cast<const char*>(p) + 4 * i, 4);
  }
  __m512i out;
  __builtin_memcpy(&out, to, sizeof(out));
  return out;
}
inline __m512i emulated_srai_epi32(__m512i a, int count) {
  const Halves h = halves(a);
  return join<__m512i>(_mm256_srai_epi32(h.low, count), _mm256_srai_epi32(h.high, count));
}
inline __m512i emulated_madd_epi16(__m512i a, __m512i b) {
  const Halves h = halves(a), g = halves(b);
  return join<__m512i>(_mm256_madd_epi16(h.low, g.low), _mm256_madd_epi16(h.high, g.high));
}
inline __m512 emulated_i32gather_ps(__m512i index, const float* p, int) {
  const Halves h = halves(index);
  return join<__m512>(_mm256_i32gather_ps(p, h.low, 4), _mm256_i32gather_ps(p, h.high, 4));
}

// Quarters imm[1:0] and imm[3:2] of a, then imm[5:4] and imm[7:6] of b.
inline __m512 emulated_shuffle_f32x4(__m512 a, __m512 b, int imm) {
  float from[2][16], to[16];
  __builtin_memcpy(from[0], &a, sizeof(a));
  __builtin_memcpy(from[1], &b, sizeof(b));
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + 4 * i, from[i / 2] + 4 * (imm >> 2 * i & 3), 4 * sizeof(float));
  __m512 out;
  __builtin_memcpy(&out, to, sizeof(out));
  return out;
}

}  // namespace
}  // namespace bitfold::cpu

#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 emulated_maskz_loadu_epi32
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated_srai_epi32
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated_madd_epi16
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps emulated_i32gather_ps
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#undef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32 emulated_cvttps_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 truncated<int16_t, __m256i>
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 truncated<int8_t, __m128i>
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_cvtps_ph
