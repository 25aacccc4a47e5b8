// Blocks whose scale follows from their range: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4.
//
// Each weight is read from memory once. As many blocks as there are lanes are under way: a lane holds the range and the
// scale of one, and whether all of this is finite is seen on the way; then the codes of one block after the other are
// chosen. An extreme does not depend on the order in which it is sought, but its sign does, also a zero's: where that
// counts, the first number that equals it is taken.
#include <bit>
#include <limits>

#include "search/small_blocks.inl"

namespace bitfold::search {
namespace {

// The first of a block's numbers that equals `value` in magnitude.
BITFOLD_SIMD float first_equal(const float* w, float value) {
  uint32_t found = 0;
  for (int v = 0; v < kSmallVectors; ++v) {
    found |= bits(equal(abs(load(w + v * kLanes)), abs(splat(value)))) << v * kLanes;
  }
  return w[lowest_one(found)];
}

// Numbers that are asked for ahead: the weight is read here for the first time. Of a block's two lines one is asked for
// when its range is sought, and one when its codes are chosen, so that memory is busy all the time.
inline constexpr int64_t kAhead = 3072;
static_assert(kSmall * sizeof(float) == 2 * 64);

// each(b, numbers) for the kLanes blocks of a chunk; blocks past the last repeat it. Whether all numbers are finite.
template <class Each>
BITFOLD_SIMD bool each_block(const float* w, int count, Each each) {
  F odd = splat(0.0f);  // NaN in the lanes that met a NaN or an infinity
  for (int b = 0; b < kLanes; ++b) {
    const float* x = w + smaller(b, count - 1) * kSmall;
    prefetch(x + kAhead);
    F numbers[kSmallVectors];
    for (int v = 0; v < kSmallVectors; ++v) {
      numbers[v] = load(x + v * kLanes);
      odd = fma(numbers[v], splat(0.0f), odd);
    }
    each(b, numbers);
  }
  return !any(opposite(equal(odd, splat(0.0f))));
}

// Of each block of a chunk, a lane each: the smallest number and the largest.
struct Ranges {
  F low, high;
  bool finite;
  BITFOLD_SIMD Ranges(const float* w, int count) {
    F lows[kLanes], highs[kLanes];
    finite = each_block(w, count, [&](int b, const F(&numbers)[kSmallVectors]) {
      lows[b] = highs[b] = numbers[0];
      for (int v = 1; v < kSmallVectors; ++v) {
        lows[b] = min(lows[b], numbers[v]);
        highs[b] = max(highs[b], numbers[v]);
      }
    });
    low = across(lows, [](F a, F b) { return min(a, b); });
    high = across(highs, [](F a, F b) { return max(a, b); });
  }
};

// The same: the largest magnitude.
struct Magnitudes {
  F largest;
  bool finite;
  BITFOLD_SIMD Magnitudes(const float* w, int count) {
    F all[kLanes];
    finite = each_block(w, count, [&](int b, const F(&numbers)[kSmallVectors]) {
      all[b] = abs(numbers[0]);
      for (int v = 1; v < kSmallVectors; ++v) all[b] = max(all[b], abs(numbers[v]));
    });
    largest = across(all, [](F a, F b) { return max(a, b); });
  }
};

template <class Code>
BITFOLD_SIMD void choose_codes(const float* x, I (&codes)[kSmallVectors], Code code) {
  prefetch(x + kSmall / 2 + kAhead);
  block_codes(x, codes, code);
}

// Sets the lanes of `which` to the first number of their block that equals them in magnitude.
BITFOLD_SIMD F settle(const float* w, int count, F values, Mask which) {
  uint32_t open = bits(which);
  if (open == 0) return values;
  float lanes[kLanes];
  store(lanes, values);
  for (; open != 0; open &= open - 1) {
    const int b = lowest_one(open);
    lanes[b] = first_equal(w + smaller(b, count - 1) * kSmall, lanes[b]);
  }
  return load(lanes);
}

// The first number of the largest magnitude, +0 where all are zeros.
BITFOLD_SIMD F furthest(const float* w, int count, const Ranges& range) {
  const F zero = splat(0.0f), below = sub(zero, range.low);
  const F further = add(select(greater(below, range.high), range.low, range.high), zero);
  return settle(w, count, further, both(equal(below, range.high), greater(range.high, zero)));
}

// Whether these become finite halves.
BITFOLD_SIMD bool fit(F scales) { return !any(opposite(greater(splat(65520.0f), abs(scales)))); }

// codes = trunc((w - low) inverse + half). Where the inverse overflows, the codes are 0, and so are inverse and half.
struct Steps {
  float inverse[kLanes], half[kLanes];
  uint16_t scale[kLanes];
  bool fitting;

