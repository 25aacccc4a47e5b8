// The nearest code of every weight of a group, for the formats with planes. docs/formats.md gives the operations one by
// one.
#pragma once

#include "search/grid.hpp"

namespace bitfold::search {
namespace {

// Integers and minifloats divide by the scale; codebooks multiply by 1 / scale, and give the place of the nearest entry
// among the sorted ones (stored_code).
template <int Row>
class Codes {
 public:
  BITFOLD_SIMD Codes(float scale, int zero) : scale_(splat(kGrid == Grid::Codebook ? inverse(scale) : scale)) {
    zero_ = splat(static_cast<float>(zero));
  }

  BITFOLD_SIMD I operator()(F w) const {
    if constexpr (kGrid == Grid::Integer) return integer(w);
    else if constexpr (Row == kE4m3) return minifloat<kFp8E4m3>(div(w, scale_));
    else if constexpr (Row == kE5m2) return minifloat<kFp8E5m2>(div(w, scale_));
    else if constexpr (Row == kNf4) return place<kNf4Sorted>(mul(w, scale_));
    else return place<kFp4Sorted>(mul(w, scale_));
  }

 private:
  static constexpr Grid kGrid = kFormats[Row].grid;

  BITFOLD_SIMD static float inverse(float scale) { return 1.0f / (scale > 1e-38f ? scale : 1e-38f); }

  BITFOLD_SIMD I integer(F w) const {
    constexpr float kTop = (1 << kFormats[Row].bits) - 1;
    return to_int(min(max(add(round_even(div(w, scale_)), zero_), splat(0.0f)), splat(kTop)));
  }

  template <Minifloat M>
  BITFOLD_SIMD static I minifloat(F quotient) {
    constexpr int kShift = 23 - M.mantissa_bits;
    const I smallest_normal = splat(int32_t{(127 + 1 - M.bias) << 23});
    const F steps = splat(std::bit_cast<float>(uint32_t{127 - 1 + M.bias + M.mantissa_bits} << 23));
    const I bits = as_int(quotient);
    const I magnitude = bit_and(bits, splat(int32_t{0x7fffffff}));
    const I sign = bit_and(shift_right<24>(bits), splat(int32_t{0x80}));
    const I subnormal = to_int(round_even(mul(as_float(magnitude), steps)));
    const I rebased = sub(magnitude, splat(int32_t{(127 - M.bias) << 23}));
    const I even = bit_and(shift_right<kShift>(rebased), splat(1));
    const I normal = shift_right<kShift>(add(rebased, add(even, splat(int32_t{(1 << (kShift - 1)) - 1}))));
    const I rounded = select(greater(smallest_normal, magnitude), subnormal, normal);
    const I last = splat(static_cast<int32_t>(M.max_finite));
    return bit_or(sign, select(greater(rounded, last), last, rounded));
  }

  template <const SortedCodebook<16>& Codebook>
  BITFOLD_SIMD static I place(F quotient) {
    const F t = max(min(quotient, splat(1.0f)), splat(-1.0f));
    I above = splat(0);
    for (const float midpoint : Codebook.midpoints) above = count_if(greater(t, splat(midpoint)), above);
    return above;
  }

  F scale_, zero_;
};

// Of what Codes gives.
template <int Row>
BITFOLD_SIMD uint8_t stored_code(uint8_t code) {
  if constexpr (Row == kFp4) return kFp4Sorted.codes[code];
  else return code;
}

}  // namespace
}  // namespace bitfold::search
