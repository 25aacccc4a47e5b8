// Blocks with signed scales, found by a search: Q3_K, Q6_K, and with importance Q4_0 and Q5_0. As many blocks as there
// are lanes are under way, super-blocks with all their sub-blocks of one place together. The scales of a super-block
// have a scale of their own, and the codes are chosen again with what it leaves of them.
#include <bit>

#include "search/descent.inl"
#include "search/small_blocks.inl"
#include "search/symmetric.inl"

namespace bitfold::search {
namespace {

// The codes -N .. N - 1 of numbers of any size, shifted to 0 .. 2 N - 1.
template <int N>
BITFOLD_SIMD I shifted_code(F q) {
  const F low = splat(static_cast<float>(-N)), high = splat(static_cast<float>(N - 1));
  return to_int(sub(min(max(to_float(nearest_int(q)), low), high), low));
}

// ---- Super-blocks ----

constexpr int kSuper = 256, kSub = 16, kSubs = kSuper / kSub;

// Super-blocks first .. first + count of the matrix, count <= kLanes; the lanes past them repeat the last.
struct Batch {
  const EncodeBlocksArgs& a;
  int64_t first, count;

  BITFOLD_SIMD int64_t place(int lane) const { return first + smaller(lane, count - 1); }
  BITFOLD_SIMD const float* x(int lane) const { return a.w + kSuper * place(lane); }
  BITFOLD_SIMD const float* importance(int lane) const {
    return a.importance + kSuper * (place(lane) % (a.k / kSuper));
  }
};

// What is found for the sub-blocks of a batch.
struct Found {
  F scales[kSubs];
  float inverses[kSubs][kLanes];
  int32_t levels[kSubs][kLanes];  // of the scales
  uint16_t d[kLanes];             // what a level means
  float steps[kSubs][kLanes];     // and their products

