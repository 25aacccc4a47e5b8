// AVX512-BF16 on top of AVX-512: 32 bf16 operands in one register, products of pairs added up in fp32.
#pragma once

#include "cpu/simd/avx512.hpp"

namespace bitfold::cpu {
namespace {

struct Pairs {
  __m512bh v;
};

BITFOLD_SIMD Pairs load_pairs(const uint16_t* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  Pairs out;
  std::memcpy(&out.v, &bits, sizeof(bits));
  return out;
}
BITFOLD_SIMD Pairs hold(Pairs a) {
  asm("" : "+v"(a.v));
  return a;
}
// To nearest, ties to even; NaN stays NaN, and what is below 2^-126 becomes zero.
BITFOLD_SIMD void store_rounded(uint16_t* p, F low, F high) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(high, low);
  std::memcpy(p, &pairs, sizeof(pairs));
}
// sum + a . b, a pair of products in each lane; operands and sums below 2^-126 count as zero.
BITFOLD_SIMD F dot(F sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a.v, b.v); }

}  // namespace
}  // namespace bitfold::cpu
