// The search for a scale and a minimum: values x of a sub-block become codes c of 0 .. top with x ~ scale c + low, low
// <= 0, so that the weighted error is small. A lane has a sub-block of its own, and goes through it in order; several
// vectors are under way, since every sum waits for its last addition.
#pragma once

#include <array>

#include "search/lanes.inl"

namespace bitfold::search {
namespace {

// What is tried: first the steps of range / top, then of range / (top + first + s step) for s = 0 .. tries - 1.
struct AffineLaw {
  int values;
  int top;
  float first;
  float step;
  int tries;
  bool absolute;  // the error of a value, in place of its square
};

template <AffineLaw law>
constexpr std::array<float, law.tries> step_counts() {
  std::array<float, law.tries> out{};
  for (int s = 0; s < law.tries; ++s) {
    const float product = law.step * static_cast<float>(s);
    const float beyond = law.first + product;
    out[static_cast<size_t>(s)] = beyond + static_cast<float>(law.top);
  }
  return out;
}

// Sub-blocks in lanes, and the best that was found for them. The codes are those of (x - origin) inverse.
template <AffineLaw law>
struct AffineLanes {
  F x[law.values], w[law.values];
  F scale, low, inverse, origin;
  F sum_w;

  F sum_wx, least, largest, best;  // best: the error
  F codes[law.values];             // of the try that is under way
  F try_inverse, try_scale, try_low;
  Mask better;
};

// The codes 0 .. Top by the lowest bits of a whole number that is no further from them than kNear, one that was added
// to kWholes too.
inline constexpr int kNear = 6;
template <int Top>
constexpr std::array<float, 32> clamped_codes() {
  static_assert(kNear + Top + kNear < 32);
  std::array<float, 32> codes{};
  for (int i = 0; i < 32 - kNear; ++i) codes[static_cast<size_t>(i)] = static_cast<float>(i < Top ? i : Top);
  return codes;
}

// How far the numbers that become codes may lie from 0 .. top: so that they need no clamping, no further than kNear, or
// anywhere. A table clamps those that lie near, and then makes codes of the others as well.
enum class Reach { Within, Near, Far };
template <int Top>
inline constexpr bool kByTable = kOneWideLookup && Top < 16;

// Of numbers between a and b.
template <int Top>
BITFOLD_SIMD Reach reach_of(F a, F b) {
  const auto all_between = [&](float from, float to) {
    const Mask above = both(greater(a, splat(from)), greater(b, splat(from)));
    return !any(opposite(both(above, both(greater(splat(to), a), greater(splat(to), b)))));
  };
  if (!kByTable<Top> && all_between(-0.5f, Top + 0.5f)) return Reach::Within;
  return all_between(-kNear, Top + kNear) ? Reach::Near : Reach::Far;
}

template <int Top, Reach reach>
BITFOLD_SIMD F code_of(F a) {
  if constexpr (reach == Reach::Far) {
    return min(max(to_float(nearest_int(a)), splat(0.0f)), splat(static_cast<float>(Top)));
  } else {
    const F biased = add(a, splat(kWholes));
    if constexpr (kByTable<Top>) {
      static constexpr auto kCodes = clamped_codes<Top>();
      return lookup(load_table32(&kCodes[0]), as_int(biased));
    } else {
      const F whole = sub(biased, splat(kWholes));
      if constexpr (reach == Reach::Within) return whole;
      else return min(max(whole, splat(0.0f)), splat(static_cast<float>(Top)));
    }
  }
}

template <bool Absolute>
BITFOLD_SIMD F weighted_error(F w, F scale, F code, F low, F x) {
  const F e = sub(add(mul(scale, code), low), x);
  return mul(w, Absolute ? abs(e) : mul(e, e));
}

// Runs `pass<Reach>()` for numbers that all lie between a and b.
template <int Top, class Pass>
BITFOLD_SIMD void by_reach(F a, F b, Pass pass) {
  switch (reach_of<Top>(a, b)) {
    case Reach::Within: return pass.template operator()<Reach::Within>();
    case Reach::Near: return pass.template operator()<Reach::Near>();
    case Reach::Far: return pass.template operator()<Reach::Far>();
  }
}

// Range, sums, and the first try: range / top.
template <AffineLaw law>
BITFOLD_BODY void begin_search(AffineLanes<law>& l) {
  const F zero = splat(0.0f);
  F low = l.x[0], high = l.x[0], sum_w = l.w[0], sum_wx = mul(l.w[0], l.x[0]);
  for (int i = 1; i < law.values; ++i) {
    low = min(l.x[i], low);
    high = max(l.x[i], high);
    sum_w = add(sum_w, l.w[i]);
    sum_wx = add(sum_wx, mul(l.w[i], l.x[i]));
  }
  l.least = low;
  low = select(greater(low, zero), zero, low);
  const Mask live = greater(high, low);
  const F range = sub(high, low);
  const F inverse = select(live, div(splat(static_cast<float>(law.top)), range), zero);
  const F scale = div(splat(1.0f), inverse);
  F error = zero;
  by_reach<law.top>(mul(inverse, sub(l.least, low)), mul(inverse, range), [&]<Reach reach>() {
    for (int i = 0; i < law.values; ++i) {
      const F code = code_of<law.top, reach>(mul(inverse, sub(l.x[i], low)));
      error = add(error, weighted_error<law.absolute>(l.w[i], scale, code, low, l.x[i]));
    }
  });
  l.largest = high;
  l.sum_w = sum_w;
  l.sum_wx = sum_wx;
  l.low = l.origin = low;
  l.inverse = inverse;
  l.scale = select(live, scale, zero);
  l.best = select(live, error, zero);  // nothing is better
}

// Codes for one step, and the scale and minimum that fit them best. The loop stays one: unrolled, GCC sums one after
// the other, and each sum waits for its last addition.
template <AffineLaw law>
BITFOLD_BODY void fit(AffineLanes<law>& l, float count) {
  const F low = l.low, range = sub(l.largest, low), zero = splat(0.0f);
  const F inverse = select(greater(l.best, zero), div(splat(count), range), zero);
  F sum_l = zero, sum_ll = zero, sum_xl = zero;
  by_reach<law.top>(mul(inverse, sub(l.least, low)), mul(inverse, range), [&]<Reach reach>() {
#pragma GCC unroll 1
    for (int i = 0; i < law.values; ++i) {
      const F code = code_of<law.top, reach>(mul(inverse, sub(l.x[i], low)));
      l.codes[i] = code;
      const F wl = mul(l.w[i], code);
      sum_l = add(sum_l, wl);
      sum_ll = add(sum_ll, mul(wl, code));
      sum_xl = add(sum_xl, mul(wl, l.x[i]));
    }
  });
  const F determinant = sub(mul(l.sum_w, sum_ll), mul(sum_l, sum_l));
  l.better = greater(determinant, zero);
  l.try_inverse = inverse;
  l.try_scale = div(sub(mul(l.sum_w, sum_xl), mul(l.sum_wx, sum_l)), determinant);
  l.try_low = div(sub(mul(sum_ll, l.sum_wx), mul(sum_l, sum_xl)), determinant);
  const Mask positive = greater(l.try_low, zero);
  if (any(positive)) {
    l.try_low = select(positive, zero, l.try_low);
    l.try_scale = select(positive, div(sum_xl, sum_ll), l.try_scale);
  }
}

// Keeps what is better than the best so far.
template <AffineLaw law>
BITFOLD_BODY void judge(AffineLanes<law>& l) {
  const F scale = l.try_scale, low = l.try_low;
  F error = splat(0.0f);
  for (int i = 0; i < law.values; ++i) {
    error = add(error, weighted_error<law.absolute>(l.w[i], scale, l.codes[i], low, l.x[i]));
  }
  const Mask better = both(l.better, greater(l.best, error));
  l.best = select(better, error, l.best);
  l.scale = select(better, scale, l.scale);
  l.inverse = select(better, l.try_inverse, l.inverse);
  l.origin = select(better, l.low, l.origin);
  l.low = select(better, low, l.low);
}

template <AffineLaw law, int Vectors>
BITFOLD_BODY void search(AffineLanes<law> (&lanes)[Vectors]) {
  static constexpr auto kCounts = step_counts<law>();
  for (AffineLanes<law>& l : lanes) begin_search(l);
  for (const float count : kCounts) {
    for (AffineLanes<law>& l : lanes) fit(l, count);
    for (AffineLanes<law>& l : lanes) judge(l);
  }
}

}  // namespace
}  // namespace bitfold::search