  BITFOLD_SIMD Steps(F step, float to_nearest) {
    const F exact = div(splat(1.0f), step);
    const Mask zero = equal(step, splat(0.0f));
    const Mask infinite = greater(abs(exact), splat(3.4028234664e38f));
    store(inverse, select(either(zero, infinite), splat(0.0f), exact));
    store(half, select(both(infinite, opposite(zero)), splat(0.0f), splat(to_nearest)));
    store_half(scale, step);
    fitting = fit(step);
  }
};

// What came of a chunk.
enum class Outcome : uint8_t { Sound, Overflow, NotFinite };

// each(w, blocks, count) for kLanes blocks at a time; whether all of them are sound.
template <int Row, class Each>
BITFOLD_SIMD bool each_chunk(const EncodeBlocksArgs& a, Each each) {
  const int64_t blocks = a.rows * (a.k / kSmall);
  bool sound = true;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const float* w = a.w + b * kSmall;
    auto* to = reinterpret_cast<Block<Row>*>(a.blocks) + b;
    prefetch_page(w);
    prefetch_page(to);
    const Outcome outcome = each(w, to, static_cast<int>(smaller(kLanes, blocks - b)));
    if (outcome == Outcome::NotFinite) return false;
    sound = sound && outcome == Outcome::Sound;
  }
  return sound;
}

// Q4_0 and Q5_0: the furthest number has code 0, and 0 the code H.
template <int Row, int H>
BITFOLD_BODY bool encode_centred(const EncodeBlocksArgs& a) {
  return each_chunk<Row>(a, [](const float* w, Block<Row>* blocks, int count) {
    const Ranges range(w, count);
    if (!range.finite) return Outcome::NotFinite;
    const Steps steps(div(furthest(w, count, range), splat(-static_cast<float>(H))), H + 0.5f);
    for (int b = 0; b < count; ++b) {
      const F inverse = splat(steps.inverse[b]), half = splat(steps.half[b]), top = splat(2 * H - 0.5f);
      I codes[kSmallVectors];
      choose_codes(w + b * kSmall, codes, [&](F x) { return to_int(min(add(mul(x, inverse), half), top)); });
      put_half(blocks[b].d, steps.scale[b]);
      if constexpr (Row == kQ4_0) put_nibbles(blocks[b].qs, codes);
      else put_fives(blocks[b].qh, blocks[b].qs, codes);
    }
    return steps.fitting ? Outcome::Sound : Outcome::Overflow;
  });
}

// Q4_1 and Q5_1: codes 0 .. M from the smallest number to the largest.
template <int Row, int M>
BITFOLD_BODY bool encode_ranged(const EncodeBlocksArgs& a) {
  return each_chunk<Row>(a, [](const float* w, Block<Row>* blocks, int count) {
    const Ranges range(w, count);
    if (!range.finite) return Outcome::NotFinite;
    const F low = settle(w, count, range.low, equal(range.low, splat(0.0f)));
    // A zero's sign is lost by the sum: a block of one number has the step +0.
    const F width = add(sub(range.high, low), splat(0.0f));
    const Steps steps(div(width, splat(static_cast<float>(M))), 0.5f);
    uint16_t minima[kLanes];
    store_half(minima, low);
    float lows[kLanes];
    store(lows, low);
    for (int b = 0; b < count; ++b) {
      const F low = splat(lows[b]), inverse = splat(steps.inverse[b]), half = splat(steps.half[b]);
      I codes[kSmallVectors];
      choose_codes(w + b * kSmall, codes, [&](F x) {  // a range beyond binary32 gives NaN, whose code is 0
        const F place = add(mul(sub(x, low), inverse), half);
        return to_int(min(max(place, splat(0.0f)), splat(M + 0.5f)));
      });
      put_half(blocks[b].d, steps.scale[b]);
      put_half(blocks[b].m, minima[b]);
      if constexpr (Row == kQ4_1) put_nibbles(blocks[b].qs, codes);
      else put_fives(blocks[b].qh, blocks[b].qs, codes);
    }
    return steps.fitting && fit(low) ? Outcome::Sound : Outcome::Overflow;
  });
}

// The nearest integer, ties away from zero, of |x| < 2^22: the largest number below a half, with x's sign, carries
// exactly what is a half and more beyond the next integer.
BITFOLD_SIMD I round_away(F x) {
  const I sign = bit_and(as_int(x), splat(INT32_MIN));
  return to_int(add(x, as_float(bit_or(sign, as_int(splat(0.49999997f))))));
}

BITFOLD_BODY bool encode_q8_0(const EncodeBlocksArgs& a) {
  return each_chunk<kQ8_0>(a, [](const float* w, Block<kQ8_0>* blocks, int count) {
    const Magnitudes magnitudes(w, count);
    if (!magnitudes.finite) return Outcome::NotFinite;
    const Steps steps(div(magnitudes.largest, splat(127.0f)), 0.0f);
    for (int b = 0; b < count; ++b) {
      const F inverse = splat(steps.inverse[b]);
      I codes[kSmallVectors];
      choose_codes(w + b * kSmall, codes, [&](F x) { return bit_and(round_away(mul(x, inverse)), splat(255)); });
      put_half(blocks[b].d, steps.scale[b]);
      for (int v = 0; v < kSmallVectors; ++v)
        store_bytes(reinterpret_cast<uint8_t*>(blocks[b].qs) + v * kLanes, codes[v]);
    }
    return steps.fitting ? Outcome::Sound : Outcome::Overflow;
  });
}

// The stored exponent of MXFP4: floor(log2f(largest)) - 2 + 127, modulo 256. log2f rounds: just below a power of two,
// by up to a unit in the last place of its result, it gives the integer above.
BITFOLD_SIMD uint8_t mxfp4_exponent(float largest) {
  if (largest == 0.0f) return 0;
  uint32_t mantissa = std::bit_cast<uint32_t>(largest) & 0x7fffffu;
  int exponent = static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23) - 127, shift = 0;
  if (exponent == -127) {  // sub-normal: one shift makes the highest bit the implicit one
    shift = std::countl_zero(mantissa) - 8;
    exponent = -126 - shift;
    mantissa = mantissa << shift & 0x7fffffu;
  }
  const uint32_t magnitude = static_cast<uint32_t>(exponent >= 0 ? exponent : -exponent - 1);
  const int digits = magnitude < 2 ? 0 : 31 - std::countl_zero(magnitude);
  // ln(2) 2^digits mantissas: half a unit of a logarithm of so many binary digits before the point.
  const uint32_t rounded_up = digits == 0 ? 0u : static_cast<uint32_t>(0.6931f * static_cast<float>(1 << digits));
  if (mantissa >= 0x800000u - rounded_up) ++exponent;
  return static_cast<uint8_t>(exponent - 2 + 127);
}

