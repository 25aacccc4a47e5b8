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
  static constexpr int kSteps = kBits == 3 ? 8 : 32 / kBits;  // codes of a lane
  static constexpr int kChunk = kLanes * kSteps;              // columns of one load
  static constexpr int kBytes = kChunk * kBits / 8;           // and their bytes
  static constexpr int kHalf = 1 << (kBits - 1);              // the zero point of a symmetric integer
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
// Codes are asked for whole steps of rows ahead, at least so many bytes.
inline constexpr int64_t kAheadBytes = 12288;

// The scales (and zero points) of columns [begin, end) of a row, begin at a chunk. Every lane has an entry: as the
// chunks go by, the first lane's moves on by whole entries, and the others' places from there stay the same. Groups
// that neither divide a chunk nor are divided by it get an entry for every word.
template <int Row>
struct Entries {
  using W = Words<Row>;
  int64_t group;    // as in the format; 0: one for the whole row
  int64_t columns;  // of an entry; 0: the whole row
  int64_t first_group, groups;
  int64_t first, count;
  I places;

  Entries(const Weight& w, int64_t begin, int64_t end)
      : group(w.format.group > 0 ? w.format.group : 0), columns(group) {
    if (group > 0 && group % W::kChunk != 0 && W::kChunk % group != 0) columns = W::kSteps;
    first_group = group > 0 ? begin / group : 0;
    groups = group > 0 ? ceil_div(end, group) - first_group : 1;
    first = columns > 0 ? begin / columns : 0;
    count = columns > 0 ? ceil_div(end, columns) - first : 1;
    int32_t lanes[kLanes] = {};
    if (columns > 0 && columns < W::kChunk) {
      for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l * W::kSteps / columns);
    }
    places = load_int(lanes);
  }
  // With zeros behind the last, which the lanes past the end read.
  BITFOLD_SIMD int64_t padded() const { return count + 2 * kLanes; }
  BITFOLD_SIMD int64_t per_chunk() const { return columns > 0 && columns < W::kChunk ? W::kChunk / columns : 0; }
  BITFOLD_SIMD int64_t chunks_per_entry() const {
    return columns >= W::kChunk ? columns / W::kChunk : int64_t{1} << 40;
  }
  // One value per group to one per entry.
  BITFOLD_SIMD void spread_groups(float* values) const {
    if (columns != group) {
      for (int64_t i = count - 1; i >= 0; --i) values[i] = values[(first + i) * columns / group - first_group];
    }
    store(values + count, splat(0.0f));
    store(values + count + kLanes, splat(0.0f));
  }
};

// Elements [i, count) of p, as many as there are lanes, in memory that can be read in full.
template <class T>
struct Tail {
  T lanes[kLanes] = {};
  BITFOLD_SIMD Tail(const T* p, int64_t count) { std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T)); }
};
// out[i] = widen(from + i) for all i < count; up to kLanes more are written.
template <class T, class Widen>
BITFOLD_SIMD void widen_all(const T* from, int64_t count, float* out, Widen widen) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, widen(from + i));
  if (i < count) store(out + i, widen(Tail<T>(from + i, count - i).lanes));
}

// As fp32.
template <int Row>
BITFOLD_SIMD void read_scales(const Weight& w, int64_t row, const Entries<Row>& entries, float* out) {
  const int64_t count = entries.groups;
  const int64_t at = w.format.group == kPerTensor ? 0 : row * groups_in_row(w.format, w.k) + entries.first_group;
  if (w.format.scale == Scale::Nested) {
    const auto* codes = static_cast<const uint8_t*>(w.scales) + at;
    const F offset = splat(*w.nested_offset);
    for (int64_t i = 0; i < count;) {
      const int64_t block = (at + i) / kNestedGroup;
      const int64_t stop = smaller(count, (block + 1) * kNestedGroup - at);
      const F nested = splat(w.nested_scales[block]);
      widen_all(codes + i, stop - i, out + i, [&](const uint8_t* p) {
        return add(mul(gather(&kDynamicMap[0], unpack<8, false>(p)), nested), offset);
      });
      i = stop;
    }
  } else if (w.format.scale == Scale::F32) {
    widen_all(static_cast<const float*>(w.scales) + at, count, out, [](const float* p) { return load(p); });
  } else {
    const auto* from = static_cast<const uint16_t*>(w.scales) + at;
    if (w.format.scale == Scale::F16) widen_all(from, count, out, [](const uint16_t* p) { return load_half(p); });
    else widen_all(from, count, out, [](const uint16_t* p) { return load_bf16(p); });
  }
  entries.spread_groups(out);
}

