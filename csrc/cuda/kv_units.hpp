// The units for matrices as attention to the packed KV cache uses them (kv_packed.hpp): 32 rows of codes at a step,
// times the numbers of four queries.
//
// Codes are the operand A, whose rows are tokens (of keys) or channels (of values) and whose columns are those that are
// summed over. Of both, numbers lie in memory with those that are summed over the furthest apart, so a lane takes eight
// neighbours of eight such rows, 4 t ... and 16 + 4 t ..., and crosses their bytes by moves. As the order of sums is no
// matter, rows are in the order in which they lie.
//
// The queries' numbers are B, which has two columns for each query: those that a lane's sums are of.
//
//   whole numbers (int8, int4)  bytes times bytes, with sums that are whole numbers too: a query's numbers, divided by
//                               a power of two, have four digits of 8 bits, in two columns of two products. So nothing
//                               is rounded but those digits (2^-30 of the largest) and the sum.
//   fp8                         halves times halves: a query's number is the sum of two, 22 bits of it, and its largest
//                               is below 2^15 after a power of two.
#pragma once

#include "cuda/kv_chunk.hpp"

namespace bitfold::cuda {

// Where a lane's four numbers x of rows 4 u ... of query q go to in B: the even column has `even`, the odd one `odd`.
// Lanes of neighbouring queries write different columns at once, which lie in different banks.
struct KvColumns {
  int query, half, t;

  BITFOLD_DEVICE KvColumns() : query(ptx::lane_id() / 8), half(ptx::lane_id() / 4 % 2), t(ptx::lane_id() % 4) {}
  BITFOLD_DEVICE bool odd_first() const { return query % 2 != 0; }
  BITFOLD_DEVICE void write(uint32_t* b, const uint2& first, const uint2& second) const {
    const int at = ((2 * query + query % 2) * 4 + t) * 4 + 2 * half;
    *reinterpret_cast<uint2*>(b + at) = first;
    *reinterpret_cast<uint2*>(b + (at ^ 16)) = second;
  }
};

template <KvFormat Format>
class KvWholes {
 public:
  using Word = KvWord<Format>;

  struct Power {
    float unit, inverse;
    BITFOLD_DEVICE explicit Power(uint32_t largest) {
      const int exponent = smaller(larger(static_cast<int>(largest >> 23), 30), 254);
      unit = ptx::uint_as_float(largest >= 0x7f800000u ? 0x7fc00000u : static_cast<uint32_t>(exponent - 29) << 23);
      inverse = ptx::uint_as_float(static_cast<uint32_t>(283 - exponent) << 23);
    }
  };

  BITFOLD_DEVICE static void write(const KvColumns& columns, uint32_t* b, const float4& x, float inverse) {
    const uint32_t d[4] = {digits(x.x * inverse), digits(x.y * inverse), digits(x.z * inverse), digits(x.w * inverse)};
    const uint32_t low[2] = {ptx::prmt(d[0], d[1], 0x5140u), ptx::prmt(d[2], d[3], 0x5140u)};
    const uint32_t high[2] = {ptx::prmt(d[0], d[1], 0x7362u), ptx::prmt(d[2], d[3], 0x7362u)};
    const uint32_t first = columns.odd_first() ? 0x5410u : 0x7632u, second = first ^ (0x5410u ^ 0x7632u);
    columns.write(b, {ptx::prmt(high[0], high[1], first), ptx::prmt(low[0], low[1], first)},
                  {ptx::prmt(high[0], high[1], second), ptx::prmt(low[0], low[1], second)});
  }

  BITFOLD_DEVICE void add(const Word (&words)[8], const uint4& b) {
    const uint32_t high[2] = {b.x, b.z}, low[2] = {b.y, b.w};
    uint32_t a[4][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Word* w = words + 4 * half;
      uint32_t r[4];
      if constexpr (Format == KvFormat::Int4) {
        cross(w[0], w[1], w[2], w[3], r);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i][2 * half] = r[i] & 0x0f0f0f0fu;
          a[i][2 * half + 1] = r[i] & 0xf0f0f0f0u;
        }
      } else {
        cross(w[0].x, w[1].x, w[2].x, w[3].x, r);
        a[0][2 * half] = r[0], a[0][2 * half + 1] = r[1], a[1][2 * half] = r[2], a[1][2 * half + 1] = r[3];
        cross(w[0].y, w[1].y, w[2].y, w[3].y, r);
        a[2][2 * half] = r[0], a[2][2 * half + 1] = r[1], a[3][2 * half] = r[2], a[3][2 * half + 1] = r[3];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::mma_u8s8(high_[i], a[i], high);
      ptx::mma_u8s8(low_[i], a[i], low);
    }
  }

