// Small batches of floats: every packed weight is read once, decoded in registers, and multiplied with all rows of x
// there.
//
// Bytes are taken as they lie, as words of two: shifts move each into the place of a half, the even ones and the odd
// ones, and the hardware converts halves. So a vector holds every other column of two vectors', and x is arranged
// likewise, once for all rows of the weight.
//
// The sum of one output is: for each piece of a row, a vector of sums over its vectors in turn; that times the scale
// goes to a vector of totals; the totals are added up last. This order does not depend on how many rows x has.
#include <limits>
#include <numeric>

#include "cpu/kernels/runs.hpp"
#include "formats/fp8.hpp"

namespace bitfold::cpu {
namespace {

// Columns that are decoded at a time: four vectors.
constexpr int64_t kChunkColumns = 4 * kLanes;
// Columns of a piece at most, so that long sums stay accurate: a group, or an even part of one.
constexpr int64_t kPiece = 512;
static_assert(kPiece % kChunkColumns == 0 && kAlign % (2 * kLanes) == 0 && kBlockColumns<kFusedRows> % kPiece == 0);
BITFOLD_SIMD int64_t piece_of(const Format& format) {
  if (format.group < 1) return kPiece;
  return format.group <= kPiece ? format.group : std::gcd(format.group, kPiece);
}

// A chunk of a family's codes, and the lanes of its vectors before the scale, which is meant for kUnit times them.
template <int Row>
struct Chunk;
template <>
struct Chunk<kFp16> {
  static constexpr float kUnit = 1.0f;
  const uint16_t* codes;
  BITFOLD_SIMD void read(const uint8_t* p) { codes = reinterpret_cast<const uint16_t*>(p); }
  template <int Vector>
  BITFOLD_SIMD F at() const {
    return load_half(codes + Vector * kLanes);
  }
};
template <>
struct Chunk<kBf16> {
  static constexpr float kUnit = 1.0f;
  const uint16_t* codes;
  BITFOLD_SIMD void read(const uint8_t* p) { codes = reinterpret_cast<const uint16_t*>(p); }
  template <int Vector>
  BITFOLD_SIMD F at() const {
    return load_bf16(codes + Vector * kLanes);
  }
};
template <>
struct Chunk<kE5m2> {  // the upper byte of a half
  static constexpr float kUnit = 1.0f;
  I even, odd;
  BITFOLD_SIMD void read(const uint8_t* p) {
    const I words = load_words<8>(p);
    even = shift_words_left<8>(words);
    odd = bit_and(words, splat(static_cast<int32_t>(0xff00ff00)));
  }
  template <int Vector>
  BITFOLD_SIMD F at() const {
    return halves_of<Vector / 2>(Vector % 2 == 0 ? even : odd);
  }
};
template <>
struct Chunk<kE4m3> {  // as load_e4m3_small: the sign is extended into the highest bit, and taken off the next
  static constexpr float kUnit = 256.0f;
  I even, odd;
  BITFOLD_SIMD void read(const uint8_t* p) {
    const I words = load_words<8>(p), mask = splat(static_cast<int32_t>(0xbf80bf80));
    even = bit_and(shift_words_right_signed<1>(shift_words_left<8>(words)), mask);
    odd = bit_and(shift_words_right_signed<1>(words), mask);
  }
  template <int Vector>
  BITFOLD_SIMD F at() const {
    return halves_of<Vector / 2>(Vector % 2 == 0 ? even : odd);
  }
};

template <int Row>
inline constexpr int64_t kCodeBytes = kFormats[Row].bits / 8;
template <int Row>
inline constexpr bool kEvenOdd = kFormats[Row].bits == 8;

// Whether NaNs are among codes of e4m3, which alone come out as numbers; encoding makes none.
template <int Row>
struct Nans {
  I found = splat(0);  // the highest bit of each byte
  BITFOLD_SIMD void look(const uint8_t* chunk) {
    if constexpr (Row == kE4m3) {
      const I magnitudes = bit_and(load_words<8>(chunk), splat(int32_t{0x7f7f7f7f}));
      found = bit_or(found, add(magnitudes, splat(int32_t{0x01010101})));
    }
  }
  BITFOLD_SIMD bool any_found() const {
    if constexpr (Row != kE4m3) return false;
    const I highest = bit_and(found, splat(static_cast<int32_t>(0x80808080)));
    return any(opposite(equal(highest, splat(int32_t{0}))));
  }
};
template <int Row>
bool nan_in_row(const uint8_t* codes, int64_t count) {
  Nans<Row> nans;
  int64_t i = 0;
  for (; i + kChunkColumns <= count; i += kChunkColumns) nans.look(codes + i);
  if (i < count) {
    uint8_t last[kChunkColumns * kCodeBytes<Row>] = {};
    std::memcpy(last, codes + i, static_cast<size_t>(count - i));
    nans.look(last);
  }
  return nans.any_found();
}

// Of each piece of a row, kUnit times, and one more.
template <int Row>
void read_scales(const Weight& w, int64_t row, int64_t piece, float* out) {
  const Format& format = w.format;
  const int64_t pieces = ceil_div(w.k, piece), per_group = format.group > 0 ? format.group / piece : pieces;
  const int64_t at = scale_row(format, row) * groups_in_row(format, w.k);
  for (int64_t i = 0, group = 0; i < pieces; ++group) {
    float scale = 1.0f;
    if constexpr (kFormats[Row].grid != Grid::Cast) {
      scale =
          format.scale == Scale::Nested ? group_scale(w, row, group) : read_scale(w.scales, format.scale, at + group);
    }
    for (const int64_t stop = smaller(pieces, i + per_group); i < stop; ++i) out[i] = scale * Chunk<Row>::kUnit;
  }
}

// Adds `pieces` pieces of R rows of the weight times M rows of x to totals[r][j]; each is `steps` times the first
// `Vectors` vectors of a chunk, and of the last chunk all may be read. The scales of a row follow those of the one
// before at `scale_stride`; what is multiplied later lies `ahead` of the codes.
template <int Row, int M, int R, int Vectors>
[[gnu::noinline]] void multiply_pieces(const uint8_t* const (&rows)[R], int64_t pieces, int64_t steps, int64_t ahead,
                                       const float* x, const float* scales, int64_t scale_stride, Nans<Row>& nans,
                                       float* totals) {
  constexpr bool kHeld = M * R <= kLanes / 2;  // totals in registers
  constexpr int64_t kBytes = Vectors * kLanes * kCodeBytes<Row>;
  Nans<Row> seen = nans;
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) codes[r] = rows[r];
  F held[R][M];
  if constexpr (kHeld) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) held[r][j] = load(totals + (r * M + j) * kLanes);
    }
  }
  for (; pieces > 0; --pieces, ++scales) {
    F sums[R][M];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) sums[r][j] = splat(0.0f);
    }
    for (int64_t step = 0; step < steps; ++step) {
      Chunk<Row> chunks[R];
      for (int r = 0; r < R; ++r) {
        chunks[r].read(codes[r]);
        seen.look(codes[r]);
        for (int64_t line = 0; line < kBytes; line += 64) prefetch(codes[r] + line + ahead);
        codes[r] += kBytes;
      }
      unroll<Vectors>([&]<int Vector>() {
        F lanes[R];
        for (int r = 0; r < R; ++r) lanes[r] = chunks[r].template at<Vector>();
        for (int j = 0; j < M; ++j) {
          const F x_lanes = hold(load(x + (Vector * M + j) * kLanes));
          for (int r = 0; r < R; ++r) sums[r][j] = fma(lanes[r], x_lanes, sums[r][j]);
        }
      });
      x += Vectors * M * kLanes;
    }
    for (int r = 0; r < R; ++r) {
      const F scale = splat(scales[r * scale_stride]);
      for (int j = 0; j < M; ++j) {
        float* total = totals + (r * M + j) * kLanes;
        if constexpr (kHeld) held[r][j] = fma(sums[r][j], scale, held[r][j]);
        else store(total, fma(sums[r][j], scale, load(total)));
      }
    }
  }
  if constexpr (kHeld) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) store(totals + (r * M + j) * kLanes, held[r][j]);
    }
  }
  nans = seen;
}

