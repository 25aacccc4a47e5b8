// Instructions of one lane against loops over bits and integers that are wide enough for exact results.
#include <cmath>
#include <random>

#include "emulator_tests.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- bits ----

template <int Lut>
void check_lop3(std::mt19937& random) {
  for (int round = 0; round < 20; ++round) {
    const uint32_t a = random(), b = random(), c = random(), d = ptx::lop3<Lut>(a, b, c);
    for (int i = 0; i < 32; ++i) {
      const uint32_t index = 4 * (a >> i & 1u) + 2 * (b >> i & 1u) + (c >> i & 1u);
      expect((d >> i & 1u) == (Lut >> index & 1u), "lop3 " + std::to_string(Lut));
    }
  }
}
template <int... Luts>
void check_all_lop3(std::mt19937& random, std::integer_sequence<int, Luts...>) {
  (check_lop3<Luts>(random), ...);
}

CASE(lop3_is_its_table) {
  std::mt19937 random(1);
  check_all_lop3(random, std::make_integer_sequence<int, 256>());
  expect(ptx::lop3<(0xf0 & 0xcc) | 0xaa>(12, 10, 1) == ((12 & 10) | 1), "the table is f(0xf0, 0xcc, 0xaa)");
}

CASE(prmt_chooses_bytes_and_signs) {
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    const uint32_t a = random(), b = random(), selector = random() & 0xffffu,
                   d = ptx::prmt(a, b, selector | 0xabcd0000u);
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = selector >> 4 * i & 15u,
                     chosen = (nibble & 7u) < 4 ? a >> 8 * (nibble & 3u) : b >> 8 * (nibble & 3u);
      const uint32_t expected = nibble < 8 ? chosen & 255u : (chosen >> 7 & 1u) * 255u;
      expect((d >> 8 * i & 255u) == expected, "prmt");
    }
  }
}

CASE(words_are_shifted_counted_and_multiplied) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    const uint32_t a = random(), b = random(), shift = random() % 64;
    uint32_t shifted = 0;
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t from = i + shift % 32;
      shifted |= (from < 32 ? a >> from & 1u : b >> (from - 32) & 1u) << i;
    }
    expect(ptx::funnel_right(a, b, shift) == shifted, "funnel_right");
    const uint32_t word = a >> shift % 32;
    int ones = 0, zeros = 32;
    for (int i = 0; i < 32; ++i) {
      ones += word >> i & 1u;
      if (word >> i & 1u) zeros = 31 - i;
    }
    expect(ptx::popc(word) == ones && ptx::clz(word) == zeros, "popc, clz");
    int64_t sum = static_cast<int>(random()) / 4;
    const auto start = static_cast<int>(sum);
    for (int i = 0; i < 4; ++i) {
      const auto signed_byte = [i](uint32_t w) { return static_cast<int64_t>((w >> 8 * i & 255u) ^ 128u) - 128; };
      sum += signed_byte(a) * signed_byte(b);
    }
    expect(ptx::dp4a(static_cast<int>(a), static_cast<int>(b), start) == sum, "dp4a");
  }
}

// ---- exact arithmetic: a number is an integer times 2^-kUnit ----

using Wide = __int128;
constexpr int kUnit = 60;

struct Small {  // half or bf16 as its definition has them
  int mantissa_bits;
  int smallest_exponent;  // of a normal number
  uint32_t infinity;

  Wide exact(uint32_t code) const {
    const int exponent = static_cast<int>(code & 0x7fffu) >> mantissa_bits;
    const uint32_t fraction = code & ((1u << mantissa_bits) - 1u);
    const uint32_t mantissa = exponent ? fraction | 1u << mantissa_bits : fraction;
    const int shift = kUnit + smallest_exponent + std::max(exponent, 1) - 1 - mantissa_bits;
    const Wide size = shift >= 0 ? static_cast<Wide>(mantissa) << shift : 0;  // below the unit: the tests draw none
    return code & 0x8000u ? -size : size;
  }

  // Nearest, to even; negative says what zero's sign is.
  uint32_t round(Wide x, bool negative) const {
    if (x == 0) return negative ? 0x8000u : 0u;
    negative = x < 0;
    const unsigned __int128 size = x < 0 ? -static_cast<unsigned __int128>(x) : static_cast<unsigned __int128>(x);
    int top = -1;
    for (int i = 0; i < 127; ++i) top = size >> i & 1u ? i : top;
    const int exponent = std::max(top - kUnit, smallest_exponent);  // of the binade
    const int drop = kUnit + exponent - mantissa_bits;              // bits below the last place
    unsigned __int128 kept = size, rest = 0;
    if (drop > 0) {
      kept = size >> drop;
      rest = size - (kept << drop);
      const unsigned __int128 half = static_cast<unsigned __int128>(1) << (drop - 1);
      if (rest > half || (rest == half && (kept & 1u))) ++kept;
    }
    // The mantissa's top bit adds one to the exponent field, as does a mantissa that was rounded up to the next binade.
    const auto code =
        static_cast<uint32_t>(kept) + (static_cast<uint32_t>(exponent - smallest_exponent) << mantissa_bits);
    return (negative ? 0x8000u : 0u) | std::min(code, infinity);
  }
};
constexpr Small kHalfNumbers{10, -14, 0x7c00};
constexpr Small kBf16Numbers{7, -126, 0x7f80};

