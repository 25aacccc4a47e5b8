// Blocks with a scale and a minimum for each sub-block, found by a search over both: Q2_K, Q4_K, Q5_K, and with
// importance Q4_1 and Q5_1. A super-block's scales and minima have a scale each; the codes are chosen again with what
// these leave of them.
#include "search/affine.inl"
#include "search/positive.inl"
#include "search/put_codes.inl"

namespace bitfold::search {
namespace {

constexpr int kSuper = 256;          // columns of a super-block
constexpr int kVectors = kUnderWay;  // of sub-blocks

// The searches, without and with importance.
template <int Row, bool Weighted>
inline constexpr AffineLaw kLaw = {};
template <>
inline constexpr AffineLaw kLaw<kQ2K, false> = {16, 3, -0.5f, 0.1f, 16, true};
template <>
inline constexpr AffineLaw kLaw<kQ4K, false> = {32, 15, -1.0f, 0.1f, 21, false};
template <>
inline constexpr AffineLaw kLaw<kQ5K, false> = {32, 31, -0.5f, 0.1f, 16, false};
template <>
inline constexpr AffineLaw kLaw<kQ2K, true> = {16, 3, -0.9f, 0.05f, 37, false};
template <>
inline constexpr AffineLaw kLaw<kQ4K, true> = {32, 15, -0.9f, 0.05f, 37, false};
template <>
inline constexpr AffineLaw kLaw<kQ5K, true> = {32, 31, -0.9f, 0.05f, 37, false};
template <>
inline constexpr AffineLaw kLaw<kQ4_1, true> = {32, 15, -0.9f, 0.05f, 37, false};
template <>
inline constexpr AffineLaw kLaw<kQ5_1, true> = {32, 31, -0.9f, 0.05f, 37, false};

// What was found for `Count` sub-blocks.
template <int Count>
struct Found {
  float scale[Count], low[Count], inverse[Count], origin[Count], sum_w[Count];
};

// Searches `count` <= Count sub-blocks that start at x; weigh(lanes, place) weighs those of the sub-blocks place(lane).
template <AffineLaw law, int Count, class Weigh>
BITFOLD_SIMD void search_all(const float* x, int64_t count, Weigh weigh, Found<Count>& found) {
  static_assert(Count % (kVectors * kLanes) == 0);
  AffineLanes<law> lanes[kVectors];
  for (int64_t first = 0; first < count; first += kVectors * kLanes) {
    for (int v = 0; v < kVectors; ++v) {  // where there are no more, the last once again
      const auto place = [&](int lane) { return smaller(first + v * kLanes + lane, count - 1); };
      load_lanes([&](int lane) { return x + law.values * place(lane); }, lanes[v].x);
      weigh(lanes[v], place);
    }
    search(lanes);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = first + v * kLanes;
      store(found.scale + at, lanes[v].scale);
      store(found.low + at, lanes[v].low);
      store(found.inverse + at, lanes[v].inverse);
      store(found.origin + at, lanes[v].origin);
      store(found.sum_w + at, lanes[v].sum_w);
    }
  }
}

// w = q sqrt(sigma2 + x^2), q and sigma2 of the place that a lane has.
template <AffineLaw law, class Place, class Importance, class Sigma>
BITFOLD_SIMD void weigh_by_importance(AffineLanes<law>& l, Place place, Importance importance, Sigma sigma2) {
  float sigmas[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sigmas[lane] = sigma2(place(lane));
  const F sigma = load(sigmas);
  load_lanes([&](int lane) { return importance(place(lane)); }, l.w);
  for (int i = 0; i < law.values; ++i) l.w[i] = mul(l.w[i], sqrt(add(sigma, mul(l.x[i], l.x[i]))));
}

template <AffineLaw law>
BITFOLD_SIMD void weigh_by_size(AffineLanes<law>& l) {
  if constexpr (law.absolute) {
    for (int i = 0; i < law.values; ++i) l.w[i] = abs(l.x[i]);
  } else {
    F sum = splat(0.0f);
    for (int i = 0; i < law.values; ++i) sum = add(sum, mul(l.x[i], l.x[i]));
    const F typical = sqrt(div(sum, splat(static_cast<float>(law.values))));
    for (int i = 0; i < law.values; ++i) l.w[i] = add(typical, abs(l.x[i]));
  }
}

// Scales and minima of up to kLanes super-blocks as bytes, and the scales of these.
template <int Subs>
struct Levels {
  int32_t scales[Subs][kLanes], mins[Subs][kLanes];
  uint16_t d[kLanes], dmin[kLanes];
};

// Sub-block `sub` of every super-block.
template <int Subs>
BITFOLD_SIMD F across(const float* found, int sub) {
  int32_t places[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) places[lane] = lane * Subs + sub;
  return gather(found, load_int(places));
}

// Without importance, the largest gets the largest level.
template <int Top, int Subs>
BITFOLD_SIMD void level_by_largest(const F (&x)[Subs], int32_t (&levels)[Subs][kLanes], uint16_t* scale) {
  const F zero = splat(0.0f), top = splat(static_cast<float>(Top));
  F largest = zero;
  for (int i = 0; i < Subs; ++i) largest = max(x[i], largest);
  const F inverse = select(greater(largest, zero), div(top, largest), zero);
  for (int i = 0; i < Subs; ++i) store_int(levels[i], bit_and(nearest_int(mul(inverse, x[i])), splat(255)));
  store_scales(scale, div(largest, top));
}

template <int Top, bool Weighted, int Subs, int Count>
BITFOLD_SIMD void choose_levels(const Found<Count>& found, Levels<Subs>& levels) {
  PositiveLanes<Subs> p[2];
  for (int i = 0; i < Subs; ++i) {
    p[0].x[i] = across<Subs>(found.scale, i);
    p[1].x[i] = as_float(bit_xor(as_int(across<Subs>(found.low, i)), splat(INT32_MIN)));
    p[0].w[i] = p[1].w[i] = across<Subs>(found.sum_w, i);
  }
  if constexpr (Weighted) {
    positive_search<Top>(p);
    for (int i = 0; i < Subs; ++i) {
      store_int(levels.scales[i], to_int(p[0].levels[i]));
      store_int(levels.mins[i], to_int(p[1].levels[i]));
    }
    store_scales(levels.d, p[0].scale);
    store_scales(levels.dmin, p[1].scale);
  } else {
    level_by_largest<Top>(p[0].x, levels.scales, levels.d);
    level_by_largest<Top>(p[1].x, levels.mins, levels.dmin);
  }
}

// ---- The super-blocks: their levels as bytes, and codes(i), those of columns i .. i + kLanes ----

BITFOLD_SIMD void put_levels(Block<kQ2K>& b, const Levels<16>& levels, int lane) {
  for (int j = 0; j < 16; ++j) b.scales[j] = static_cast<uint8_t>(levels.scales[j][lane] | levels.mins[j][lane] << 4);
}
BITFOLD_SIMD ScaleMin get_levels(const Block<kQ2K>& b, int j) { return {b.scales[j] & 15, b.scales[j] >> 4}; }
template <class Codes>
BITFOLD_SIMD void put_codes(Block<kQ2K>& b, Codes codes) {
  for (int h = 0; h < 2; ++h) {
    for (int l = 0; l < 32; l += kLanes) {
      const int i = 128 * h + l;
      const I low = bit_or(codes(i), shift_left<2>(codes(i + 32)));
      const I high = bit_or(shift_left<4>(codes(i + 64)), shift_left<6>(codes(i + 96)));
      store_bytes(b.qs + 32 * h + l, bit_or(low, high));
    }
  }
}

// Levels beyond six bits, which negative numbers have become, spill over their neighbours.
template <int Row>
BITFOLD_SIMD void put_levels(Block<Row>& b, const Levels<8>& levels, int lane) {  // scale_and_min reads them
  for (int j = 0; j < 4; ++j) {
    const int scale = levels.scales[j][lane], min = levels.mins[j][lane];
    const int later_scale = levels.scales[j + 4][lane], later_min = levels.mins[j + 4][lane];
    b.scales[j] = static_cast<uint8_t>(scale | later_scale >> 4 << 6);
    b.scales[j + 4] = static_cast<uint8_t>(min | later_min >> 4 << 6);
    b.scales[j + 8] = static_cast<uint8_t>((later_scale & 15) | (later_min & 15) << 4);
  }
}
template <int Row>
BITFOLD_SIMD ScaleMin get_levels(const Block<Row>& b, int j) {
  return scale_and_min(b.scales, j);
}
template <class Codes>
BITFOLD_SIMD void put_codes(Block<kQ4K>& b, Codes codes) {
  for (int g = 0; g < 4; ++g) {
    for (int l = 0; l < 32; l += kLanes) {
      const int i = 64 * g + l;
      store_bytes(b.qs + 32 * g + l, bit_or(codes(i), shift_left<4>(codes(i + 32))));
    }
  }
}
template <class Codes>
BITFOLD_SIMD void put_codes(Block<kQ5K>& b, Codes codes) {
  for (int l = 0; l < 32; l += kLanes) {
    const I low = splat(15), fifth = splat(16);
    I high = splat(0);  // a sub-block's bits come in from above
    for (int g = 0; g < 4; ++g) {
      const I even = codes(64 * g + l), odd = codes(64 * g + 32 + l);
      store_bytes(b.qs + 32 * g + l, bit_or(bit_and(even, low), shift_left<4>(bit_and(odd, low))));
      const I pair = bit_or(shift_left<2>(bit_and(even, fifth)), shift_left<3>(bit_and(odd, fifth)));
      high = bit_or(shift_right<2>(high), pair);
    }
    store_bytes(b.qh + l, high);
  }
}

// The code of a number of any size.
template <int Top>
BITFOLD_SIMD I final_code(F a) {
  return to_int(code_of<Top, Reach::Far>(a));
}

// Super-blocks first .. first + count of the matrix, whose lanes hold what was found and chosen.
template <int Row, AffineLaw law, int Subs, int Count>
BITFOLD_SIMD void put_super(const EncodeBlocksArgs& a, int64_t first, int64_t count, const Found<Count>& found,
                            const Levels<Subs>& levels) {
  float d[kLanes], dmin[kLanes];
  store(d, load_half(levels.d));
  store(dmin, load_half(levels.dmin));
  for (int lane = 0; lane < count; ++lane) {
    const float* x = a.w + (first + lane) * kSuper;
    Block<Row>& b = reinterpret_cast<Block<Row>*>(a.blocks)[first + lane];
    put_half(b.d, levels.d[lane]);
    put_half(b.dmin, levels.dmin[lane]);
    put_levels(b, levels, lane);
    float steps[Subs], least[Subs];
    for (int j = 0; j < Subs; ++j) {
      const ScaleMin level = get_levels(b, j);
      steps[j] = d[lane] * static_cast<float>(level.scale);
      least[j] = dmin[lane] * static_cast<float>(level.min);
    }
    put_codes(b, [&](int i) {
      const int j = i / law.values, at = lane * Subs + j;
      if (steps[j] == 0.0f) {  // nothing to divide by: the codes of the search
        return final_code<law.top>(mul(sub(load(x + i), splat(found.origin[at])), splat(found.inverse[at])));
      }
      return final_code<law.top>(div(add(load(x + i), splat(least[j])), splat(steps[j])));
    });
  }
}

template <int Row, bool Weighted>
BITFOLD_BODY void encode_super(const EncodeBlocksArgs& a) {
  constexpr AffineLaw law = kLaw<Row, Weighted>;
  using Lanes = AffineLanes<law>;
  constexpr int kSubs = kSuper / law.values;
  const int64_t row_blocks = a.k / kSuper, blocks = a.rows * row_blocks;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const float* x = a.w + first * kSuper;
    const int64_t count = smaller(kLanes, blocks - first);
    Found<kSubs * kLanes> found;
    if constexpr (Weighted) {
      const F sum = sum_of_squares([&](int lane) { return x + kSuper * smaller(lane, count - 1); }, kSuper);
      float sigma2[kLanes];
      store(sigma2, div(Row == kQ2K ? sum : mul(splat(2.0f), sum), splat(static_cast<float>(kSuper))));
      const float* importance[kLanes];
      for (int64_t i = 0; i < count; ++i) importance[i] = a.importance + (first + i) % row_blocks * kSuper;
      const auto weigh = [&](Lanes& l, auto place) {
        weigh_by_importance(
            l, place, [&](int64_t i) { return importance[i / kSubs] + i % kSubs * law.values; },
            [&](int64_t i) { return sigma2[i / kSubs]; });
      };
      search_all<law>(x, count * kSubs, weigh, found);
    } else {
      search_all<law>(x, count * kSubs, [&](Lanes& l, auto) { weigh_by_size(l); }, found);
    }
    Levels<kSubs> levels;
    choose_levels<Row == kQ2K ? 15 : 63, Weighted>(found, levels);
    if constexpr (Row == kQ5K || (Row == kQ4K && !Weighted)) {  // what wrapped is the largest
      for (int j = 0; j < kSubs; ++j) {
        for (int32_t& level : levels.scales[j]) level = level < 63 ? level : 63;
        for (int32_t& level : levels.mins[j]) level = level < 63 ? level : 63;
      }
    }
    put_super<Row, law>(a, first, count, found, levels);
  }
}

// ---- Q4_1 and Q5_1 with importance ----

// means: of each row's squares.
template <int Row>
BITFOLD_BODY void encode_weighted(const EncodeBlocksArgs& a, const float* means) {
  constexpr AffineLaw law = kLaw<Row, true>;
  using Lanes = AffineLanes<law>;
  constexpr int kCount = kVectors * kLanes;
  const int64_t row_blocks = a.k / law.values, blocks = a.rows * row_blocks;
  for (int64_t first = 0; first < blocks; first += kCount) {
    const float* x = a.w + first * law.values;
    const int64_t count = smaller(kCount, blocks - first);
    float sigmas[kCount];
    const float* importance[kCount];
    for (int64_t i = 0, row = first / row_blocks, column = first % row_blocks; i < count; ++i) {
      sigmas[i] = means[row];
      importance[i] = a.importance + column * law.values;
      if (++column == row_blocks) column = 0, ++row;
    }
    Found<kCount> found;
    const auto weigh = [&](Lanes& l, auto place) {
      weigh_by_importance(l, place, [&](int64_t i) { return importance[i]; }, [&](int64_t i) { return sigmas[i]; });
    };
    search_all<law>(x, count, weigh, found);
    uint16_t d[kCount], m[kCount];
    for (int i = 0; i < kCount; i += kLanes) {
      store_scales(d + i, load(found.scale + i));
      store_scales(m + i, load(found.low + i));
    }
    for (int i = 0; i < count; ++i) {
      Block<Row>& b = reinterpret_cast<Block<Row>*>(a.blocks)[first + i];
      put_half(b.d, d[i]);
      put_half(b.m, m[i]);
      const F origin = splat(found.origin[i]), inverse = splat(found.inverse[i]);
      I codes[law.values / kLanes];
      for (int v = 0; v < law.values / kLanes; ++v) {
        codes[v] = final_code<law.top>(mul(sub(load(x + i * law.values + v * kLanes), origin), inverse));
      }
      if constexpr (Row == kQ4_1) put_nibbles(b.qs, codes);
      else put_fives(b.qh, b.qs, codes);
    }
  }
}
template <int Row>
BITFOLD_BODY void encode_weighted(const EncodeBlocksArgs& a) {
  float means[kEncodeRows];
  row_means(a, means);
  encode_weighted<Row>(a, means);
}

}  // namespace

}  // namespace bitfold::search