// What is added to code - kHalf: kHalf - zero.
template <int Row>
BITFOLD_SIMD void read_zeros(const Weight& w, int64_t row, const Entries<Row>& entries, float* out) {
  constexpr int kBits = Words<Row>::kBits;
  const int64_t first = entries.first_group, count = entries.groups;
  const int64_t bytes = ceil_div(groups_in_row(w.format, w.k) * kBits, 8);
  const uint8_t* zeros = w.zeros + (w.format.group == kPerTensor ? 0 : row * bytes);
  const I half = splat(int32_t{Words<Row>::kHalf});
  const auto widen = [&](const uint8_t* p) { return to_float(sub(half, unpack<kBits, false>(p))); };
  int64_t i = 0;
  if (first * kBits % 8 == 0) {
    const uint8_t* from = zeros + first * kBits / 8;
    for (; i + kLanes <= count; i += kLanes) store(out + i, widen(from + i * kBits / 8));
    const Tail<uint8_t> tail(from + i * kBits / 8, ceil_div((count - i) * kBits, 8));
    store(out + i, widen(tail.lanes));
  } else {
    for (; i < count; ++i) out[i] = static_cast<float>(Words<Row>::kHalf - group_zero<Row>(w, row, first + i));
  }
  entries.spread_groups(out);
}

// Follows the entries of a row from chunk to chunk.
template <int Row>
struct Cursor {
  const float* scales;
  const float* zeros;  // null: symmetric
  int64_t per_chunk, chunks_per_entry, until_next;

  BITFOLD_SIMD Cursor(const Entries<Row>& entries, const float* scales_, const float* zeros_, int64_t chunk)
      : per_chunk(entries.per_chunk()), chunks_per_entry(entries.chunks_per_entry()) {
    const int64_t at = (per_chunk > 0 ? chunk * per_chunk : chunk / chunks_per_entry) - entries.first;
    until_next = per_chunk > 0 ? chunks_per_entry : chunks_per_entry - chunk % chunks_per_entry;
    scales = scales_ + at;
    zeros = zeros_ != nullptr ? zeros_ + at : nullptr;
  }
  BITFOLD_SIMD void next() {
    int64_t move = per_chunk;
    if (--until_next == 0) {
      ++move;
      until_next = chunks_per_entry;
    }
    scales += move;
    if (Words<Row>::kInteger && zeros != nullptr) zeros += move;
  }
};

template <int Row>
constexpr int64_t row_bytes(const Weight& w) {
  return ceil_div(w.k * Words<Row>::kBits, 8);
}

template <int Row>
void decode_tile(const Weight& w, int64_t first, int rows, int64_t begin, int64_t end, float* tile, float* scratch) {
  using W = Words<Row>;
  constexpr int kStride = kTileRows * kLanes;
  const W values;
  const Entries<Row> entries(w, begin, end);
  float* zeros = W::kInteger && w.zeros != nullptr ? scratch + entries.padded() : nullptr;
  const int64_t bytes = row_bytes<Row>(w);
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    // The rows of the next tile are asked for while these are decoded.
    const int64_t ahead = row + kTileRows < w.n ? kTileRows * bytes : 0;
    read_scales<Row>(w, row, entries, scratch);
    if (zeros != nullptr) read_zeros<Row>(w, row, entries, zeros);
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * bytes + begin * W::kBits / 8;
    Cursor<Row> at(entries, scratch, zeros, begin / W::kChunk);
    float* out = tile + r * kLanes;
    for (int64_t c = begin; c < end; c += W::kChunk) {
      uint8_t tail[W::kBytes];
      if (c + W::kChunk > w.k) {
        std::memset(tail, 0, sizeof(tail));
        std::memcpy(tail, codes, static_cast<size_t>(bytes - c * W::kBits / 8));
        codes = tail;
      }
      const I words = load_words<W::kBits>(codes);
      prefetch(codes + ahead);
      codes += W::kBytes;
      const F scale = spread(at.scales, entries.places);
      const F zero = W::kInteger && zeros != nullptr ? spread(at.zeros, entries.places) : splat(0.0f);
      unroll<W::kSteps>([&]<int Step>() {
        F value = values.template at<Step>(words);
        if constexpr (W::kInteger) value = add(value, zero);
        store(out + Step * kStride, mul(value, scale));
      });
      out += W::kSteps * kStride;
      at.next();
    }
  }
}

