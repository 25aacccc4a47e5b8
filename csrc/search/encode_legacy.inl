// Blocks whose scale follows from their range: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4.
//
// As many blocks as there are lanes are under way: a lane holds the range and the scale of one, and then the codes of
// one block after the other are chosen. An extreme does not depend on the order in which it is sought, but its sign
// does, also a zero's: where that counts, the first number that equals it is taken.
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
  return w[std::countr_zero(found)];
}

// Lane b: op over view(numbers) of block b. Lanes past the last block repeat it.
template <class View, class Op>
BITFOLD_SIMD F over_blocks(const float* w, int count, View view, Op op) {
  F rows[kLanes];
  for (int b = 0; b < kLanes; ++b) {
    const float* x = w + smaller(b, count - 1) * kSmall;
    rows[b] = view(load(x));
    for (int v = 1; v < kSmallVectors; ++v) rows[b] = op(rows[b], view(load(x + v * kLanes)));
  }
  return across(rows, op);
}
BITFOLD_SIMD F largest_of_blocks(const float* w, int count) {
  return over_blocks(w, count, [](F x) { return x; }, [](F a, F b) { return max(a, b); });
}
BITFOLD_SIMD F smallest_of_blocks(const float* w, int count) {
  return over_blocks(w, count, [](F x) { return x; }, [](F a, F b) { return min(a, b); });
}
BITFOLD_SIMD F largest_magnitudes(const float* w, int count) {
  return over_blocks(w, count, [](F x) { return abs(x); }, [](F a, F b) { return max(a, b); });
}

// Sets the lanes of `which` to the first number of their block that equals them in magnitude.
BITFOLD_SIMD F settle(const float* w, int count, F values, Mask which) {
  uint32_t open = bits(which);
  if (open == 0) return values;
  float lanes[kLanes];
  store(lanes, values);
  for (; open != 0; open &= open - 1) {
    const int b = std::countr_zero(open);
    lanes[b] = first_equal(w + smaller(b, count - 1) * kSmall, lanes[b]);
  }
  return load(lanes);
}

// The first number of the largest magnitude, +0 where all are zeros.
BITFOLD_SIMD F furthest_of_blocks(const float* w, int count) {
  const F zero = splat(0.0f), high = largest_of_blocks(w, count), low = smallest_of_blocks(w, count);
  const F below = sub(zero, low);
  const F further = add(select(greater(below, high), low, high), zero);
  return settle(w, count, further, both(equal(below, high), greater(high, zero)));
}

// codes = trunc((w - low) inverse + half). Where the inverse overflows, the codes are 0, and so are inverse and half.
struct Steps {
  float inverse[kLanes], half[kLanes];
  uint16_t scale[kLanes];

  BITFOLD_SIMD Steps(F step, float to_nearest) {
    const F exact = div(splat(1.0f), step);
    const Mask zero = equal(step, splat(0.0f));
    const Mask infinite = greater(abs(exact), splat(3.4028234664e38f));
    store(inverse, select(either(zero, infinite), splat(0.0f), exact));
    store(half, select(both(infinite, opposite(zero)), splat(0.0f), splat(to_nearest)));
    store_half(scale, step);
  }
};

// each(w, blocks, count) for so many blocks at a time.
template <int Row, class Each>
BITFOLD_SIMD void each_chunk(const EncodeBlocksArgs& a, Each each) {
  const int64_t blocks = a.rows * (a.k / kSmall);
  for (int64_t b = 0; b < blocks; b += kLanes) {
    each(a.w + b * kSmall, reinterpret_cast<Block<Row>*>(a.blocks) + b, static_cast<int>(smaller(kLanes, blocks - b)));
  }
}