// R rows at a time, which lie far apart (runs.hpp).
template <int Row, int M, int R>
void multiply_floats(const FusedArgs& a) {
  static_assert(kFusedBlock % R == 0 && M * R % 4 == 0);
  const Weight& w = *a.w;
  const int64_t bytes = w.k * kCodeBytes<Row>, rows = a.row_end - a.row_begin, run = ceil_div(rows, R);
  const int64_t at_a_time = smaller(kBlockColumns<M> * kCodeBytes<Row>, bytes);
  const int64_t ahead = bytes > 0 ? ceil_div(kAheadBytes, at_a_time) * bytes : 0;
  // Pieces that are no multiple of a chunk are taken in halves of one. Those at the end that aren't whole, or whose
  // last chunk isn't, are copied to where it may be overread.
  const int64_t piece = piece_of(w.format), in_row = ceil_div(w.k, piece);
  const bool halves = piece % kChunkColumns != 0;
  const auto multiply = halves ? multiply_pieces<Row, M, R, 2> : multiply_pieces<Row, M, R, 4>;
  const int64_t step_columns = halves ? 2 * kLanes : 4 * kLanes;
  const int64_t direct = w.k < kChunkColumns ? 0 : (w.k - (halves ? 2 * kLanes : 0)) / piece;
  const int64_t block_pieces = ceil_div(kBlockColumns<M>, piece);
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
      for (int r = 0; r < R; ++r) read_scales<Row>(w, row_at(step, r), piece, a.scratch + (step * R + r) * in_row);
    }
    Nans<Row> nans;
    for (int64_t first = 0; first < direct; first += block_pieces) {
      const int64_t count = smaller(direct - first, block_pieces);
      for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) codes[r] = codes_at(step, r) + first * piece * kCodeBytes<Row>;
        multiply(codes, count, piece / step_columns, ahead, a.x + first * piece * M,
                 a.scratch + step * R * in_row + first, in_row, nans, totals + step * R * M * kLanes);
      }
    }
    for (int64_t i = direct; i < in_row; ++i) {
      const int64_t at = i * piece, columns = smaller(w.k - at, piece);
      for (int64_t step = 0; step < steps; ++step) {
        uint8_t last[R][(kPiece + kChunkColumns) * kCodeBytes<Row>] = {};
        const uint8_t* codes[R];
        for (int r = 0; r < R; ++r) {
          const uint8_t* from = codes_at(step, r) + at * kCodeBytes<Row>;
          std::memcpy(last[r], from, static_cast<size_t>(columns * kCodeBytes<Row>));
          codes[r] = last[r];
        }
        multiply_pieces<Row, M, R, 2>(codes, 1, ceil_div(columns, 2 * kLanes), 0, a.x + at * M,
                                      a.scratch + step * R * in_row + i, in_row, nans, totals + step * R * M * kLanes);
      }
    }
    float sums[kFusedBlock * M] = {};
    for (int64_t i = 0; i < steps * R * M; i += 4) {
      const float* four = totals + i * kLanes;
      add_reduced({load(four), load(four + kLanes), load(four + 2 * kLanes), load(four + 3 * kLanes)}, sums + i);
    }
    const bool lost = nans.any_found();
    for (int64_t step = 0; step < steps; ++step) {
      for (int r = 0; r < R; ++r) {
        const int64_t row = r * run + top + step;
        if (row >= rows) continue;
        const bool nan = lost && nan_in_row<Row>(codes_at(step, r), w.k);
        for (int j = 0; j < a.m; ++j) {
          const float sum = sums[(step * R + r) * M + j];
          a.y[j * a.y_stride + row] = nan ? std::bit_cast<float>(0x7fc00000u) : sum;
        }
      }
    }
  }
}

