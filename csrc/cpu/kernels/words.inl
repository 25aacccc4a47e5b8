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

// x: for each chunk and step the lanes of all `rows` rows, so that the multiplication reads on and on.
template <int Row>
void arrange(const float* x, int64_t k, int j, int rows, float* panel, float* sums) {
  using W = Words<Row>;
  int32_t numbers[kLanes];
  for (int l = 0; l < kLanes; ++l) numbers[l] = l * W::kSteps;
  const I lane = load_int(numbers);
  float* to = panel + j * kLanes;
  sums += j * kLanes;
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
      store(to, lanes);
      to += rows * kLanes;
      sum = add(sum, lanes);
    }
    store(sums, sum);
    sums += rows * kLanes;
  }
}

// Columns that are multiplied at a time: x for them stays in the first cache. Rows whose totals wait there meanwhile.
template <int M>
inline constexpr int64_t kBlockColumns = 4096 / M;

// Which entry of a row's scales each lane has: as the chunks go by, `start` moves on by whole entries, and the lanes'
// places from there stay the same. Groups that neither divide a chunk nor are divided by it get an entry for every word.
template <int Row>
struct Entries {
  using W = Words<Row>;
  int64_t columns;  // that share an entry; 0: the whole row
  int64_t count;
  I places;

  explicit Entries(const Weight& w) : columns(w.format.group > 0 ? w.format.group : 0) {
    if (columns > 0 && columns % W::kChunk != 0 && W::kChunk % columns != 0) columns = W::kSteps;
    count = columns > 0 ? ceil_div(w.k, columns) : 1;
    int32_t lanes[kLanes] = {};
    if (columns > 0 && columns < W::kChunk) {
      for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l * W::kSteps / columns);
    }
    places = load_int(lanes);
  }
  // With zeros behind the last, which lanes past the end read.
  int64_t padded() const { return count + 2 * kLanes; }
  int64_t per_chunk() const { return columns > 0 && columns < W::kChunk ? W::kChunk / columns : 0; }
  int64_t chunks_per_entry() const { return columns >= W::kChunk ? columns / W::kChunk : int64_t{1} << 40; }
};

// Scales of a row as fp32.
template <int Row>
BITFOLD_SIMD void read_scales(const Weight& w, int64_t row, int64_t groups, float* out) {
  const int64_t at = w.format.group == kPerTensor ? 0 : row * groups;
  int64_t i = 0;
  if (w.format.scale == Scale::Nested) {
    const auto* codes = static_cast<const uint8_t*>(w.scales) + at;
    const F offset = splat(*w.nested_offset);
    while (i < groups) {
      const int64_t block = (at + i) / kNestedGroup;
      const int64_t stop = smaller(groups, (block + 1) * kNestedGroup - at);
      const F nested = splat(w.nested_scales[block]);
      for (; i + kLanes <= stop; i += kLanes) {
        store(out + i, add(mul(gather(&kDynamicMap[0], load_bytes(codes + i)), nested), offset));
      }
      for (; i < stop; ++i) out[i] = group_scale(w, row, i);
    }
  } else if (w.format.scale == Scale::F16) {
    const auto* from = static_cast<const uint16_t*>(w.scales) + at;
    for (; i + kLanes <= groups; i += kLanes) store(out + i, load_half(from + i));
  } else if (w.format.scale == Scale::F32) {
    const auto* from = static_cast<const float*>(w.scales) + at;
    for (; i + kLanes <= groups; i += kLanes) store(out + i, load(from + i));
  }
  for (; i < groups; ++i) out[i] = group_scale(w, row, i);
}

// What is added to code - kHalf: kHalf - zero.
template <int Row>
BITFOLD_SIMD void read_zeros(const Weight& w, int64_t row, int64_t groups, float* out) {
  constexpr int kBits = Words<Row>::kBits;
  const int64_t row_bytes = w.format.group == kPerTensor ? 0 : ceil_div(groups * kBits, 8);
  const I half = splat(int32_t{Words<Row>::kHalf});
  int64_t i = 0;
  for (; i + kLanes <= groups; i += kLanes) {
    store(out + i, to_float(sub(half, unpack<kBits, false>(w.zeros + row * row_bytes + i * kBits / 8))));
  }
  for (; i < groups; ++i) out[i] = static_cast<float>(Words<Row>::kHalf - group_zero(w, row, i));
}

// One value per group to one per entry, with zeros behind.
template <int Row>
BITFOLD_SIMD void spread_groups(const Entries<Row>& entries, int64_t group, int64_t groups, float* values) {
  if (entries.count > groups) {
    for (int64_t i = entries.count - 1; i > 0; --i) values[i] = values[i * entries.columns / group];
  }
  store(values + entries.count, splat(0.0f));
  store(values + entries.count + kLanes, splat(0.0f));
}

// The entries of the rows of one block.
struct RowEntries {
  float* scales;
  float* zeros;  // null: symmetric
  int64_t stride;
};