  BITFOLD_SIMD void set(F scale_of_scales) {
    store_scales(d, scale_of_scales);
    const F rounded = load_half(d);
    for (int j = 0; j < kSubs; ++j) store(steps[j], mul(rounded, to_float(load_int(levels[j]))));
  }
};

// weigh(j, lanes) sets the weights of sub-block j of every super-block.
template <int N, class Weigh>
BITFOLD_SIMD void search_batch(const Batch& batch, Found& found, Weigh weigh) {
  for (int j = 0; j < kSubs; ++j) {
    SymmetricLanes<kSub> lanes;
    load_lanes([&](int lane) { return batch.x(lane) + j * kSub; }, lanes.x);
    weigh(j, lanes);
    symmetric_search<N, kCoding<N>>(lanes);
    found.scales[j] = lanes.scale;
    store(found.inverses[j], lanes.inverse);
  }
}

// codes = those of the steps; where a step is zero, searched(j, codes) gives those of the search.
template <int N, class Searched>
BITFOLD_SIMD void final_codes(const float* x, const Found& found, int lane, uint8_t* codes, Searched searched) {
  for (int j = 0; j < kSubs; ++j, x += kSub, codes += kSub) {
    const float step = found.steps[j][lane];
    if (step == 0.0f) {
      searched(j, codes);
      continue;
    }
    for (int i = 0; i < kSub; i += kLanes) store_bytes(codes + i, shifted_code<N>(div(load(x + i), splat(step))));
  }
}

// The codes of a search.
template <int N>
BITFOLD_SIMD void searched_codes(const float* x, float inverse, uint8_t* codes) {
  if (inverse == 0.0f) std::memset(codes, 0, kSub);
  for (int i = 0; i < kSub && inverse != 0.0f; i += kLanes) {
    store_bytes(codes + i, shifted_code<N>(mul(splat(inverse), load(x + i))));
  }
}

BITFOLD_SIMD I signed_byte(I a) { return shift_right_signed<24>(shift_left<24>(a)); }

// ---- Q6_K ----

BITFOLD_SIMD void put_codes(Block<kQ6K>& b, const uint8_t* codes) {
  for (int h = 0; h < 2; ++h) {
    const uint8_t* c = codes + 128 * h;
    for (int l = 0; l < 64; ++l) b.ql[64 * h + l] = static_cast<uint8_t>((c[l] & 15) | c[64 + l] << 4);
    for (int l = 0; l < 32; ++l) {
      b.qh[32 * h + l] =
          static_cast<uint8_t>(c[l] >> 4 | c[32 + l] >> 4 << 2 | c[64 + l] >> 4 << 4 | c[96 + l] >> 4 << 6);
    }
  }
}

// The first scale of the largest magnitude gets the level -128.
template <bool Weighted>
BITFOLD_BODY void encode_q6_k(const EncodeBlocksArgs& a) {
  auto* out = reinterpret_cast<Block<kQ6K>*>(a.blocks);
  const int64_t blocks = a.rows * (a.k / kSuper);
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const Batch batch = {a, first, smaller(kLanes, blocks - first)};
    Found found;
    search_batch<32>(batch, found, [&](int j, SymmetricLanes<kSub>& lanes) {
      if constexpr (Weighted) load_lanes([&](int lane) { return batch.importance(lane) + j * kSub; }, lanes.w);
      else
        for (int i = 0; i < kSub; ++i) lanes.w[i] = mul(lanes.x[i], lanes.x[i]);
    });
    const Furthest furthest = furthest_of(found.scales);
    const uint32_t none = bits(greater(splat(kTiny), furthest.magnitude));
    const F inverse = div(splat(-128.0f), furthest.value);
    for (int j = 0; j < kSubs; ++j) {
      const F level = min(to_float(nearest_int(mul(inverse, found.scales[j]))), splat(127.0f));
      store_int(found.levels[j], signed_byte(to_int(level)));
    }
    found.set(div(splat(1.0f), inverse));
    for (int s = 0; s < batch.count; ++s) {
      Block<kQ6K>& b = out[first + s];
      if (none >> s & 1) {
        std::memset(&b, 0, sizeof(b));
        continue;
      }
      const float* x = batch.x(s);
      uint8_t codes[kSuper];
      final_codes<32>(x, found, s, codes,
                      [&](int j, uint8_t* to) { searched_codes<32>(x + j * kSub, found.inverses[j][s], to); });
      put_codes(b, codes);
      for (int j = 0; j < kSubs; ++j) b.scales[j] = static_cast<int8_t>(found.levels[j][s]);
      put_half(b.d, found.d[s]);
    }
  }
}

// ---- Q3_K ----

BITFOLD_SIMD void put_codes(Block<kQ3K>& b, const uint8_t* codes) {
  for (int l = 0; l < 32; ++l) {
    int high = 0;
    for (int j = 0; j < 8; ++j) high |= codes[32 * j + l] >> 2 << j;
    b.hmask[l] = static_cast<uint8_t>(high);
  }
  for (int h = 0; h < 2; ++h) {
    const uint8_t* c = codes + 128 * h;
    for (int l = 0; l < 32; ++l) {
      b.qs[32 * h + l] =
          static_cast<uint8_t>((c[l] & 3) | (c[32 + l] & 3) << 2 | (c[64 + l] & 3) << 4 | c[96 + l] << 6);
    }
  }
}
BITFOLD_SIMD void put_levels(Block<kQ3K>& b, const Found& found, int lane) {  // q3k_scale reads them
  const auto level = [&](int j) { return found.levels[j][lane] + 32; };
  for (int j = 0; j < 8; ++j) b.scales[j] = static_cast<uint8_t>((level(j) & 15) | level(j + 8) << 4);
  for (int j = 0; j < 4; ++j) {
    b.scales[8 + j] =
        static_cast<uint8_t>(level(j) >> 4 | level(j + 4) >> 4 << 2 | level(j + 8) >> 4 << 4 | level(j + 12) >> 4 << 6);
  }
}

template <class Searched>
BITFOLD_SIMD void put_q3_k(const Batch& batch, const Found& found, Searched searched) {
  for (int s = 0; s < batch.count; ++s) {
    Block<kQ3K>& b = reinterpret_cast<Block<kQ3K>*>(batch.a.blocks)[batch.first + s];
    uint8_t codes[kSuper];
    final_codes<4>(batch.x(s), found, s, codes, [&](int j, uint8_t* to) { searched(s, j, to); });
    put_codes(b, codes);
    put_levels(b, found, s);
    put_half(b.d, found.d[s]);
  }
}

// Sub-blocks are searched as they lie, and those whose search goes on are then searched again together.
struct Descents {
  static constexpr int kCount = kSubs * kLanes, kVectors = kUnderWay;
  float scales[kCount];
  // Codes as bytes, as many of a place as there are lanes; where the first of a sub-block is.
  uint8_t codes[2 * kCount * kSub];
  int32_t where[kCount];
  int32_t open[kCount + kVectors * kLanes];
  int open_count = 0;