// Rows of the weight at a time: as many as have their sums in registers.
template <int M>
inline constexpr int kRowsAtOnce = M >= 4 ? (kLanes == 16 ? 16 : 8) / M : 4;

template <int Row>
void fused(const FusedArgs& a) {
  if (a.m == 1) return multiply_floats<Row, 1, kRowsAtOnce<1>>(a);
  if (a.m == 2) return multiply_floats<Row, 2, kRowsAtOnce<2>>(a);
  if (a.m <= 4) return multiply_floats<Row, 4, kRowsAtOnce<4>>(a);
  return multiply_floats<Row, 8, kRowsAtOnce<8>>(a);
}

// The lanes of x for each vector of a chunk, of all rows in turn; nobody asks for sums.
template <int Row>
void arrange(const float* x, int64_t k, int j, int rows, float* panel, float*) {
  int32_t numbers[kLanes];
  for (int l = 0; l < kLanes; ++l) numbers[l] = 2 * l;
  const I every_other = load_int(numbers);
  float* to = panel + j * kLanes;
  for (int64_t c = 0; c < ceil_div(k, kAlign) * kAlign; c += 2 * kLanes, to += 2 * rows * kLanes) {
    float padded[2 * kLanes] = {};
    const float* from = x + c;
    if (c + 2 * kLanes > k) {
      if (c < k) std::memcpy(padded, from, static_cast<size_t>(k - c) * sizeof(float));
      from = padded;
    }
    store(to, kEvenOdd<Row> ? gather(from, every_other) : load(from));
    store(to + rows * kLanes, kEvenOdd<Row> ? gather(from + 1, every_other) : load(from + kLanes));
  }
}

