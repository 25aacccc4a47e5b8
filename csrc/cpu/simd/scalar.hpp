// Eight lanes as plain loops: what a CPU without one of the other headers runs, and the shape they all follow.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/simd/common.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cpu {
namespace {

inline constexpr int kLanes = 8;
// Rows of x that are multiplied with kTileRows of the weight in registers.
inline constexpr int kTileX = 2;
// Whether a lookup costs no more than the arithmetic that it could replace.
inline constexpr bool kOneLookup = true;
// The same of a table of 32.
inline constexpr bool kOneWideLookup = true;
// Whether dot_bytes is one instruction.
inline constexpr bool kOneDot = false;

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};
struct Mask {
  bool v[kLanes];
};

template <class Out, class Fn>
BITFOLD_SIMD Out each(Fn fn) {
  Out out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = fn(i);
  return out;
}

BITFOLD_SIMD F load(const float* p) {
  F out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
BITFOLD_SIMD void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
// Stores that go past the caches, where the set has such; p lies on a multiple of a vector's bytes. Others see them
// only after drain().
BITFOLD_SIMD void stream(float* p, F a) { store(p, a); }
BITFOLD_SIMD void drain() {}
BITFOLD_SIMD F splat(float a) {
  return each<F>([&](int) { return a; });
}
BITFOLD_SIMD I splat(int32_t a) {
  return each<I>([&](int) { return a; });
}

// Keeps a in a register where several instructions would each rather read it from memory.
BITFOLD_SIMD F hold(F a) { return a; }

BITFOLD_SIMD F load_half(const uint16_t* p) {
  return each<F>([&](int i) { return half_to_float(p[i]); });
}
BITFOLD_SIMD F load_bf16(const uint16_t* p) {
  return each<F>([&](int i) { return bf16_to_float(p[i]); });
}
// Minifloats of e4m3 as halves that are 256 times too small; NaN comes out as a number.
BITFOLD_SIMD F load_e4m3_small(const uint8_t* p) {
  return each<F>([&](int i) { return half_to_float(static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7)); });
}
BITFOLD_SIMD void store_half(uint16_t* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
BITFOLD_SIMD void store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(a.v[i]);
}
BITFOLD_SIMD void stream_half(uint16_t* p, F a) { store_half(p, a); }
BITFOLD_SIMD void stream_bf16(uint16_t* p, F a) { store_bf16(p, a); }

