// Small batches of integers and codebooks: every packed weight is read once, decoded in registers, and multiplied with
// all rows of x there.
//
// Codes are taken as they lie: one load fills each lane with a word of consecutive codes (8 of 4 or 3 bits, 16 of 2, 4
// of 8), a shift brings the next code of every lane to the bottom, and one table lookup makes it a value. A vector thus
// holds columns that are a word apart, so x is arranged likewise, once for all rows of the weight.
//
// The sum of one output is: per chunk (one load), a vector of sums over the steps of a word; that times the lanes'
// scales goes to a vector of totals; the totals are added up last. This order does not depend on how many rows x has.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

template <int Row>
struct Words {
  static constexpr FormatRow kRow = kFormats[Row];
  static constexpr int kBits = kRow.bits;
  static constexpr int kSteps = kBits == 3 ? 8 : 32 / kBits;    // codes of a lane
  static constexpr int kChunk = kLanes * kSteps;                // columns of one load
  static constexpr int kBytes = kChunk * kBits / 8;             // and their bytes
  static constexpr int kHalf = 1 << (kBits - 1);                // the zero point of a symmetric integer
  static constexpr bool kInteger = kRow.grid == Grid::Integer;
  // The column of a word that step `step` brings up.
  static constexpr int column(int step) { return kRow.high_first ? step ^ 1 : step; }

  static constexpr std::array<float, 16> kValues = [] {
    std::array<float, 16> values{};
    if constexpr (Row == kNf4) values = kNf4Values;
    else if constexpr (Row == kFp4) values = kFp4Values;
    else
      for (int i = 0; i < 16; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i % (2 * kHalf) - kHalf);
    return values;
  }();
  Table16 table = load_table(&kValues[0]);

  // Integers come out as code - kHalf.
  template <int Step>
  BITFOLD_SIMD F at(I words) const {
    if constexpr (kBits == 8) {
      const I flipped = bit_xor(words, splat(static_cast<int32_t>(0x80808080)));
      return to_float(shift_right_signed<24>(shift_left<24 - 8 * Step>(flipped)));
    } else if constexpr (kInteger && !kOneLookup) {
      const I codes = bit_and(shift_right<kBits * Step>(words), splat(int32_t{2 * kHalf - 1}));
      return to_float(sub(codes, splat(int32_t{kHalf})));
    } else {
      return lookup(table, shift_right<kBits * Step>(words));
    }
  }
};

// step.operator()<0>(), then <1>, and so on.
template <int Count, int First = 0, class Step>
BITFOLD_SIMD void unroll(Step step) {
  if constexpr (First < Count) {
    step.template operator()<First>();
    unroll<Count, First + 1>(step);
  }
}

template <int Row>
void arrange(const float* x, int64_t k, float* to, float* sums) {
  using W = Words<Row>;
  int32_t numbers[kLanes];
  for (int l = 0; l < kLanes; ++l) numbers[l] = l * W::kSteps;
  const I lane = load_int(numbers);
  for (int64_t c = 0; c < k; c += W::kChunk) {
    float padded[W::kChunk];
    const float* from = x + c;
    if (k - c < W::kChunk) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, from, static_cast<size_t>(k - c) * sizeof(float));
      from = padded;
    }
    F sum = splat(0.0f);
    for (int step = 0; step < W::kSteps; ++step) {
      const F lanes = gather(from + W::column(step), lane);
      store(to + c + step * kLanes, lanes);
      sum = add(sum, lanes);
    }
    store(sums + c / W::kSteps, sum);
  }
}

// Columns that are multiplied at a time: x for them stays in the first cache. Rows whose totals wait there meanwhile.
template <int M>
inline constexpr int64_t kBlockColumns = 4096 / M;
inline constexpr int64_t kBlockRows = 32;
inline constexpr int64_t kSmallestGroup = 16;

// Which scale each lane of a chunk has: p[index] where p moves by whole groups.
struct LaneGroups {
  int64_t group;  // columns; 0: one for the whole row
  I index;
  bool regular;  // the same in every chunk