BITFOLD_BODY bool encode_mxfp4(const EncodeBlocksArgs& a) {
  return each_chunk<kMxfp4>(a, [](const float* w, Block<kMxfp4>* blocks, int count) {
    const Magnitudes magnitudes(w, count);
    if (!magnitudes.finite) return Outcome::NotFinite;
    float largest[kLanes];
    store(largest, magnitudes.largest);
    bool fitting = true;
    for (int b = 0; b < count; ++b) {
      blocks[b].e = mxfp4_exponent(largest[b]);
      fitting = fitting && blocks[b].e < kMxfp4Wrapped;
      // A code counts the midpoints below the magnitude; a tie belongs to the smaller one. Distances to the two
      // neighbours that decide are exact. Where eight steps are beyond binary32, no number is nearer to them.
      const F step = splat(mxfp4_step(blocks[b].e));
      F midpoints[7];
      for (size_t i = 0; i < 7; ++i) {
        midpoints[i] = mul(splat(0.5f * static_cast<float>(kMxfp4Values[i] + kMxfp4Values[i + 1])), step);
      }
      midpoints[5] =
          select(greater(step, splat(0x1p124f)), splat(std::numeric_limits<float>::infinity()), midpoints[5]);
      I codes[kSmallVectors];
      choose_codes(w + b * kSmall, codes, [&](F lanes) {
        I code = splat(0);
        for (const F midpoint : midpoints) code = count_if(greater(abs(lanes), midpoint), code);
        const I sign = bit_and(shift_right<28>(as_int(lanes)), splat(8));
        return select(greater(code, splat(0)), bit_or(code, sign), code);
      });
      put_nibbles(blocks[b].qs, codes);
    }
    return fitting ? Outcome::Sound : Outcome::Overflow;
  });
}

}  // namespace
}  // namespace bitfold::search