BITFOLD_SIMD F add(F a, F b) {
  return each<F>([&](int i) { return a.v[i] + b.v[i]; });
}
BITFOLD_SIMD F sub(F a, F b) {
  return each<F>([&](int i) { return a.v[i] - b.v[i]; });
}
BITFOLD_SIMD F mul(F a, F b) {
  return each<F>([&](int i) { return a.v[i] * b.v[i]; });
}
BITFOLD_SIMD F div(F a, F b) {
  return each<F>([&](int i) { return a.v[i] / b.v[i]; });
}
BITFOLD_SIMD F sqrt(F a) {
  return each<F>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
BITFOLD_SIMD F abs(F a) {
  return each<F>([&](int i) { return __builtin_fabsf(a.v[i]); });
}
// a * b + c; one rounding where the hardware has it, two here.
BITFOLD_SIMD F fma(F a, F b, F c) {
  return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// As the x86 instructions: where one is NaN, the second.
BITFOLD_SIMD F min(F a, F b) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
BITFOLD_SIMD F max(F a, F b) {
  return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
BITFOLD_SIMD F round_even(F a) {
  return each<F>([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
BITFOLD_SIMD I to_int(F a) {  // of whole numbers
  return each<I>([&](int i) { return static_cast<int32_t>(a.v[i]); });
}
BITFOLD_SIMD F to_float(I a) {
  return each<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
BITFOLD_SIMD F as_float(I a) {
  return each<F>([&](int i) { return std::bit_cast<float>(a.v[i]); });
}
BITFOLD_SIMD I as_int(F a) {
  return each<I>([&](int i) { return std::bit_cast<int32_t>(a.v[i]); });
}

BITFOLD_SIMD I add(I a, I b) {
  return each<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
BITFOLD_SIMD I sub(I a, I b) {
  return each<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
BITFOLD_SIMD I bit_and(I a, I b) {
  return each<I>([&](int i) { return a.v[i] & b.v[i]; });
}
BITFOLD_SIMD I bit_xor(I a, I b) {
  return each<I>([&](int i) { return a.v[i] ^ b.v[i]; });
}
BITFOLD_SIMD I bit_or(I a, I b) {
  return each<I>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int Count>
BITFOLD_SIMD I shift_left(I a) {
  return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << Count); });
}
template <int Count>
BITFOLD_SIMD I shift_right(I a) {  // logical
  return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> Count); });
}

template <int Count>
BITFOLD_SIMD I shift_right_signed(I a) {
  return each<I>([&](int i) { return a.v[i] >> Count; });
}

BITFOLD_SIMD Mask greater(F a, F b) {
  return each<Mask>([&](int i) { return a.v[i] > b.v[i]; });
}
BITFOLD_SIMD Mask greater(I a, I b) {
  return each<Mask>([&](int i) { return a.v[i] > b.v[i]; });
}
BITFOLD_SIMD Mask equal(F a, F b) {
  return each<Mask>([&](int i) { return a.v[i] == b.v[i]; });
}
BITFOLD_SIMD Mask equal(I a, I b) {
  return each<Mask>([&](int i) { return a.v[i] == b.v[i]; });
}
BITFOLD_SIMD Mask both(Mask a, Mask b) {
  return each<Mask>([&](int i) { return a.v[i] && b.v[i]; });
}
BITFOLD_SIMD Mask either(Mask a, Mask b) {
  return each<Mask>([&](int i) { return a.v[i] || b.v[i]; });
}
BITFOLD_SIMD Mask opposite(Mask a) {
  return each<Mask>([&](int i) { return !a.v[i]; });
}
BITFOLD_SIMD bool any(Mask a) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found = found || a.v[i];
  return found;
}
// Bit i for lane i.
BITFOLD_SIMD uint32_t bits(Mask a) {
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i) out |= static_cast<uint32_t>(a.v[i]) << i;
  return out;
}
BITFOLD_SIMD F select(Mask m, F a, F b) {
  return each<F>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
BITFOLD_SIMD I select(Mask m, I a, I b) {
  return each<I>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
// count + 1 where the mask is set.
BITFOLD_SIMD I count_if(Mask m, I count) {
  return each<I>([&](int i) { return count.v[i] + (m.v[i] ? 1 : 0); });
}

struct Table16 {
  const float* values;
};
BITFOLD_SIMD Table16 load_table(const float* values) { return {values}; }
BITFOLD_SIMD F lookup(Table16 table, I index) {  // the low four bits of each index count
  return each<F>([&](int i) { return table.values[index.v[i] & 15]; });
}

struct Table32 {
  const float* values;
};
BITFOLD_SIMD Table32 load_table32(const float* values) { return {values}; }
BITFOLD_SIMD F lookup(Table32 table, I index) {  // the low five bits of each index count
  return each<F>([&](int i) { return table.values[index.v[i] & 31]; });
}

BITFOLD_SIMD I load_int(const int32_t* p) {
  return each<I>([&](int i) { return p[i]; });
}
BITFOLD_SIMD void store_int(int32_t* p, I a) { std::memcpy(p, a.v, sizeof(a.v)); }
BITFOLD_SIMD F gather(const float* p, I index) {
  return each<F>([&](int i) { return p[index.v[i]]; });
}
// A gather within p[0 .. kLanes).
BITFOLD_SIMD F spread(const float* p, I index) { return gather(p, index); }

// The next 8 codes of 3 bits, or 32 bits of any others, in each lane; what lies above the codes is not theirs.
template <int Bits>
BITFOLD_SIMD I load_words(const uint8_t* p) {
  constexpr int kBytes = Bits == 3 ? 3 : 4;
  return each<I>([&](int i) { return static_cast<int32_t>(load_word<kBytes>(p + i * kBytes)); });
}

// kLanes codes of Bits bits that start at a byte; the even one of a byte may sit in its high nibble.
template <int Bits, bool HighFirst>
BITFOLD_SIMD I unpack(const uint8_t* p) {
  if constexpr (Bits == 8) {
    return each<I>([&](int i) { return p[i]; });
  } else {
    const uint32_t word = load_word<Bits>(p);
    return each<I>(
        [&](int i) { return static_cast<int32_t>(word >> (Bits * (HighFirst ? i ^ 1 : i)) & ((1u << Bits) - 1u)); });
  }
}
BITFOLD_SIMD void store_bytes(uint8_t* p, I a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}

// Lane j of row i <-> lane i of row j.
BITFOLD_SIMD void transpose(F (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float above = rows[j].v[i];
      rows[j].v[i] = rows[i].v[j];
      rows[i].v[j] = above;
    }
  }
}

// Lane i of the result is op over all lanes of rows[i], in any order.
template <class Op>
BITFOLD_SIMD F across(const F (&rows)[kLanes], Op op) {
  F columns[kLanes];
  std::memcpy(columns, rows, sizeof(columns));
  transpose(columns);
  F out = columns[0];
  for (int i = 1; i < kLanes; ++i) out = op(out, columns[i]);
  return out;
}

// Sums and extremes over the lanes, in one fixed order.
BITFOLD_SIMD float reduce_add(F a) {
  const float s0 = a.v[0] + a.v[4], s1 = a.v[1] + a.v[5], s2 = a.v[2] + a.v[6], s3 = a.v[3] + a.v[7];
  return (s0 + s2) + (s1 + s3);
}
// to[i] += the sum over the lanes of sums[i].
BITFOLD_SIMD void add_reduced(const F (&sums)[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] += reduce_add(sums[i]);
}
BITFOLD_SIMD float reduce_max(F a) {
  float out = a.v[0];
  for (int i = 1; i < kLanes; ++i) out = a.v[i] > out ? a.v[i] : out;
  return out;
}
BITFOLD_SIMD float reduce_min(F a) {
  float out = a.v[0];
  for (int i = 1; i < kLanes; ++i) out = a.v[i] < out ? a.v[i] : out;
  return out;
}

// ---- bytes: an I as four codes in each lane, the lowest first; four lanes are a quarter ----

// 32 bytes for every 8 lanes, and 16 for every quarter, each of them `stride` bytes after the one before.
BITFOLD_SIMD I load_halves(const uint8_t* p, int64_t) { return load_words<8>(p); }
BITFOLD_SIMD I load_quarters(const uint8_t* p, int64_t stride) {
  I out;
  for (int q = 0; q < kLanes / 4; ++q) std::memcpy(out.v + 4 * q, p + q * stride, 16);
  return out;
}
// Quarter q goes to `to` + 16 at[q].
BITFOLD_SIMD void store_quarters(uint8_t* to, const int (&at)[kLanes / 4], I a) {
  for (int q = 0; q < kLanes / 4; ++q) std::memcpy(to + 16 * at[q], a.v + 4 * q, 16);
}
BITFOLD_SIMD I shift_right(I a, I counts) {
  return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> counts.v[i]); });
}