// NaN to the places of a tile's row that have its code.
template <int Row>
void place_nans(const uint8_t* codes, int64_t count, float* tile) {
  for (int64_t c = 0; c < count; ++c) {
    const int64_t vector = c / (2 * kLanes) * 2 + c % 2, lane = c % (2 * kLanes) / 2;
    if ((codes[c] & 0x7f) == kFp8Nan) {
      tile[vector * kTileRows * kLanes + lane] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// For tiles: weights as decoding gives them, in the same order. (16 bits are decoded and arranged apart.)
template <int Row>
void decode_tile(const Weight& w, int64_t first, int rows, int64_t begin, int64_t end, float* tile, float*) {
  const int64_t bytes = w.k * kCodeBytes<Row>;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    // The rows of the next tile are asked for while these are decoded.
    const int64_t ahead = row + kTileRows < w.n ? kTileRows * bytes : 0;
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * bytes;
    float* to = tile + r * kLanes;
    Nans<Row> nans;
    for (int64_t c = begin, stop = 0; c < end; c = stop) {
      const int64_t group = w.format.group > 0 ? w.format.group : w.k;
      stop = smaller((c / group + 1) * group, end);
      const F scale = splat(group_scale(w, row, w.format.group > 0 ? c / group : 0));
      const auto step = [&]<int Vectors>(const uint8_t* from) {
        Chunk<Row> chunk;
        chunk.read(from);
        nans.look(from);
        unroll<Vectors>([&]<int Vector>() {
          F lanes = chunk.template at<Vector>();
          if constexpr (Chunk<Row>::kUnit != 1.0f) lanes = mul(lanes, splat(Chunk<Row>::kUnit));
          store(to, mul(lanes, scale));
          to += kTileRows * kLanes;
        });
      };
      for (; c + kChunkColumns <= stop; c += kChunkColumns) {
        prefetch(codes + c + ahead);
        step.template operator()<4>(codes + c);
      }
      if (c < stop) {
        uint8_t last[kChunkColumns] = {};
        std::memcpy(last, codes + c, static_cast<size_t>(smaller(w.k - c, kChunkColumns)));
        if (stop - c <= 2 * kLanes) step.template operator()<2>(last);
        else step.template operator()<4>(last);
      }
    }
    const float* const full = tile + r * kLanes + ceil_div(end - begin, kAlign) * kAlign * kTileRows;
    for (; to < full; to += kTileRows * kLanes) store(to, splat(0.0f));
    if (nans.any_found()) place_nans<Row>(codes + begin, end - begin, tile + r * kLanes);
  }
}

template <int Row>
void fill(Kernels& kernels) {
  kernels.linear[Row] = {fused<Row>, arrange<Row>, kEvenOdd<Row> ? decode_tile<Row> : nullptr, kAlign, kAlign};
}

}  // namespace

void BITFOLD_ISA(fused)(Kernels& kernels) {
  fill<kFp16>(kernels);
  fill<kBf16>(kernels);
  fill<kE4m3>(kernels);
  fill<kE5m2>(kernels);
}

}  // namespace bitfold::cpu