  template <int Row>
  BITFOLD_SIMD static LaneGroups of(int64_t group) {
    using W = Words<Row>;
    LaneGroups out{group > 0 ? group : 0, splat(0), true};
    if (group > 0 && group % W::kChunk != 0) {
      out.regular = W::kChunk % group == 0;
      out.template set<Row>(0);
    }
    return out;
  }
  template <int Row>
  BITFOLD_SIMD void set(int64_t column) {
    int32_t lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] = static_cast<int32_t>((column + l * Words<Row>::kSteps) / group - column / group);
    }
    index = load_int(lanes);
  }
};

// Scales and zero points of groups [first, last) of a row as fp32, and zeros for the lanes behind the last.
template <int Row>
BITFOLD_SIMD void read_groups(const Weight& w, int64_t row, int64_t first, int64_t last, float* scales, float* zeros) {
  const int64_t count = last - first;
  const int64_t at = w.format.group == kPerTensor ? 0 : row * groups_in_row(w.format, w.k) + first;
  int64_t i = 0;
  if (w.format.scale == Scale::Nested) {
    const auto* codes = static_cast<const uint8_t*>(w.scales) + at;
    const F offset = splat(*w.nested_offset);
    while (i < count) {
      const int64_t block = (at + i) / kNestedGroup;
      const int64_t stop = smaller(count, (block + 1) * kNestedGroup - at);
      const F nested = splat(w.nested_scales[block]);
      for (; i + kLanes <= stop; i += kLanes) {
        store(scales + i, add(mul(gather(&kDynamicMap[0], load_bytes(codes + i)), nested), offset));
      }
      for (; i < stop; ++i) scales[i] = group_scale(w, row, first + i);
    }
  } else {
    if (w.format.scale == Scale::F16) {
      const auto* from = static_cast<const uint16_t*>(w.scales) + at;
      for (; i + kLanes <= count; i += kLanes) store(scales + i, load_half(from + i));
    } else if (w.format.scale == Scale::F32) {
      const auto* from = static_cast<const float*>(w.scales) + at;
      for (; i + kLanes <= count; i += kLanes) store(scales + i, load(from + i));
    }
    for (; i < count; ++i) scales[i] = group_scale(w, row, first + i);
  }
  store(scales + count, splat(0.0f));
  if constexpr (Words<Row>::kInteger) {
    if (w.zeros != nullptr) {
      for (i = 0; i < count; ++i) {
        zeros[i] = static_cast<float>(Words<Row>::kHalf - group_zero(w, row, first + i));
      }
      store(zeros + count, splat(0.0f));
    }
  }
}