bool is_nan(uint32_t code, const Small& numbers) { return (code & 0x7fffu) > numbers.infinity; }

// Codes at random, a good part of them close to each other so that sums cancel and meet ties.
template <class F>
void draw_codes(const Small& numbers, bool wide, F check) {
  std::mt19937 random(4);
  const uint32_t low = numbers.mantissa_bits == 10 ? 0 : (127 - (wide ? 25 : 12)) << 7;
  const uint32_t span = numbers.mantissa_bits == 10 ? 0x7c00 : (wide ? 50 : 24) << 7;
  for (int round = 0; round < 300000; ++round) {
    const auto draw = [&] { return (random() & 0x8000u) | (low + random() % span); };
    const uint32_t a = draw(), b = draw();
    uint32_t c = draw();
    if (round % 3 == 0) c = a ^ (random() & 0x8003u);
    check(a, b, c);
  }
}

CASE(arithmetic_of_halves_rounds_once) {
  const Small& h = kHalfNumbers;
  draw_codes(h, true, [&](uint32_t a, uint32_t b, uint32_t c) {
    const Wide x = h.exact(a), y = h.exact(b), z = h.exact(c);
    const Wide product = (x >> 36) * (y >> 36) << 12;  // units of 2^-24 each, to 2^-60
    const bool product_negative = (a ^ b) & 0x8000u;
    const uint32_t b_c = b | c << 16;
    expect(ptx::hadd2(a, b_c) == (h.round(x + y, a & b & 0x8000u) | h.round(z, false) << 16), "hadd2");
    expect((ptx::hsub2(a | a << 16, b_c) & 0xffffu) == h.round(x - y, a & ~b & 0x8000u), "hsub2");
    expect((ptx::hmul2(a, b_c) & 0xffffu) == h.round(product, product_negative), "hmul2");
    expect(ptx::hfma2(a << 16, b << 16, c << 16) >> 16 == h.round(product + z, product_negative && (c & 0x8000u)),
           "hfma2");
    expect((ptx::hmax2(a, b) & 0xffffu) == (x > y || (x == y && !(a & 0x8000u)) ? a : b), "hmax2");
    expect((ptx::hmin2(a, b) & 0xffffu) == (x < y || (x == y && (a & 0x8000u)) ? a : b), "hmin2");
    expect(ptx::habs2(a | b << 16) == ((a & 0x7fffu) | (b & 0x7fffu) << 16), "habs2");
  });
}

CASE(arithmetic_of_bf16s_rounds_once) {
  const Small& n = kBf16Numbers;
  draw_codes(n, false, [&](uint32_t a, uint32_t b, uint32_t c) {  // exponents of -12 to 11: products have 2^-38 as unit
    const Wide x = n.exact(a), y = n.exact(b), z = n.exact(c);
    const Wide product = (x >> 30) * (y >> 30);
    const bool product_negative = (a ^ b) & 0x8000u;
    expect((ptx::hadd2_bf16(a, b) & 0xffffu) == n.round(x + y, a & b & 0x8000u), "hadd2_bf16");
    expect((ptx::hsub2_bf16(a, b) & 0xffffu) == n.round(x - y, a & ~b & 0x8000u), "hsub2_bf16");
    expect((ptx::hmul2_bf16(a, b) & 0xffffu) == n.round(product, product_negative), "hmul2_bf16");
    expect(ptx::hfma2_bf16(a << 16, b << 16, c << 16) >> 16 == n.round(product + z, product_negative && (c & 0x8000u)),
           "hfma2_bf16");
  });
  // A tie that a third number far below decides, by its sign.
  const uint32_t tie_a = 0x3f81, tie_b = 0x3fc0;  // 1.0078125 x 1.5 = 1.51171875, between 1.5078125 and 1.515625
  const uint32_t even = ptx::hmul2_bf16(tie_a, tie_b) & 0xffffu;
  const uint32_t above = ptx::hfma2_bf16(tie_a, tie_b, 0x0080) & 0xffffu,
                 below = ptx::hfma2_bf16(tie_a, tie_b, 0x8080) & 0xffffu;
  expect(above == 0x3fc2 && below == 0x3fc1 && (even == above || even == below), "tie");
}