  // The sum of number i, + more.
  BITFOLD_DEVICE float sum(int i, float unit, float more) const {
    const int at = i % 2 * 2;
    if (Format == KvFormat::Int4 && i % 2 != 0) unit *= 0x1p-4f;  // the high half of a byte as it lies
    const int high = high_[i / 2][at] * 256 + high_[i / 2][at + 1], low = low_[i / 2][at] * 256 + low_[i / 2][at + 1];
    return ptx::fma(static_cast<float>(high), unit * 0x1p16f, ptx::fma(static_cast<float>(low), unit, more));
  }

 private:
  // Four digits of 8 bits with a sign, the last in the lowest byte.
  BITFOLD_DEVICE static uint32_t digits(float x) {
    return (static_cast<uint32_t>(ptx::float_to_int(x)) + 0x808080u) ^ 0x808080u;
  }
  // Bytes i of four words.
  BITFOLD_DEVICE static void cross(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t (&out)[4]) {
    const uint32_t low[2] = {ptx::prmt(a, b, 0x5140u), ptx::prmt(c, d, 0x5140u)};
    const uint32_t high[2] = {ptx::prmt(a, b, 0x7362u), ptx::prmt(c, d, 0x7362u)};
    out[0] = ptx::prmt(low[0], low[1], 0x5410u), out[1] = ptx::prmt(low[0], low[1], 0x7632u);
    out[2] = ptx::prmt(high[0], high[1], 0x5410u), out[3] = ptx::prmt(high[0], high[1], 0x7632u);
  }

  int high_[4][4] = {}, low_[4][4] = {};
};

class KvHalves {
 public:
  using Word = KvWord<KvFormat::Fp8>;

  struct Power {
    float unit, inverse;
    BITFOLD_DEVICE explicit Power(uint32_t largest) {
      const int exponent = smaller(larger(static_cast<int>(largest >> 23), 15), 252);
      unit = ptx::uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
      inverse = ptx::uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
    }
  };

  BITFOLD_DEVICE static void write(const KvColumns& columns, uint32_t* b, const float4& x, float inverse) {
    uint2 number, rest;
    two(x.x * inverse, x.y * inverse, number.x, rest.x);
    two(x.z * inverse, x.w * inverse, number.y, rest.y);
    const bool odd = columns.odd_first();
    columns.write(b, odd ? rest : number, odd ? number : rest);
  }

  BITFOLD_DEVICE void add(const Word (&words)[8], const uint4& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4][4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const Word &first = words[4 * half + 2 * pair], &second = words[4 * half + 2 * pair + 1];
        operands(first.x, second.x, a[0], a[1], 2 * pair);
        operands(first.y, second.y, a[2], a[3], 2 * pair);
      }
      const uint32_t columns[2] = {half == 0 ? b.x : b.z, half == 0 ? b.y : b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::mma_f16(sums_[i], a[i], columns);
    }
  }

  BITFOLD_DEVICE float sum(int i, float unit, float more) const {
    return ptx::fma(sums_[i / 2][i % 2 * 2] + sums_[i / 2][i % 2 * 2 + 1], unit, more);
  }

 private:
  BITFOLD_DEVICE static void two(float x, float y, uint32_t& number, uint32_t& rest) {
    number = ptx::floats_to_halves(x, y);
    const float2 back = ptx::halves_to_floats(number);
    rest = ptx::floats_to_halves(x - back.x, y - back.y);
  }
  BITFOLD_DEVICE static void operands(uint32_t first, uint32_t second, uint32_t (&low)[4], uint32_t (&high)[4],
                                      int at) {
    const uint32_t pairs = ptx::prmt(first, second, 0x5140u), more = ptx::prmt(first, second, 0x7362u);
    low[at] = ptx::e4m3s_to_halves(pairs & 0xffffu), low[at + 1] = ptx::e4m3s_to_halves(pairs >> 16);
    high[at] = ptx::e4m3s_to_halves(more & 0xffffu), high[at + 1] = ptx::e4m3s_to_halves(more >> 16);
  }

  float sums_[4][4] = {};
};

template <KvFormat Format>
using KvSums = std::conditional_t<Format == KvFormat::Fp8, KvHalves, KvWholes<Format>>;

}  // namespace bitfold::cuda
