// The search for one signed scale: values x of a sub-block become codes l of -N .. N - 1 with x ~ scale l, so that the
// weighted error is small. Nineteen steps are tried, those that bring the furthest value to -N and to -N -+ 0.1 .. 0.9.
// A lane has a sub-block of its own, and goes through it in order; several tries are under way together, since every
// sum waits for its last addition.
#pragma once

#include <array>

#include "search/lanes.inl"

namespace bitfold::search {
namespace {

// Sub-blocks in lanes, and what was found for them.
template <int Values>
struct SymmetricLanes {
  F x[Values], w[Values];
  F scale;
  F inverse;  // codes are clamp(nearest_int(inverse x), -N, N - 1) + N; where it is 0, they are 0
};

// The first value with the largest magnitude.
struct Furthest {
  F magnitude, value;
};
template <int Values>
BITFOLD_SIMD Furthest furthest_of(const F (&x)[Values]) {
  Furthest out = {splat(0.0f), splat(0.0f)};
  for (int i = 0; i < Values; ++i) {
    const F magnitude = abs(x[i]);
    const Mask further = greater(magnitude, out.magnitude);
    out.magnitude = select(further, magnitude, out.magnitude);
    out.value = select(further, x[i], out.value);
  }
  return out;
}
// Sub-blocks of smaller magnitudes have the scale 0.
inline constexpr float kTiny = 1e-15f;

// Where the furthest value is brought, in the order of the tries.
inline constexpr int kTries = 19;
template <int N>
constexpr std::array<float, kTries> symmetric_steps() {
  std::array<float, kTries> out{static_cast<float>(N)};
  for (int s = -9, i = 1; s <= 9; ++s) {
    if (s == 0) continue;
    const float product = 0.1f * static_cast<float>(s);
    out[static_cast<size_t>(i++)] = static_cast<float>(N) + product;
  }
  return out;
}

// Rounding and clamping of |q| < N + 1.5: by a table, which takes the lowest bits of q + kWholes for its index, or by
// arithmetic on magnitudes, each of which has its own limit (one instruction less than two limits). Odd: q may be NaN,
// whose code is 0.
enum class Coding { Table, Magnitude, OddMagnitude };
template <int N>
inline constexpr Coding kCoding = kOneWideLookup && N < 16 ? Coding::Table : Coding::Magnitude;

template <int N>
constexpr std::array<float, 32> symmetric_codes() {
  std::array<float, 32> codes{};
  for (int i = 0; i < 32; ++i) {
    const int whole = i < 16 ? i : i - 32;
    codes[static_cast<size_t>(i)] = static_cast<float>(whole < -N ? -N : whole >= N ? N - 1 : whole);
  }
  return codes;
}

template <int N, int Values, Coding coding>
class SymmetricSearch {
 public:
  BITFOLD_BODY explicit SymmetricSearch(SymmetricLanes<Values>& lanes) : l_(lanes) {
    const Furthest far = furthest_of(l_.x);
    none_ = greater(splat(kTiny), far.magnitude);
    furthest_ = select(none_, splat(1.0f), far.magnitude);
    const I sign = splat(INT32_MIN);
    turn_ = bit_and(bit_xor(as_int(far.value), sign), sign);
    const F low = splat(static_cast<float>(N)), high = splat(static_cast<float>(N - 1));
    for (int i = 0; i < Values; ++i) {
      x_[i] = turned(l_.x[i]);
      if constexpr (coding != Coding::Table) {
        limit_[i] = select(greater(splat(0.0f), x_[i]), low, high);
        x_[i] = abs(x_[i]);
      }
      wx_[i] = mul(l_.w[i], x_[i]);
    }
    run<0>();
    l_.scale = select(none_, splat(0.0f), l_.scale);
    l_.inverse = select(none_, splat(0.0f), turned(l_.inverse));
  }

 private:
  static constexpr int kTogether = kLanes == 16 ? 5 : 3;

  BITFOLD_SIMD static float step(int number) {
    static constexpr auto kSteps = symmetric_steps<N>();
    return kSteps[static_cast<size_t>(number)];
  }
  BITFOLD_SIMD static Table32 code_table() {
    static constexpr auto kCodes = symmetric_codes<N>();
    return load_table32(&kCodes[0]);
  }

  // With the sign that the furthest value must get: below zero.
  BITFOLD_SIMD F turned(F a) const { return as_float(bit_xor(as_int(a), turn_)); }

  BITFOLD_SIMD F code(F q, int i) const {
    const F biased = add(q, splat(kWholes));
    if constexpr (coding == Coding::Table) return lookup(table_, as_int(biased));
    else if constexpr (coding == Coding::Magnitude) return min(sub(biased, splat(kWholes)), limit_[i]);
    else return min(to_float(nearest_int(q)), limit_[i]);
  }

  // Tries First .. 18. Turned values and their codes have one sign: no term of a sum is negative.
  template <int First>
  BITFOLD_SIMD void run() {
    constexpr int kCount = First + kTogether <= kTries ? kTogether : kTries - First;
    F inverses[kCount], xl[kCount], ll[kCount];
    for (int t = 0; t < kCount; ++t) {
      inverses[t] = div(splat(step(First + t)), furthest_);
      xl[t] = ll[t] = splat(0.0f);
    }
    for (int i = 0; i < Values; ++i) {
      for (int t = 0; t < kCount; ++t) {
        const F l = code(mul(inverses[t], x_[i]), i);
        xl[t] = add(xl[t], mul(wx_[i], l));
        ll[t] = add(ll[t], mul(mul(l_.w[i], l), l));
      }
    }
    for (int t = 0; t < kCount; ++t) {
      if (First + t == 0) begin(inverses[t], xl[t], ll[t]);
      else judge(inverses[t], xl[t], ll[t]);
    }
    if constexpr (First + kCount < kTries) run<First + kCount>();
  }

  BITFOLD_SIMD void begin(F inverse, F xl, F ll) {
    const F zero = splat(0.0f);
    const F turned_xl = select(greater(xl, zero), turned(xl), xl);
    l_.scale = select(equal(ll, zero), zero, div(turned_xl, ll));
    best_ = mul(l_.scale, turned_xl);
    l_.inverse = inverse;
  }
  BITFOLD_SIMD void judge(F inverse, F xl, F ll) {
    const Mask better = both(greater(ll, splat(0.0f)), greater(mul(xl, xl), mul(best_, ll)));
    if (!any(better)) return;
    const F scale = div(turned(xl), ll);
    l_.scale = select(better, scale, l_.scale);
    best_ = select(better, mul(scale, turned(xl)), best_);
    l_.inverse = select(better, inverse, l_.inverse);
  }

  SymmetricLanes<Values>& l_;
  F x_[Values], wx_[Values], limit_[Values];
  Mask none_;
  F furthest_, best_;
  I turn_;
  Table32 table_ = code_table();
};

// Fills in scale and inverse.
template <int N, Coding coding, int Values>
BITFOLD_BODY void symmetric_search(SymmetricLanes<Values>& lanes) {
  const SymmetricSearch<N, Values, coding> search(lanes);
}

}  // namespace
}  // namespace bitfold::search