// `count` chunks of R rows times M rows of x, added to totals[r][j]. The entries of a row follow those of the one
// before at `entry_stride`.
template <int Row, int M, int R>
[[gnu::noinline]] void multiply_chunks(const uint8_t* const (&rows)[R], int64_t count, int64_t ahead, const float* x,
                                       const float* x_sums, Cursor<Row> at, int64_t entry_stride, I places,
                                       float* totals) {
  using W = Words<Row>;
  const W values;
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) codes[r] = rows[r];
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
        const F x_step = hold(load(x + (Step * M + j) * kLanes));
        for (int r = 0; r < R; ++r) {
          sums[r][j] = Step == 0 ? mul(w_step[r], x_step) : fma(w_step[r], x_step, sums[r][j]);
        }
      }
    });
    x += W::kChunk * M;
    if (W::kInteger && at.zeros != nullptr) {
      for (int r = 0; r < R; ++r) {
        const F zero = spread(at.zeros + r * entry_stride, places);
        for (int j = 0; j < M; ++j) sums[r][j] = fma(zero, load(x_sums + j * kLanes), sums[r][j]);
      }
      x_sums += M * kLanes;
    }
    for (int r = 0; r < R; ++r) {
      const F scale = spread(at.scales + r * entry_stride, places);
      for (int j = 0; j < M; ++j) {
        float* total = totals + (r * M + j) * kLanes;
        store(total, fma(sums[r][j], scale, load(total)));
      }
    }
    at.next();
  }
}

template <int Row, int M, int R>
void multiply(const FusedArgs& a) {
  using W = Words<Row>;
  static_assert(kFusedBlock % R == 0 && kBlockColumns<M> % W::kChunk == 0);
  const Weight& w = *a.w;
  const Entries<Row> entries(w, 0, w.k);
  const int64_t stride = entries.padded(), bytes = row_bytes<Row>(w);
  const int64_t chunks = w.k / W::kChunk, block_chunks = kBlockColumns<M> / W::kChunk;
  float* scales = a.scratch;
  float* zeros = W::kInteger && w.zeros != nullptr ? scales + kFusedBlock * stride : nullptr;
  for (int64_t top = a.row_begin; top < a.row_end; top += kFusedBlock) {
    const int64_t rows = smaller(a.row_end - top, kFusedBlock);
    alignas(64) float totals[kFusedBlock * M * kLanes];
    std::memset(totals, 0, sizeof(totals));
    for (int64_t row = 0; row < rows; ++row) {
      read_scales<Row>(w, top + row, entries, scales + row * stride);
      if (zeros != nullptr) read_zeros<Row>(w, top + row, entries, zeros + row * stride);
    }
    const auto multiply_rows = [&](int64_t row, int64_t chunk, int64_t count, const uint8_t* const(&codes)[R],
                                   int64_t ahead) {
      const Cursor<Row> at(entries, scales + row * stride, zeros != nullptr ? zeros + row * stride : nullptr, chunk);
      multiply_chunks<Row, M, R>(codes, count, ahead, a.x + chunk * W::kChunk * M, a.x_sums + chunk * kLanes * M, at,
                                 stride, entries.places, totals + row * M * kLanes);
    };
    // The last row is taken again where a block has no R rows left; what comes of that is not used.
    const auto row_codes = [&](int64_t row) {
      return static_cast<const uint8_t*>(w.codes) + smaller(top + row, a.row_end - 1) * bytes;
    };
    for (int64_t chunk = 0; chunk < chunks; chunk += block_chunks) {
      for (int64_t row = 0; row < rows; row += R) {
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) codes[r] = row_codes(row + r) + chunk * W::kBytes;
        const int64_t ahead = ceil_div(kAheadBytes, R * bytes) * R * bytes;
        multiply_rows(row, chunk, smaller(chunks - chunk, block_chunks), codes, ahead);
      }
    }
    if (chunks * W::kChunk < w.k) {  // the last columns are copied to where they may be overread; x is zero there
      const int64_t done = chunks * W::kBytes;
      for (int64_t row = 0; row < rows; row += R) {
        uint8_t tails[R][W::kBytes] = {};
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) {
          std::memcpy(tails[r], row_codes(row + r) + done, static_cast<size_t>(bytes - done));
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
  kernels.linear[Row] = {fused<Row>, arrange<Row>, decode_tile<Row>, Words<Row>::kChunk, Words<Row>::kSteps};
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