  // Sub-blocks at x, `count` of them.
  BITFOLD_SIMD void run(const float* x, int count) {
    for (int first = 0; first < count; first += kLanes) {
      DescentLanes lanes;
      load_lanes([&](int lane) { return x + kSub * smaller(first + lane, count - 1); }, lanes.x);
      begin_descent(lanes);
      keep(lanes, first * kSub, [&](int lane) { return first + lane; }, kLanes);
      for (uint32_t more = bits(greater(lanes.xl, splat(0.0f))); more != 0; more &= more - 1) {
        const int at = first + lowest_one(more);
        if (at < count) open[open_count++] = at;
      }
    }
    for (int first = 0; first < open_count; first += kVectors * kLanes) {
      DescentLanes lanes[kVectors];
      const auto number = [&](int lane) { return open[smaller(first + lane, open_count - 1)]; };
      for (int v = 0; v < kVectors; ++v) {
        load_lanes([&](int lane) { return x + kSub * number(v * kLanes + lane); }, lanes[v].x);
        begin_descent(lanes[v]);
      }
      descend(lanes);
      for (int v = 0; v < kVectors; ++v) {
        const int at = first + v * kLanes;
        if (at >= open_count) break;
        keep(
            lanes[v], (kCount + at) * kSub, [&](int lane) { return open[at + lane]; },
            static_cast<int>(smaller(kLanes, open_count - at)));
      }
    }
  }

 private:
  template <class Number>
  BITFOLD_SIMD void keep(const DescentLanes& lanes, int at, Number number, int count) {
    float found[kLanes];
    store(found, lanes.scale);
    for (int lane = 0; lane < count; ++lane) {
      scales[number(lane)] = found[lane];
      where[number(lane)] = at + lane;
    }
    for (int i = 0; i < kSub; ++i) {
      store_bytes(codes + at + i * kLanes, to_int(add(lanes.codes[i], splat(4.0f))));
    }
  }
};

BITFOLD_BODY void encode_q3_k(const EncodeBlocksArgs& a) {
  const int64_t blocks = a.rows * (a.k / kSuper);
  int32_t numbers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane * kSubs;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const Batch batch = {a, first, smaller(kLanes, blocks - first)};
    Descents descents;
    descents.run(batch.x(0), static_cast<int>(batch.count) * kSubs);
    Found found;
    for (int j = 0; j < kSubs; ++j) found.scales[j] = gather(descents.scales + j, load_int(numbers));
    const Furthest furthest = furthest_of(found.scales);
    const Mask none = equal(furthest.magnitude, splat(0.0f));
    const F inverse = div(splat(-32.0f), furthest.value);
    for (int j = 0; j < kSubs; ++j) {
      const F level = to_float(signed_byte(nearest_int(mul(inverse, found.scales[j]))));
      const F limited = min(max(level, splat(-32.0f)), splat(31.0f));
      store_int(found.levels[j], to_int(select(none, splat(-32.0f), limited)));
    }
    found.set(select(none, splat(0.0f), div(splat(1.0f), inverse)));
    put_q3_k(batch, found, [&](int s, int j, uint8_t* to) {
      const uint8_t* from = descents.codes + descents.where[s * kSubs + j];
      for (int i = 0; i < kSub; ++i) to[i] = from[i * kLanes];
    });
  }
}

