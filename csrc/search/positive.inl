// The search for one scale of the scales, or of the minima, of a super-block: x ~ scale level, level >= 0, with the
// sums of the sub-blocks' weights as weights. It goes once over nine steps and then from level to level for as long as
// one improves. A lane has a super-block of its own; scales and minima are under way together.
#pragma once

#include "search/lanes.inl"

namespace bitfold::search {
namespace {

template <int Count>
struct PositiveLanes {
  F x[Count], w[Count];
  F levels[Count];  // whole numbers of 0 .. 255, which a negative x may have made by wrapping
  F scale;
};

BITFOLD_SIMD F wrapped_to_byte(F whole) { return to_float(bit_and(to_int(whole), splat(255))); }

template <int Top, int Count, int Vectors>
BITFOLD_BODY void positive_search(PositiveLanes<Count> (&p)[Vectors]) {
  const F zero = splat(0.0f), top = splat(static_cast<float>(Top));
  const auto level = [&](F a) { return min(to_float(nearest_int(a)), top); };
  const auto weighted = [](F w, F e) { return mul(mul(w, e), e); };

  F largest[Vectors], inverse[Vectors], best[Vectors], sum_xl[Vectors], sum_ll[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    largest[v] = zero;
    for (int i = 0; i < Count; ++i) largest[v] = max(largest[v], p[v].x[i]);
    inverse[v] = div(top, largest[v]);
    const F scale = div(splat(1.0f), inverse[v]);
    best[v] = zero;
    for (int i = 0; i < Count; ++i) {
      const F code = to_float(bit_and(nearest_int(mul(inverse[v], p[v].x[i])), splat(255)));
      best[v] = add(best[v], weighted(p[v].w[i], sub(p[v].x[i], mul(scale, code))));
    }
  }
  for (int s = -4; s <= 4; ++s) {
    if (s == 0) continue;
    const float product = 0.1f * static_cast<float>(s);
    const float count = product + static_cast<float>(Top);
    for (int v = 0; v < Vectors; ++v) {
      const F tried = div(splat(count), largest[v]), scale = div(splat(1.0f), tried);
      F error = zero;
      for (int i = 0; i < Count; ++i) {
        error = add(error, weighted(p[v].w[i], sub(p[v].x[i], mul(scale, level(mul(tried, p[v].x[i]))))));
      }
      const Mask better = greater(best[v], error);
      best[v] = select(better, error, best[v]);
      inverse[v] = select(better, tried, inverse[v]);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    sum_xl[v] = sum_ll[v] = zero;
    for (int i = 0; i < Count; ++i) {
      const F code = level(mul(inverse[v], p[v].x[i]));
      p[v].levels[i] = wrapped_to_byte(code);
      sum_xl[v] = add(sum_xl[v], mul(mul(p[v].w[i], p[v].x[i]), code));
      sum_ll[v] = add(sum_ll[v], mul(mul(p[v].w[i], code), code));
    }
  }
  for (int sweep = 0; sweep < 5; ++sweep) {  // a lane whose levels have come to rest stays as it is
    bool moved = false;
    for (int i = 0; i < Count; ++i) {
      for (int v = 0; v < Vectors; ++v) {
        const F x = p[v].x[i], w = p[v].w[i], wx = mul(w, x), old = p[v].levels[i];
        F xl = sub(sum_xl[v], mul(wx, old)), ll = sub(sum_ll[v], mul(mul(w, old), old));
        const Mask open = both(greater(xl, zero), greater(ll, zero));
        const F code = level(div(mul(x, ll), xl));
        const Mask other = opposite(equal(code, old));
        xl = add(xl, mul(wx, code));
        ll = add(ll, mul(mul(w, code), code));
        const Mask gain = greater(mul(mul(xl, xl), sum_ll[v]), mul(mul(sum_xl[v], sum_xl[v]), ll));
        const Mask better = both(both(open, other), gain);
        p[v].levels[i] = select(better, wrapped_to_byte(code), old);
        sum_xl[v] = select(better, xl, sum_xl[v]);
        sum_ll[v] = select(better, ll, sum_ll[v]);
        moved |= any(better);
      }
    }
    if (!moved) break;
  }
  for (int v = 0; v < Vectors; ++v) {
    const Mask none = greater(splat(1e-15f), largest[v]);
    p[v].scale = select(none, zero, select(greater(sum_ll[v], zero), div(sum_xl[v], sum_ll[v]), zero));
    for (F& l : p[v].levels) l = select(none, zero, l);
  }
}

}  // namespace
}  // namespace bitfold::search
