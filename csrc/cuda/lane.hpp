// The vectors that csrc/search is written on, with one lane: a thread of a GPU. Its neighbours work on other blocks.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device.hpp"
#include "formats/numeric.hpp"

#define BITFOLD_SIMD BITFOLD_DEVICE
#define BITFOLD_BODY __device__

namespace bitfold::search {
namespace {

inline constexpr int kLanes = 1;
// A lookup goes through the first cache; arithmetic is nearer.
inline constexpr bool kOneWideLookup = false;
// Added to a small number, it leaves the nearest whole one, ties to even, in the lowest bits: 1.5 * 2^23.
inline constexpr float kWholes = 12582912.0f;

struct F {
  float v;
};
struct I {
  int32_t v;
};
struct Mask {
  bool v;
};

BITFOLD_SIMD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// a is not 0. Of std::countr_zero nvcc 13.0 makes 32, whatever a is.
BITFOLD_SIMD int lowest_one(uint32_t a) { return cuda::ptx::popc((a & (0u - a)) - 1u); }
BITFOLD_SIMD void prefetch(const void*) {}
BITFOLD_SIMD void prefetch_page(const void*) {}

BITFOLD_SIMD F load(const float* p) { return {*p}; }
BITFOLD_SIMD void store(float* p, F a) { *p = a.v; }
BITFOLD_SIMD I load_int(const int32_t* p) { return {*p}; }
BITFOLD_SIMD void store_int(int32_t* p, I a) { *p = a.v; }
BITFOLD_SIMD void store_bytes(uint8_t* p, I a) { *p = static_cast<uint8_t>(a.v); }
BITFOLD_SIMD F load_half(const uint16_t* p) { return {half_to_float(*p)}; }
BITFOLD_SIMD void store_half(uint16_t* p, F a) { *p = float_to_half(a.v); }
BITFOLD_SIMD F gather(const float* p, I index) { return {p[index.v]}; }
BITFOLD_SIMD F splat(float a) { return {a}; }
BITFOLD_SIMD I splat(int32_t a) { return {a}; }

BITFOLD_SIMD F add(F a, F b) { return {cuda::ptx::add(a.v, b.v)}; }
BITFOLD_SIMD F sub(F a, F b) { return {cuda::ptx::add(a.v, -b.v)}; }
BITFOLD_SIMD F mul(F a, F b) { return {cuda::ptx::mul(a.v, b.v)}; }
BITFOLD_SIMD F div(F a, F b) { return {cuda::ptx::div(a.v, b.v)}; }
BITFOLD_SIMD F sqrt(F a) { return {cuda::ptx::sqrt(a.v)}; }
BITFOLD_SIMD F abs(F a) { return {fabsf(a.v)}; }
// a * b + c; in one rounding or two.
BITFOLD_SIMD F fma(F a, F b, F c) { return {cuda::ptx::fma(a.v, b.v, c.v)}; }
// Where one is NaN, the second.
BITFOLD_SIMD F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
BITFOLD_SIMD F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
BITFOLD_SIMD F round_even(F a) { return {rintf(a.v)}; }
BITFOLD_SIMD I to_int(F a) { return {cuda::ptx::float_to_int(a.v)}; }  // of whole numbers
BITFOLD_SIMD F to_float(I a) { return {static_cast<float>(a.v)}; }
BITFOLD_SIMD F as_float(I a) { return {std::bit_cast<float>(a.v)}; }
// A GPU's own NaN has all bits set below the sign, a CPU's the highest alone, which nearest_int takes for 0.
BITFOLD_SIMD I as_int(F a) { return {a.v != a.v ? 0x7fc00000 : std::bit_cast<int32_t>(a.v)}; }

BITFOLD_SIMD I add(I a, I b) { return {static_cast<int32_t>(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))}; }
BITFOLD_SIMD I sub(I a, I b) { return {static_cast<int32_t>(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))}; }
BITFOLD_SIMD I bit_and(I a, I b) { return {a.v & b.v}; }
BITFOLD_SIMD I bit_or(I a, I b) { return {a.v | b.v}; }
BITFOLD_SIMD I bit_xor(I a, I b) { return {a.v ^ b.v}; }
template <int Count>
BITFOLD_SIMD I shift_left(I a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) << Count)};
}
template <int Count>
BITFOLD_SIMD I shift_right(I a) {  // logical
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) >> Count)};
}
template <int Count>
BITFOLD_SIMD I shift_right_signed(I a) {
  return {a.v >> Count};
}

BITFOLD_SIMD Mask greater(F a, F b) { return {a.v > b.v}; }
BITFOLD_SIMD Mask greater(I a, I b) { return {a.v > b.v}; }
BITFOLD_SIMD Mask equal(F a, F b) { return {a.v == b.v}; }
BITFOLD_SIMD Mask equal(I a, I b) { return {a.v == b.v}; }
BITFOLD_SIMD Mask both(Mask a, Mask b) { return {a.v && b.v}; }
BITFOLD_SIMD Mask either(Mask a, Mask b) { return {a.v || b.v}; }
BITFOLD_SIMD Mask opposite(Mask a) { return {!a.v}; }
BITFOLD_SIMD bool any(Mask a) { return a.v; }
BITFOLD_SIMD uint32_t bits(Mask a) { return a.v ? 1u : 0u; }
BITFOLD_SIMD F select(Mask m, F a, F b) { return m.v ? a : b; }
BITFOLD_SIMD I select(Mask m, I a, I b) { return m.v ? a : b; }
BITFOLD_SIMD I count_if(Mask m, I count) { return {count.v + (m.v ? 1 : 0)}; }

struct Table32 {
  const float* values;
};
BITFOLD_SIMD Table32 load_table32(const float* values) { return {values}; }
BITFOLD_SIMD F lookup(Table32 table, I index) { return {table.values[index.v & 31]}; }

// One row of one lane.
BITFOLD_SIMD void transpose(F (&)[1]) {}
template <class Op>
BITFOLD_SIMD F across(const F (&rows)[1], Op) {
  return rows[0];
}

}  // namespace
}  // namespace bitfold::search