// Columns [begin, end) of R rows times M rows of x, added to totals[r][j]. `rows` may repeat.
template <int Row, int M, int R>
BITFOLD_SIMD void multiply_block(const FusedArgs& a, const Words<Row>& values, LaneGroups groups, const int64_t* rows,
                                 int64_t begin, int64_t end, int64_t ahead, F (&totals)[R][M]) {
  using W = Words<Row>;
  const Weight& w = *a.w;
  const int64_t row_bytes = ceil_div(w.k * W::kBits, 8);
  const int64_t first_group = groups.group > 0 ? begin / groups.group : 0;
  const int64_t last_group = groups.group > 0 ? ceil_div(end, groups.group) : 1;
  float scales[R][kBlockColumns<M> / kSmallestGroup + 1 + kLanes], zeros[R][kBlockColumns<M> / kSmallestGroup + 1 + kLanes];
  const uint8_t* codes[R];
  uint8_t tails[R][W::kBytes];
  const bool offset = W::kInteger && w.zeros != nullptr;
  for (int r = 0; r < R; ++r) {
    read_groups<Row>(w, rows[r], first_group, last_group, scales[r], zeros[r]);
    codes[r] = static_cast<const uint8_t*>(w.codes) + rows[r] * row_bytes + begin * W::kBits / 8;
  }
  for (int64_t c = begin; c < end; c += W::kChunk) {
    if (c + W::kChunk > w.k) {  // the last columns are copied to where they may be overread; x is zero there
      for (int r = 0; r < R; ++r) {
        std::memset(tails[r], 0, W::kBytes);
        std::memcpy(tails[r], codes[r], static_cast<size_t>(row_bytes - c * W::kBits / 8));
        codes[r] = tails[r];
      }
    }
    I words[R];
    for (int r = 0; r < R; ++r) {
      words[r] = load_words<W::kBits>(codes[r]);
      prefetch(codes[r] + ahead);
      codes[r] += W::kBytes;
    }
    const float* x = a.x + c;
    F sums[R][M];
    unroll<W::kSteps>([&]<int Step>() {
      F w_step[R];
      for (int r = 0; r < R; ++r) w_step[r] = values.template at<Step>(words[r]);
      for (int j = 0; j < M; ++j) {
        const F x_step = load(x + j * a.x_stride + Step * kLanes);
        for (int r = 0; r < R; ++r) {
          sums[r][j] = Step == 0 ? mul(w_step[r], x_step) : fma(w_step[r], x_step, sums[r][j]);
        }
      }
    });
    if (!groups.regular) groups.template set<Row>(c);
    const int64_t group = groups.group > 0 ? c / groups.group - first_group : 0;
    if (offset) {
      for (int r = 0; r < R; ++r) {
        const F zero = spread(zeros[r] + group, groups.index);
        for (int j = 0; j < M; ++j) {
          sums[r][j] = fma(zero, load(a.x_sums + j * a.x_sums_stride + c / W::kSteps), sums[r][j]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const F scale = spread(scales[r] + group, groups.index);
      for (int j = 0; j < M; ++j) totals[r][j] = fma(sums[r][j], scale, totals[r][j]);
    }
  }
}

template <int Row, int M, int R>
void multiply(const FusedArgs& a) {
  const Weight& w = *a.w;
  const Words<Row> values;
  const LaneGroups groups = LaneGroups::template of<Row>(w.format.group);
  const int64_t columns = kBlockColumns<M>;
  const int64_t row_bytes = ceil_div(w.k * Words<Row>::kBits, 8);
  for (int64_t top = a.row_begin; top < a.row_end; top += kBlockRows) {
    const int64_t bottom = smaller(a.row_end, top + kBlockRows);
    F totals[kBlockRows / R][R][M];
    for (auto& block : totals) {
      for (auto& row : block) {
        for (F& lanes : row) lanes = splat(0.0f);
      }
    }
    for (int64_t begin = 0; begin < w.k; begin += columns) {
      const int64_t end = smaller(w.k, begin + columns);
      for (int64_t row = top; row < bottom; row += R) {
        int64_t rows[R];
        for (int r = 0; r < R; ++r) rows[r] = smaller(row + r, a.row_end - 1);
        const int64_t ahead = row + 2 * R <= a.w->n ? R * row_bytes : 0;
        multiply_block<Row, M, R>(a, values, groups, rows, begin, end, ahead, totals[(row - top) / R]);
      }
    }
    for (int64_t row = top; row < bottom; ++row) {
      for (int j = 0; j < a.m; ++j) {
        a.y[j * a.y_stride + row - a.row_begin] = reduce_add(totals[(row - top) / R][(row - top) % R][j]);
      }
    }
  }
}

template <int Row>
void fused(const FusedArgs& a) {
  if (a.m == 1) return multiply<Row, 1, 4>(a);
  if (a.m == 2) return multiply<Row, 2, 4>(a);
  if (a.m <= 4) return multiply<Row, 4, 4>(a);
  return multiply<Row, 8, 2>(a);
}

template <int Row>
void fill(Kernels& kernels) {
  kernels.fused[Row] = {fused<Row>, arrange<Row>, Words<Row>::kChunk, Words<Row>::kSteps};
}

}  // namespace

void BITFOLD_ISA(words)(Kernels& kernels) {
  fill<kInt8>(kernels);
  fill<kInt4>(kernels);
  fill<kInt3>(kernels);
  fill<kInt2>(kernels);
  fill<kNf4>(kernels);
  fill<kFp4>(kernels);
}

}  // namespace bitfold::cpu