CASE(nan_comes_out_as_one_pattern) {
  expect(ptx::hadd2(0x7e00, 0x3c00) == 0x7fff && ptx::hfma2(0x7c00, 0, 0) == 0x7fff, "halves");
  expect(ptx::hmul2_bf16(0x7f81, 0x3f80) == 0x7fff && ptx::hadd2_bf16(0x7f80, 0xff80) == 0x7fff, "bf16s");
  expect(ptx::float_to_half(NAN) == 0x7fff && ptx::float_to_bf16(-NAN) == 0x7fff, "conversions");
  for (const float nan : {ptx::add(INFINITY, -INFINITY), ptx::mul(0.0f, INFINITY), ptx::div(0.0f, 0.0f),
                          ptx::sqrt(-1.0f), ptx::fma(1.0f, -NAN, 1.0f)}) {
    expect(ptx::float_as_uint(nan) == 0x7fffffff, "floats");
  }
  expect(ptx::hmax2(0x7e00, 0x3c00) == 0x3c00 && ptx::hmin2(0xbc00, 0x7fff) == 0xbc00,
         "the number of a number and a NaN");
  expect(ptx::hmul2(0x7bff, 0x7bff) == 0x7c00 && ptx::hadd2(0xfbff, 0xfbff) == 0xfc00, "beyond the largest");
}

// ---- conversions ----

CASE(conversions_are_those_of_the_formats) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    const bool nan = is_nan(code, kHalfNumbers);
    const float half = ptx::half_to_float(bits), other = ptx::halves_to_floats(code << 16).y;
    const bool infinite = (code & 0x7fffu) == 0x7c00;
    const double exact = static_cast<double>(kHalfNumbers.exact(code)) * std::ldexp(1.0, -kUnit);
    expect(nan ? std::isnan(half) : infinite ? std::isinf(half) : half == exact, "half_to_float");
    expect(nan || (std::signbit(half) == (code >> 15) && half == other && ptx::float_to_half(half) == bits),
           "and back");
    const float bf16 = ptx::bf16_to_float(bits);
    expect(
        ptx::float_as_uint(bf16) == code << 16 && ptx::float_as_uint(ptx::bf16s_to_floats(code << 16).y) == code << 16,
        "bf16");
    expect(is_nan(code, kBf16Numbers) || ptx::float_to_bf16(bf16) == bits, "bf16 and back");
  }
  std::mt19937 random(5);
  for (int round = 0; round < 300000; ++round) {
    const uint32_t bits =
        round % 2 ? random() : (random() & 0xffffe000u) | (0x1000u & random()) | (random() % 3 == 0);  // ties
    const float x = ptx::uint_as_float(bits);
    if (std::isnan(x)) continue;
    expect(ptx::float_to_half(x) == float_to_half(x) && ptx::float_to_bf16(x) == float_to_bf16(x), "float_to_");
    const float y = ptx::uint_as_float(bits ^ 0x80000000u);
    expect(ptx::floats_to_halves(x, y) == (uint32_t{float_to_half(x)} | uint32_t{float_to_half(y)} << 16),
           "floats_to_halves");
    expect(ptx::floats_to_bf16s(x, y) == (uint32_t{float_to_bf16(x)} | uint32_t{float_to_bf16(y)} << 16),
           "floats_to_bf16s");
    expect(ptx::float_as_uint(ptx::int_as_float(ptx::float_as_int(x))) == bits, "bits");
  }
}

CASE(e4m3_becomes_halves) {
  for (uint32_t code = 0; code < 256; ++code) {
    const uint32_t exponent = code >> 3 & 15u, fraction = code & 7u;
    const double size =
        exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, static_cast<int>(exponent) - 10);
    const float2 pair = ptx::halves_to_floats(ptx::e4m3s_to_halves(code | (code ^ 128u) << 8 | 0xabcd0000u));
    if ((code & 127u) == 127) expect(std::isnan(pair.x) && std::isnan(pair.y), "NaN");
    else expect(pair.x == (code & 128u ? -size : size) && pair.y == -pair.x, "e4m3 " + std::to_string(code));
  }
}

CASE(floats_become_ints_towards_zero) {
  expect(ptx::float_to_int(2.9f) == 2 && ptx::float_to_int(-2.9f) == -2, "towards zero");
  expect(ptx::float_to_int(3e9f) == INT32_MAX && ptx::float_to_int(-INFINITY) == INT32_MIN, "beyond");
  expect(ptx::float_to_int(2147483520.0f) == 2147483520 && ptx::float_to_int(NAN) == 0, "the last, NaN");
}

CASE(floats_are_fused_or_not_as_asked) {
  const float x = 1.0f + std::ldexp(1.0f, -12);  // x x = 1 + 2^-11 + 2^-24
  expect(ptx::mul(x, x) == 1.0f + std::ldexp(1.0f, -11), "mul");
  expect(ptx::fma(x, x, -1.0f - std::ldexp(1.0f, -11)) == std::ldexp(1.0f, -24), "fma");
  expect(ptx::add(ptx::mul(x, x), -1.0f - std::ldexp(1.0f, -11)) == 0.0f, "add of mul");
  expect(ptx::div(1.0f, 3.0f) == 1.0f / 3.0f, "div");
}

}  // namespace
}  // namespace bitfold::cuda::test