struct Bytes16 {
  const uint8_t* values;
};
BITFOLD_SIMD Bytes16 load_bytes16(const uint8_t* values) { return {values}; }
BITFOLD_SIMD I lookup_bytes(Bytes16 table, I index) {  // all index bytes are below 16
  uint8_t bytes[4 * kLanes];
  std::memcpy(bytes, index.v, sizeof(bytes));
  for (uint8_t& byte : bytes) byte = table.values[byte];
  return load_words<8>(bytes);
}
// 16 in every byte whose bit is set: bit b is that of byte b.
BITFOLD_SIMD I spread_bits(uint64_t bits) {
  uint8_t bytes[4 * kLanes];
  for (int b = 0; b < 4 * kLanes; ++b) bytes[b] = static_cast<uint8_t>((bits >> b & 1) << 4);
  return load_words<8>(bytes);
}

// Lane i is a[index[i]].
BITFOLD_SIMD F permute(F a, I index) {
  return each<F>([&](int i) { return a.v[index.v[i]]; });
}
// The bytes of `low`, then those of `high`, one in each lane; the eight lanes of some sets hold only the first.
BITFOLD_SIMD I widen_bytes(uint64_t low, uint64_t) {
  return each<I>([&](int i) { return static_cast<int32_t>(low >> 8 * i & 255); });
}
// The halves of `low`, then those of `high`, in the first kLanes / 2 lanes; zeros follow.
BITFOLD_SIMD F widen_halves(uint64_t low, uint64_t) {
  return each<F>([&](int i) { return i < 4 ? half_to_float(static_cast<uint16_t>(low >> 16 * i)) : 0.0f; });
}
BITFOLD_SIMD F splat_half(uint16_t bits) { return splat(half_to_float(bits)); }

