// The search of Q3_K without importance: a scale and codes l of -4 .. 3 for sixteen values, each weighing its square.
// From the codes of one step it goes, up to five times, from code to code and changes what improves the fit. A lane has
// a sub-block of its own; several vectors are under way together, since every step waits for the last.
#pragma once

#include "search/symmetric.inl"

namespace bitfold::search {
namespace {

struct DescentLanes {
  F x[16];
  F scale;
  F codes[16];  // l; -4 where there is no magnitude
  F xl, ll;     // sums of w x l and w l l
};

// The codes of the first step, which are also the last where xl is not above zero: then no change of a code can make it
// so, since its terms have one sign.
BITFOLD_SIMD void begin_descent(DescentLanes& d) {
  const F zero = splat(0.0f);
  const Furthest far = furthest_of(d.x);
  const Mask none = greater(splat(kTiny), far.magnitude);
  const F inverse = div(splat(-4.0f), select(none, splat(1.0f), far.value));
  d.xl = d.ll = zero;
  for (int i = 0; i < 16; ++i) {
    const F x = d.x[i], w = mul(x, x);
    const F l = min(max(sub(add(mul(inverse, x), splat(kWholes)), splat(kWholes)), splat(-4.0f)), splat(3.0f));
    d.xl = add(d.xl, mul(mul(w, x), l));
    d.ll = add(d.ll, mul(mul(w, l), l));
    d.codes[i] = select(none, splat(-4.0f), l);
  }
  d.xl = select(none, zero, d.xl);
  d.scale = select(both(opposite(none), greater(d.ll, zero)), div(d.xl, d.ll), zero);
}

template <int Vectors>
BITFOLD_BODY void descend(DescentLanes (&d)[Vectors]) {
  const F zero = splat(0.0f);
  for (int sweep = 0; sweep < 5; ++sweep) {
    Mask changed = greater(zero, zero);
    for (int i = 0; i < 16; ++i) {
      for (int v = 0; v < Vectors; ++v) {
        const F x = d[v].x[i], w = mul(x, x), wx = mul(w, x), l = d[v].codes[i];
        const F rest_xl = sub(d[v].xl, mul(wx, l)), rest_ll = sub(d[v].ll, mul(mul(w, l), l));
        const F other = min(max(to_float(nearest_int(div(mul(x, rest_ll), rest_xl))), splat(-4.0f)), splat(3.0f));
        const F xl = add(rest_xl, mul(wx, other)), ll = add(rest_ll, mul(mul(w, other), other));
        const Mask moved = both(greater(rest_xl, zero), opposite(equal(other, l)));
        const Mask fits = greater(mul(mul(xl, xl), d[v].ll), mul(mul(d[v].xl, d[v].xl), ll));
        const Mask better = both(moved, both(greater(ll, zero), fits));
        d[v].codes[i] = select(better, other, d[v].codes[i]);
        d[v].xl = select(better, xl, d[v].xl);
        d[v].ll = select(better, ll, d[v].ll);
        changed = either(changed, better);
      }
    }
    if (!any(changed)) break;
  }
  for (DescentLanes& lanes : d) lanes.scale = select(greater(lanes.ll, zero), div(lanes.xl, lanes.ll), zero);
}

}  // namespace
}  // namespace bitfold::search