BITFOLD_BODY void encode_q3_k_weighted(const EncodeBlocksArgs& a) {
  const int64_t blocks = a.rows * (a.k / kSuper);
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const Batch batch = {a, first, smaller(kLanes, blocks - first)};
    const F sum = sum_of_squares([&](int lane) { return batch.x(lane); }, kSuper);
    const F sigma2 = div(mul(splat(2.0f), sum), splat(static_cast<float>(kSuper)));
    Found found;
    SymmetricLanes<kSubs> levels;
    search_batch<4>(batch, found, [&](int j, SymmetricLanes<kSub>& lanes) {
      load_lanes([&](int lane) { return batch.importance(lane) + j * kSub; }, lanes.w);
      levels.w[j] = splat(0.0f);
      for (int i = 0; i < kSub; ++i) {
        lanes.w[i] = mul(lanes.w[i], sqrt(add(sigma2, mul(lanes.x[i], lanes.x[i]))));
        levels.w[j] = add(levels.w[j], lanes.w[i]);
      }
    });
    for (int j = 0; j < kSubs; ++j) levels.x[j] = found.scales[j];
    symmetric_search<32, Coding::OddMagnitude>(levels);
    // The inverse is 0 where there is nothing to scale, but also where a scale is infinite.
    const Mask none = greater(splat(kTiny), furthest_of(levels.x).magnitude);
    for (int j = 0; j < kSubs; ++j) {
      const I level = sub(shifted_code<32>(mul(levels.inverse, levels.x[j])), splat(32));
      store_int(found.levels[j], select(none, splat(-32), level));
    }
    found.set(levels.scale);
    put_q3_k(batch, found,
             [&](int s, int j, uint8_t* to) { searched_codes<4>(batch.x(s) + j * kSub, found.inverses[j][s], to); });
  }
}

// ---- Q4_0 and Q5_0 with importance ----

// means: of each row's squares.
template <int Row, int N>
BITFOLD_BODY void encode_weighted(const EncodeBlocksArgs& a, const float* means) {
  auto* out = reinterpret_cast<Block<Row>*>(a.blocks);
  each_small_blocks(a, [&](const SmallBlocks& b) {
    SymmetricLanes<kSmall> lanes;
    load_lanes([&](int lane) { return b.x[lane]; }, lanes.x);
    load_lanes([&](int lane) { return b.importance[lane]; }, lanes.w);
    float sigma2[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sigma2[lane] = means[b.row[lane]];
    const F sigma = load(sigma2);
    for (int i = 0; i < kSmall; ++i) {
      lanes.w[i] = mul(lanes.w[i], sqrt(add(sigma, mul(lanes.x[i], lanes.x[i]))));
    }
    symmetric_search<N, kCoding<N>>(lanes);
    float inverses[kLanes];
    uint16_t scales[kLanes];
    store(inverses, lanes.inverse);
    store_scales(scales, lanes.scale);
    for (int s = 0; s < b.count; ++s) {
      Block<Row>& block = out[b.first + s];
      const F inverse = splat(inverses[s]);
      I codes[kSmallVectors] = {};
      if (inverses[s] != 0.0f) block_codes(b.x[s], codes, [&](F x) { return shifted_code<N>(mul(inverse, x)); });
      put_half(block.d, scales[s]);
      if constexpr (Row == kQ4_0) put_nibbles(block.qs, codes);
      else put_fives(block.qh, block.qs, codes);
    }
  });
}
template <int Row, int N>
BITFOLD_BODY void encode_weighted(const EncodeBlocksArgs& a) {
  float means[kEncodeRows];
  row_means(a, means);
  encode_weighted<Row, N>(a, means);
}

}  // namespace

}  // namespace bitfold::search