// ---- rows in lanes, and products of bytes ----

// In each quarter (four lanes), lane j of vector i <-> lane i of vector j.
BITFOLD_SIMD void transpose_quarters(I (&v)[4]) {
  for (int q = 0; q < kLanes; q += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const int32_t above = v[j].v[q + i];
        v[j].v[q + i] = v[i].v[q + j];
        v[i].v[q + j] = above;
      }
    }
  }
}
// The half in the lower 16 bits of each lane.
BITFOLD_SIMD F low_halves(I a) {
  return each<F>([&](int i) { return half_to_float(static_cast<uint16_t>(a.v[i])); });
}
// ---- an I as 2 * kLanes words of 16 bits, in the order of memory ----

BITFOLD_SIMD I each_word(I a, uint16_t (*fn)(uint16_t)) {
  uint16_t words[2 * kLanes];
  std::memcpy(words, a.v, sizeof(words));
  for (uint16_t& word : words) word = fn(word);
  std::memcpy(a.v, words, sizeof(words));
  return a;
}
template <int Count>
BITFOLD_SIMD I shift_words_left(I a) {
  return each_word(a, [](uint16_t word) { return static_cast<uint16_t>(word << Count); });
}
template <int Count>
BITFOLD_SIMD I shift_words_right_signed(I a) {
  return each_word(a, [](uint16_t word) { return static_cast<uint16_t>(static_cast<int16_t>(word) >> Count); });
}
// The first kLanes words as halves, or the others.
template <int Part>
BITFOLD_SIMD F halves_of(I a) {
  uint16_t words[2 * kLanes];
  std::memcpy(words, a.v, sizeof(words));
  return load_half(words + Part * kLanes);
}

// sum + the products of each lane's four unsigned bytes of w and four signed ones of x. Without Wide, the bytes of w
// are below 128, and the products are cheaper on some sets.
template <bool Wide>
BITFOLD_SIMD I dot_bytes(I sum, I w, I x) {
  return each<I>([&](int i) {
    int32_t out = sum.v[i];
    for (int b = 0; b < 32; b += 8) out += (w.v[i] >> b & 255) * static_cast<int8_t>(x.v[i] >> b);
    return out;
  });
}
// sum + the products of each lane's two signed halves of a and b.
BITFOLD_SIMD I dot_pairs(I sum, I a, I b) {
  return each<I>([&](int i) {
    const int32_t low = static_cast<int16_t>(a.v[i]) * static_cast<int16_t>(b.v[i]);
    return sum.v[i] + low + (a.v[i] >> 16) * (b.v[i] >> 16);
  });
}

}  // namespace
}  // namespace bitfold::cpu