// Q4_0 and Q5_0: the furthest number has code 0, and 0 the code H.
template <int Row, int H>
BITFOLD_BODY void encode_centred(const EncodeBlocksArgs& a) {
  each_chunk<Row>(a, [](const float* w, Block<Row>* blocks, int count) {
    const Steps steps(div(furthest_of_blocks(w, count), splat(-static_cast<float>(H))), H + 0.5f);
    for (int b = 0; b < count; ++b) {
      const F inverse = splat(steps.inverse[b]), half = splat(steps.half[b]), top = splat(2 * H - 0.5f);
      I codes[kSmallVectors];
      block_codes(w + b * kSmall, codes, [&](F x) { return to_int(min(add(mul(x, inverse), half), top)); });
      put_half(blocks[b].d, steps.scale[b]);
      if constexpr (Row == kQ4_0) put_nibbles(blocks[b].qs, codes);
      else put_fives(blocks[b].qh, blocks[b].qs, codes);
    }
  });
}

// Q4_1 and Q5_1: codes 0 .. M from the smallest number to the largest.
template <int Row, int M>
BITFOLD_BODY void encode_ranged(const EncodeBlocksArgs& a) {
  each_chunk<Row>(a, [](const float* w, Block<Row>* blocks, int count) {
    const F high = largest_of_blocks(w, count), smallest = smallest_of_blocks(w, count);
    const F low = settle(w, count, smallest, equal(smallest, splat(0.0f)));
    // A zero's sign is lost by the sum: a block of one number has the step +0.
    const F range = add(sub(high, low), splat(0.0f));
    const Steps steps(div(range, splat(static_cast<float>(M))), 0.5f);
    uint16_t minima[kLanes];
    store_half(minima, low);
    float lows[kLanes];
    store(lows, low);
    for (int b = 0; b < count; ++b) {
      const F low = splat(lows[b]), inverse = splat(steps.inverse[b]), half = splat(steps.half[b]);
      I codes[kSmallVectors];
      block_codes(w + b * kSmall, codes, [&](F x) {  // a range beyond binary32 gives NaN, whose code is 0
        const F place = add(mul(sub(x, low), inverse), half);
        return to_int(min(max(place, splat(0.0f)), splat(M + 0.5f)));
      });
      put_half(blocks[b].d, steps.scale[b]);
      put_half(blocks[b].m, minima[b]);
      if constexpr (Row == kQ4_1) put_nibbles(blocks[b].qs, codes);
      else put_fives(blocks[b].qh, blocks[b].qs, codes);
    }
  });
}

// The nearest integer, ties away from zero, of |x| < 2^22: the largest number below a half, with x's sign, carries
// exactly what is a half and more beyond the next integer.
BITFOLD_SIMD I round_away(F x) {
  const I sign = bit_and(as_int(x), splat(INT32_MIN));
  return to_int(add(x, as_float(bit_or(sign, as_int(splat(0.49999997f))))));
}

BITFOLD_BODY void encode_q8_0(const EncodeBlocksArgs& a) {
  each_chunk<kQ8_0>(a, [](const float* w, Block<kQ8_0>* blocks, int count) {
    const Steps steps(div(largest_magnitudes(w, count), splat(127.0f)), 0.0f);
    for (int b = 0; b < count; ++b) {
      const F inverse = splat(steps.inverse[b]);
      I codes[kSmallVectors];
      block_codes(w + b * kSmall, codes, [&](F x) { return bit_and(round_away(mul(x, inverse)), splat(255)); });
      put_half(blocks[b].d, steps.scale[b]);
      for (int v = 0; v < kSmallVectors; ++v)
        store_bytes(reinterpret_cast<uint8_t*>(blocks[b].qs) + v * kLanes, codes[v]);
    }
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

BITFOLD_BODY void encode_mxfp4(const EncodeBlocksArgs& a) {
  each_chunk<kMxfp4>(a, [](const float* w, Block<kMxfp4>* blocks, int count) {
    float largest[kLanes];
    store(largest, largest_magnitudes(w, count));
    for (int b = 0; b < count; ++b) {
      blocks[b].e = mxfp4_exponent(largest[b]);
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
      block_codes(w + b * kSmall, codes, [&](F lanes) {
        I code = splat(0);
        for (const F midpoint : midpoints) code = count_if(greater(abs(lanes), midpoint), code);
        const I sign = bit_and(shift_right<28>(as_int(lanes)), splat(8));
        return select(greater(code, splat(0)), bit_or(code, sign), code);
      });
      put_nibbles(blocks[b].qs, codes);
    }
  });
}

}  // namespace

}  // namespace bitfold::search