// `count` chunks of R rows times M rows of x, added to totals[r][j].
template <int Row, int M, int R>
[[gnu::noinline]] void multiply_chunks(const uint8_t* const (&rows)[R], int64_t count, int64_t ahead, const float* x,
                                       const float* x_sums, const Entries<Row>& entries, RowEntries of_rows,
                                       int64_t chunk, float* totals) {
  using W = Words<Row>;
  const Words<Row> values;
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) codes[r] = rows[r];
  const I places = entries.places;
  const int64_t per_chunk = entries.per_chunk(), chunks_per_entry = entries.chunks_per_entry();
  const int64_t first = per_chunk > 0 ? chunk * per_chunk : chunk / chunks_per_entry;
  const float* scales = of_rows.scales + first;
  const float* zeros = of_rows.zeros + (of_rows.zeros != nullptr ? first : 0);
  int64_t until_next = chunks_per_entry - chunk % chunks_per_entry;
  for (; count > 0; --count) {
    I words[R];
    for (int r = 0; r < R; ++r) {
      words[r] = load_words<W::kBits>(codes[r]);
      prefetch(codes[r] + ahead);
      codes[r] += W::kBytes;
    }
    F sums[R][M];
    unroll<W::kSteps>([&]<int Step>() {
      F w_step[R];
      for (int r = 0; r < R; ++r) w_step[r] = values.template at<Step>(words[r]);
      for (int j = 0; j < M; ++j) {
        const F x_step = load(x + (Step * M + j) * kLanes);
        for (int r = 0; r < R; ++r) {
          sums[r][j] = Step == 0 ? mul(w_step[r], x_step) : fma(w_step[r], x_step, sums[r][j]);
        }
      }
    });
    x += W::kChunk * M;
    if (W::kInteger && zeros != nullptr) {
      for (int r = 0; r < R; ++r) {
        const F zero = spread(zeros + r * of_rows.stride, places);
        for (int j = 0; j < M; ++j) sums[r][j] = fma(zero, load(x_sums + j * kLanes), sums[r][j]);
      }
      x_sums += M * kLanes;
    }
    for (int r = 0; r < R; ++r) {
      const F scale = spread(scales + r * of_rows.stride, places);
      for (int j = 0; j < M; ++j) {
        float* total = totals + (r * M + j) * kLanes;
        store(total, fma(sums[r][j], scale, load(total)));
      }
    }
    const int64_t move = per_chunk + (--until_next == 0 ? 1 : 0);
    if (until_next == 0) until_next = chunks_per_entry;
    scales += move;
    if (W::kInteger && zeros != nullptr) zeros += move;
  }
}

template <int Row, int M, int R>
void multiply(const FusedArgs& a) {
  using W = Words<Row>;
  static_assert(kFusedBlock % R == 0 && kBlockColumns<M> % W::kChunk == 0);
  const Weight& w = *a.w;
  const Entries<Row> entries(w);
  const int64_t groups = groups_in_row(w.format, w.k), row_bytes = ceil_div(w.k * W::kBits, 8);
  const int64_t chunks = w.k / W::kChunk, block_chunks = kBlockColumns<M> / W::kChunk;
  const RowEntries of_rows{a.scratch, W::kInteger && w.zeros != nullptr ? a.scratch + kFusedBlock * entries.padded() : nullptr,
                           entries.padded()};
  for (int64_t top = a.row_begin; top < a.row_end; top += kFusedBlock) {
    const int64_t rows = smaller(a.row_end - top, kFusedBlock);
    float totals[kFusedBlock * M * kLanes];
    std::memset(totals, 0, sizeof(totals));
    for (int64_t row = 0; row < rows; ++row) {
      float* scales = of_rows.scales + row * of_rows.stride;
      read_scales<Row>(w, top + row, groups, scales);
      spread_groups(entries, w.format.group, groups, scales);
      if (of_rows.zeros == nullptr) continue;
      float* zeros = of_rows.zeros + row * of_rows.stride;
      read_zeros<Row>(w, top + row, groups, zeros);
      spread_groups(entries, w.format.group, groups, zeros);
    }
    // The rows of a block that has no R left are taken as often as it needs; what comes of them is not used.
    const auto multiply_rows = [&](int64_t row, int64_t chunk, int64_t count, const uint8_t* const(&codes)[R], int64_t ahead) {
      const RowEntries here{of_rows.scales + row * of_rows.stride,
                            of_rows.zeros != nullptr ? of_rows.zeros + row * of_rows.stride : nullptr, of_rows.stride};
      multiply_chunks<Row, M, R>(codes, count, ahead, a.x + chunk * W::kChunk * M, a.x_sums + chunk * kLanes * M, entries,
                                 here, chunk, totals + row * M * kLanes);
    };
    const auto row_codes = [&](int64_t row) {
      return static_cast<const uint8_t*>(w.codes) + smaller(top + row, a.row_end - 1) * row_bytes;
    };
    for (int64_t chunk = 0; chunk < chunks; chunk += block_chunks) {
      for (int64_t row = 0; row < rows; row += R) {
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) codes[r] = row_codes(row + r) + chunk * W::kBytes;
        const int64_t ahead = top + row + 2 * R <= a.row_end ? R * row_bytes : 0;
        multiply_rows(row, chunk, smaller(chunks - chunk, block_chunks), codes, ahead);
      }
    }
    if (chunks * W::kChunk < w.k) {  // the last columns are copied to where they may be overread; x is zero there
      const int64_t done = chunks * W::kBytes;
      for (int64_t row = 0; row < rows; row += R) {
        uint8_t tails[R][W::kBytes] = {};
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) {
          std::memcpy(tails[r], row_codes(row + r) + done, static_cast<size_t>(row_bytes - done));
          codes[r] = tails[r];
        }
        multiply_rows(row, chunks, 1, codes, 0);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int j = 0; j < a.m; ++j) {
        a.y[j * a.y_stride + top + row - a.row_begin] = reduce_add(load(totals + (row * M + j) * kLanes));
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
