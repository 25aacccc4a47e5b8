// Rows of words of codes, for the kernels of small batches: how the codes lie in lanes, which scales and zero points go
// with them, and in which order rows are taken.
#pragma once

#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

// One load fills each lane with a word of consecutive codes: 8 of 4 or 3 bits, 16 of 2, 4 of 8.
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

// Columns that are multiplied at a time: x for them stays in the first cache. Rows whose totals wait there meanwhile.
template <int M>
inline constexpr int64_t kBlockColumns = 4096 / M;
// Codes are asked for whole rows ahead, at least so many bytes of what is read at a time.
inline constexpr int64_t kAheadBytes = 2048;

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
  // Entries, a scale or zero point for each lane. Most often one does for all, and costs no shuffle.
  BITFOLD_SIMD F lanes(const float* entries, I places) const {
    return per_chunk == 0 ? splat(*entries) : spread(entries, places);
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

// The product. `Chunks` adds `count` chunks of R rows times M rows of x to totals[r][j], vectors whose lanes are added
// up last; the scales of a row follow those of the one before at `entry_stride`.
template <int Row, int R>
using ChunksFn = void (*)(const uint8_t* const (&codes)[R], int64_t count, int64_t ahead, const float* x,
                          const float* x_sums, Cursor<Row> at, int64_t entry_stride, I places, float* totals);

// R rows at a time, which lie far apart: the range is cut into R runs, and each goes on from row to row in memory. A
// core looks ahead once in each page that it reads, and so does it for R of them.
template <int Row, int M, int R, ChunksFn<Row, R> Chunks>
void multiply(const FusedArgs& a) {
  using W = Words<Row>;
  static_assert(kFusedBlock % R == 0 && kBlockColumns<M> % W::kChunk == 0);
  const Weight& w = *a.w;
  const Entries<Row> entries(w, 0, w.k);
  const int64_t stride = entries.padded(), bytes = row_bytes<Row>(w);
  const int64_t chunks = w.k / W::kChunk, block_chunks = kBlockColumns<M> / W::kChunk;
  const int64_t ahead = bytes > 0 ? ceil_div(kAheadBytes, smaller(block_chunks * W::kBytes, bytes)) * bytes : 0;
  const int64_t run = ceil_div(a.row_end - a.row_begin, R);
  float* scales = a.scratch;
  float* zeros = W::kInteger && w.zeros != nullptr ? scales + kFusedBlock * stride : nullptr;
  constexpr int64_t kSteps = kFusedBlock / R;
  for (int64_t top = 0; top < run; top += kSteps) {
    const int64_t steps = smaller(run - top, kSteps);
    // Past the end the last row is taken again; what comes of that is not used.
    const auto row_at = [&](int64_t step, int r) { return smaller(a.row_begin + r * run + top + step, a.row_end - 1); };
    const auto codes_at = [&](int64_t step, int r) {
      return static_cast<const uint8_t*>(w.codes) + row_at(step, r) * bytes;
    };
    alignas(64) float totals[kFusedBlock * M * kLanes];
    std::memset(totals, 0, sizeof(totals));
    for (int64_t step = 0; step < steps; ++step) {
      for (int r = 0; r < R; ++r) {
        const int64_t at = (step * R + r) * stride;
        read_scales<Row>(w, row_at(step, r), entries, scales + at);
        if (zeros != nullptr) read_zeros<Row>(w, row_at(step, r), entries, zeros + at);
      }
    }
    const auto multiply_rows = [&](int64_t step, int64_t chunk, int64_t count, const uint8_t* const(&codes)[R],
                                   int64_t ahead_of_codes) {
      const int64_t first = step * R * stride;
      const Cursor<Row> at(entries, scales + first, zeros != nullptr ? zeros + first : nullptr, chunk);
      Chunks(codes, count, ahead_of_codes, a.x + chunk * W::kChunk * M, a.x_sums + chunk * kLanes * M, at, stride,
             entries.places, totals + step * R * M * kLanes);
    };
    for (int64_t chunk = 0; chunk < chunks; chunk += block_chunks) {
      for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) codes[r] = codes_at(step, r) + chunk * W::kBytes;
        multiply_rows(step, chunk, smaller(chunks - chunk, block_chunks), codes, ahead);
      }
    }
    if (chunks * W::kChunk < w.k) {  // the last columns are copied to where they may be overread; x is zero there
      const int64_t done = chunks * W::kBytes;
      for (int64_t step = 0; step < steps; ++step) {
        uint8_t tails[R][W::kBytes] = {};
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) {
          std::memcpy(tails[r], codes_at(step, r) + done, static_cast<size_t>(bytes - done));
          codes[r] = tails[r];
        }
        multiply_rows(step, chunks, 1, codes, 0);
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      for (int r = 0; r < R; ++r) {
        const int64_t row = r * run + top + step;
        if (row >= a.row_end - a.row_begin) continue;
        for (int j = 0; j < a.m; ++j) {
          a.y[j * a.y_stride + row] = reduce_add(load(totals + ((step * R + r) * M + j) * kLanes));
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold::cpu
