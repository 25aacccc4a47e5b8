// Blocks of codes into the sixteen uneven levels of IQ4: IQ4_NL and IQ4_XS. A scale is sought for 32 values: sixteen
// steps are tried, those that bring the furthest value to the level 127 (though there is none) and to -134 .. -120. A
// lane has a block of its own, and goes through it in order; several tries are under way together.
#include "search/small_blocks.inl"
#include "search/symmetric.inl"

namespace bitfold::search {
namespace {

// ---- The nearest level ----

// The reference takes level i + 1 for v between levels i and i + 1 unless fl(v - level[i]) < fl(level[i + 1] - v). That
// is v >= the midpoint: the difference is exact at the midpoint and the float below it (below), and beyond them
// rounding keeps the order.
constexpr float level(int i) { return static_cast<float>(kIq4Values[static_cast<size_t>(i)]); }
constexpr float midpoint(int i) { return (level(i) + level(i + 1)) / 2; }
constexpr float float_below(float a) { return std::bit_cast<float>(std::bit_cast<int32_t>(a) + (a > 0 ? -1 : 1)); }
constexpr bool decides(int i) {
  const float at = midpoint(i), below = float_below(at);
  return below - level(i) < level(i + 1) - below && !(at - level(i) < level(i + 1) - at);
}

// |v| < kReach falls into one of 27 bins, so narrow that each holds one midpoint at most. A number near an edge may
// fall to either side, as the arithmetic has it: there is no midpoint near an edge.
inline constexpr float kReach = 134.5f, kBin = 0.0976f;
constexpr int bin_of(float v) {
  const float place = v * kBin;
  return static_cast<int>(place + (place < 0 ? -0.5f : 0.5f));
}
constexpr bool within_bin(int i) {
  const float from_centre = midpoint(i) * kBin - static_cast<float>(bin_of(midpoint(i)));
  return from_centre > -0.45f && from_centre < 0.45f && (i == 0 || bin_of(midpoint(i)) > bin_of(midpoint(i - 1)));
}
static_assert(bin_of(kReach) < 15);
static_assert([] {
  for (int i = 0; i < 15; ++i) {
    if (!decides(i) || !within_bin(i)) return false;
  }
  return true;
}());

// For each bin, by its five lowest bits, the largest number that is below the midpoint, and what is at its start.
struct Bins {
  std::array<float, 32> below, levels, codes;
};
constexpr Bins make_bins() {
  Bins bins{};
  for (int bin = -16, code = 0; bin < 16; ++bin) {
    const auto at = static_cast<size_t>(bin & 31);
    bins.levels[at] = level(code);
    bins.codes[at] = static_cast<float>(code);
    const bool here = code < 15 && bin_of(midpoint(code)) == bin;
    bins.below[at] = here ? float_below(midpoint(code)) : 1e30f;
    if (here) ++code;
  }
  return bins;
}
BITFOLD_SIMD const Bins& bins() {
  static constexpr Bins kBins = make_bins();
  return kBins;
}

class Levels {
 public:
  // The level nearest to |v| < kReach.
  BITFOLD_SIMD F nearest(F v) const { return lookup(levels_, bin(v)); }
  // Its number, for any v: 15 for NaN.
  BITFOLD_SIMD I code(F v) const {
    return to_int(lookup(load_table32(&bins().codes[0]), bin(max(min(v, splat(kReach)), splat(-kReach)))));
  }

 private:
  // The bin, or the next if v is in the upper part.
  BITFOLD_SIMD I bin(F v) const {
    const I at = as_int(fma(v, splat(kBin), splat(kWholes)));
    return count_if(greater(v, lookup(below_, at)), at);
  }
  Table32 below_ = load_table32(&bins().below[0]);
  Table32 levels_ = load_table32(&bins().levels[0]);
};

// ---- The search ----

struct UnevenLanes {
  F x[kSmall], w[kSmall];
};

class UnevenSearch {
 public:
  BITFOLD_BODY explicit UnevenSearch(const UnevenLanes& lanes) : l_(lanes) {
    const Furthest far = furthest_of(l_.x);
    const Mask none = greater(splat(kTiny), far.magnitude);
    furthest_ = select(none, splat(1.0f), far.value);
    run<0>();
    scale_ = select(none, splat(0.0f), scale_);
  }
  BITFOLD_SIMD F scale() const { return scale_; }

 private:
  static constexpr int kCount = 16, kTogether = kLanes == 16 ? 4 : 2;

  BITFOLD_SIMD F inverse(int number) const {
    if (number > 0) return div(splat(static_cast<float>(number - 8 - 127)), furthest_);
    return div(splat(1.0f), div(furthest_, splat(127.0f)));
  }

  template <int First>
  BITFOLD_SIMD void run() {
    F inverses[kTogether], xv[kTogether], vv[kTogether];
    for (int t = 0; t < kTogether; ++t) {
      inverses[t] = inverse(First + t);
      xv[t] = vv[t] = splat(0.0f);
    }
    for (int i = 0; i < kSmall; ++i) {
      for (int t = 0; t < kTogether; ++t) {
        const F v = levels_.nearest(mul(inverses[t], l_.x[i])), wv = mul(l_.w[i], v);
        xv[t] = add(xv[t], mul(wv, l_.x[i]));
        vv[t] = add(vv[t], mul(wv, v));
      }
    }
    for (int t = 0; t < kTogether; ++t) judge(xv[t], vv[t], First + t == 0);
    if constexpr (First + kTogether < kCount) run<First + kTogether>();
  }

  BITFOLD_SIMD void judge(F xv, F vv, bool first) {
    const Mask fits = greater(vv, splat(0.0f));
    if (first) {
      scale_ = select(fits, div(xv, vv), splat(0.0f));
      best_ = mul(scale_, xv);
      return;
    }
    const Mask better = both(fits, greater(mul(xv, xv), mul(best_, vv)));
    if (!any(better)) return;
    const F scale = div(xv, vv);
    scale_ = select(better, scale, scale_);
    best_ = select(better, mul(scale, xv), best_);
  }

  const UnevenLanes& l_;
  F furthest_, scale_, best_;
  Levels levels_;
};

BITFOLD_BODY F uneven_scale(const UnevenLanes& lanes) { return UnevenSearch(lanes).scale(); }

// w = q sqrt(sigma2 + x^2).
BITFOLD_SIMD void weigh_by_importance(UnevenLanes& l, F sigma2) {
  for (int i = 0; i < kSmall; ++i) l.w[i] = mul(l.w[i], sqrt(add(sigma2, mul(l.x[i], l.x[i]))));
}
BITFOLD_SIMD void weigh_by_square(UnevenLanes& l) {
  for (int i = 0; i < kSmall; ++i) l.w[i] = mul(l.x[i], l.x[i]);
}

BITFOLD_SIMD F inverse_or_zero(F a) { return select(equal(a, splat(0.0f)), splat(0.0f), div(splat(1.0f), a)); }

BITFOLD_SIMD void put_codes(const float* x, float inverse, const Levels& levels, uint8_t* qs) {
  I codes[kSmallVectors];
  block_codes(x, codes, [&](F lanes) { return levels.code(mul(splat(inverse), lanes)); });
  put_nibbles(qs, codes);
}

// ---- IQ4_NL ----

BITFOLD_BODY void encode_iq4_nl(const EncodeBlocksArgs& a) {
  const Levels levels;
  each_small_blocks(a, [&](const SmallBlocks& b) {
    UnevenLanes lanes;
    load_lanes([&](int lane) { return b.x[lane]; }, lanes.x);
    if (a.importance != nullptr) {
      load_lanes([&](int lane) { return b.importance[lane]; }, lanes.w);
      F sum = splat(0.0f);
      for (const F x : lanes.x) sum = add(sum, mul(x, x));
      weigh_by_importance(lanes, mul(sum, splat(2.0f / kSmall)));
    } else {
      weigh_by_square(lanes);
    }
    const F scale = uneven_scale(lanes);
    uint16_t scales[kLanes];
    float inverses[kLanes];
    store_scales(scales, scale);
    store(inverses, inverse_or_zero(scale));
    for (int s = 0; s < b.count; ++s) {
      Block<kIq4Nl>& block = reinterpret_cast<Block<kIq4Nl>*>(a.blocks)[b.first + s];
      put_half(block.d, scales[s]);
      put_codes(b.x[s], inverses[s], levels, block.qs);
    }
  });
}

// ---- IQ4_XS ----

// A scale for each 32 values, as a level of -32 .. 31 of the block's.
BITFOLD_BODY void encode_iq4_xs(const EncodeBlocksArgs& a) {
  constexpr int kSuper = 256, kSubs = kSuper / kSmall;
  const Levels levels;
  const int64_t row_blocks = a.k / kSuper, blocks = a.rows * row_blocks;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t count = smaller(kLanes, blocks - first);
    const float* x[kLanes];
    const float* importance[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t block = first + smaller(lane, count - 1);
      x[lane] = a.w + block * kSuper;
      importance[lane] = a.importance == nullptr ? nullptr : a.importance + block % row_blocks * kSuper;
    }
    F sigma2 = splat(0.0f), scales[kSubs];
    if (a.importance != nullptr) {
      sigma2 = mul(sum_of_squares([&](int lane) { return x[lane]; }, kSuper), splat(2.0f / kSuper));
    }
    for (int j = 0; j < kSubs; ++j) {
      UnevenLanes lanes;
      load_lanes([&](int lane) { return x[lane] + j * kSmall; }, lanes.x);
      if (a.importance != nullptr) {
        load_lanes([&](int lane) { return importance[lane] + j * kSmall; }, lanes.w);
        weigh_by_importance(lanes, sigma2);
      } else {
        weigh_by_square(lanes);
      }
      scales[j] = uneven_scale(lanes);
    }
    const F d = div(furthest_of(scales).value, splat(-32.0f)), inverse = inverse_or_zero(d);
    uint16_t stored[kLanes];
    store_scales(stored, d);
    float inverses[kSubs][kLanes];
    int32_t sub_scales[kSubs][kLanes];  // 0 .. 63
    for (int j = 0; j < kSubs; ++j) {
      const F l = min(max(to_float(nearest_int(mul(inverse, scales[j]))), splat(-32.0f)), splat(31.0f));
      store_int(sub_scales[j], to_int(add(l, splat(32.0f))));
      store(inverses[j], inverse_or_zero(mul(d, l)));
    }
    for (int s = 0; s < count; ++s) {
      Block<kIq4Xs>& block = reinterpret_cast<Block<kIq4Xs>*>(a.blocks)[first + s];
      put_half(block.d, stored[s]);
      int high = 0;
      for (int j = 0; j < kSubs; ++j) {
        high |= sub_scales[j][s] >> 4 << 2 * j;
        put_codes(x[s] + j * kSmall, inverses[j][s], levels, block.qs + j * kSmall / 2);
      }
      block.scales_h[0] = static_cast<uint8_t>(high);
      block.scales_h[1] = static_cast<uint8_t>(high >> 8);
      for (int j = 0; j < kSubs; j += 2) {
        block.scales_l[j / 2] = static_cast<uint8_t>((sub_scales[j][s] & 15) | sub_scales[j + 1][s] << 4);
      }
    }
  }
}

}  // namespace

}  // namespace bitfold::search
