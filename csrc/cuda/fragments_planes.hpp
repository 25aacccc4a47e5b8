// The formats with planes as sources of fragments (fragments.hpp), where k and the groups are whole pieces, so that
// rows are aligned as planes are: the fast way.
//
// A piece of 16 rows waits in its room row after row, so that the lanes' loads of their columns, consecutive ones of
// their two rows, meet all banks. All columns of a section share a scale, which therefore comes to fp32 sums.
//
// Whole numbers are masked where they lie and taken as the bits of subnormal halves: 2^-24 of the code, and 2^p times
// that at bit p. x has 2^-p in the columns that lie there, and the zero point is taken from the sum: sum(q x) less
// zero * sum(x). So a code costs little more than its mask, and all of it is exact but the fp32 sums, which stay as
// small as their numbers are; the more of them are cut off, the smaller codes are, as if they were normal numbers
// (emulator/tensor_core.hpp). A token with an infinity would get NaN from it; then Manner::Any subtracts zero points
// from codes: a field at bit p, or'ed with the half 1024, is 1024 + 2^p code, of which 1024 + 2^p zero can be taken
// exactly.
//
// How scales are stored and whether there are zero points is asked at every piece, but where a Manner knows it.
#pragma once

#include "cuda/plane_codes.hpp"
#include "cuda/plane_matrix.hpp"

namespace bitfold::cuda {

// Sections: groups of a piece; 1 where a group has all of it or more.
template <int Row, int Columns, int Sections>
class PlaneFragments {
  using Codes = PlaneCodes<Row>;
  static constexpr int kBits = kFormats[Row].bits;
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr bool kNested = kFormats[Row].nested;
  static constexpr float kMiddle = static_cast<float>(1 << (kBits - 1));

  // A row's piece in the room, and what a lane has of a section.
  static constexpr int kRowBytes = Columns * kBits / 8;
  static constexpr int kSectionBytes = kRowBytes / Sections;
  static constexpr int kLaneColumns = Columns / Sections / 4;
  // int3: a lane's 6 bytes lie in 8 that it shares with its neighbour.
  static constexpr int kWords = Row == kInt3 ? 2 : kLaneColumns * kBits / 32;
  static_assert(Row == kInt3 ? kLaneColumns == 16 && Sections == 1
                             : kWords == 1 || kWords == 2 || kWords == 4 || kWords == 8);
  // Copies of a row's codes; lanes take those of all rows in turn.
  static constexpr int kChunk = kRowBytes % 16 == 0 ? 16 : 8;
  static constexpr int kChunksOfRow = kRowBytes / kChunk;
  static constexpr int kChunks = 16 * kChunksOfRow;
  static constexpr int kTurns = (kChunks + kWarp - 1) / kWarp;

  // Behind the codes: of each row its sections' scales, or the word that has them among others; the word that
  // multiplies nested ones; two words with zero points.
  static constexpr int kScaleStride = 4 * Sections;
  static constexpr int kScales = 16 * kRowBytes;
  static constexpr int kNestedScales = kScales + 16 * kScaleStride;
  static constexpr int kZeros = kNestedScales + (kNested ? 16 * 4 : 0);

 public:
  static constexpr int kColumns = Columns;
  static constexpr int kSteps = Columns / 16;
  static constexpr int kSections = Sections;
  static constexpr int kMins = 0;
  static constexpr int kTogether = 4;
  // The scales of up to kHeadPieces pieces, where a piece has two in a word: lanes which copy together copy what lies
  // together. A row has a word more, so that the eight rows of a load lie in different banks.
  static constexpr int kHeadPieces = 8, kHeadStride = 4 * (kHeadPieces + 1);
  static constexpr int kHead = Row == kInt4 && Columns == 256 && Sections == 2 ? 16 * kHeadStride : 0;
  static constexpr int kSums = kInteger ? Sections : 0;
  static constexpr int kRoom = kZeros + (kInteger ? 16 * 8 : 0);
  static constexpr float kUnit = kInteger ? 0x1p24f : 1.0f;
  static constexpr int kSectionSteps = kSteps / Sections;
  static_assert(kSectionSteps % 2 == 0 && kRoom % 16 == 0);

  static constexpr int column(int step, int t, int half) {
    return step / kSectionSteps * (Columns / Sections) + t * kLaneColumns + Codes::column(step % kSectionSteps, half);
  }
  BITFOLD_HOST_DEVICE static constexpr int down(int step, int r) {
    if constexpr (kInteger) return Codes::place(step % kSectionSteps, r);
    else return 0;
  }

  static bool fits(const Weight& w) {
    const int64_t group = w.format.group;
    const bool whole = Sections > 1 ? group == Columns / Sections : group < 1 || group % Columns == 0;
    // Rows of a turn are told apart by 32 bits.
    // Where rows share scales, those must be whole words: which half of one is a row's is told by the row alone.
    const bool alone = w.format.row_shift == 0 || w.format.scale == Scale::F32;
    return w.layout == Layout::Rows && w.k % Columns == 0 && whole && alone && w.k < int64_t{1} << 26 &&
           groups_in_row(w.format, w.k) * w.n < int64_t{1} << 30;
  }

  using Matrix = PlaneMatrix;
  static Matrix matrix(const Weight& w) { return plane_matrix(w, Columns); }

  using Tables = typename Codes::Tables;
  BITFOLD_DEVICE static void fill(const Matrix& w, Tables& tables, int thread, int threads) {
    if constexpr (kFormats[Row].grid == Grid::Codebook) {
      tables.fill(w.row, thread, threads);
      tables.nested.fill(w.nested_offset, thread, threads);
    }
  }

  BITFOLD_DEVICE static Manner manner(const Matrix& w) {
    const Scale stored = stored_as<Manner::Any>(w);
    if (!w.whole_words) return Manner::Any;
    if (w.zeros == nullptr && stored == stored_as<Manner::Plain>(w)) return Manner::Plain;
    if constexpr (kInteger || kNested) {
      if ((kNested || w.zeros != nullptr) && stored == stored_as<Manner::Full>(w)) return Manner::Full;
    }
    return Manner::Any;
  }

  // A lane copies chunks of codes, and a row's scales and zero points.
  class Copies {
   public:
    Copies() = default;
    BITFOLD_DEVICE Copies(const Matrix& w, int64_t row, int piece)
        : codes_(w.codes + row * w.row_bytes + int64_t{piece} * kRowBytes),
          piece_(piece),
          place_(ptx::anew(place(ptx::lane_id()))),
          row_(static_cast<uint32_t>(row)),
          last_(static_cast<uint32_t>(smaller<int64_t>(w.n - 1 - row, 15))) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const auto chunk = static_cast<uint32_t>(turn * kWarp + ptx::lane_id());
        offsets_[turn] =
            smaller(chunk / kChunksOfRow, last_) * static_cast<uint32_t>(w.row_bytes) + chunk % kChunksOfRow * kChunk;
      }
      const uint32_t mine = row_ + smaller(static_cast<uint32_t>(ptx::lane_id()) % 16, last_);
      scale_ = static_cast<uint32_t>(scale_row_of<Row>(w, mine)) * static_cast<uint32_t>(w.row_scales);
      zeros_ = mine * static_cast<uint32_t>(w.row_zeros);
    }

    // The scales of all of them.
    BITFOLD_DEVICE void begin(const Matrix& w, int pieces, std::byte* head) const {
      if constexpr (kHead > 0) {
        if (w.scale == Scale::F32) return;
        const int word = ptx::lane_id() % kHeadPieces, below = ptx::lane_id() / kHeadPieces;
        if (word >= pieces) return;
        const auto row_scales = static_cast<uint32_t>(w.row_scales);
        const uint8_t* from = w.scales + 2 * (row_ * row_scales + static_cast<uint32_t>(piece_ + word) * Sections);
        std::byte* to = head + below * kHeadStride + word * 4;
#pragma unroll
        for (int i = 0; i < 16; i += kWarp / kHeadPieces) {
          const uint32_t row = smaller(static_cast<uint32_t>(below + i), last_);
          ptx::cp_async<4>(to + i * kHeadStride, from + 2 * row_scales * row);
        }
      }
    }
    template <Manner M>
    BITFOLD_DEVICE void fetch(const Matrix& w, std::byte* room) {
      const int lane = ptx::lane_id();
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        std::byte* to = room + place_ + turn * (kWarp * kChunk);
        if (kChunks % kWarp == 0 || turn * kWarp + lane < kChunks) ptx::cp_async<kChunk>(to, codes_ + offsets_[turn]);
      }
      codes_ += kRowBytes;
      const int piece = piece_++;
      if (lane >= 16) return;
      const uint32_t group = group_of(w, piece), scale = scale_ + group;
      std::byte* to = room + kScales + lane * kScaleStride;
      switch (stored_as<M>(w)) {
        case Scale::F32: ptx::cp_async<4 * Sections>(to, w.scales + 4 * scale); break;
        case Scale::Nested:
          copy_word<M>(to, w.scales, scale & ~3u, w.scale_bytes_all);
          ptx::cp_async<4>(room + kNestedScales + lane * 4, w.nested_scales + scale / kNestedGroup);
          break;
        default:
          if constexpr (kHead > 0) break;
          else if constexpr (Sections > 1) ptx::cp_async<2 * Sections>(to, w.scales + 2 * scale);
          else copy_word<M>(to, w.scales, 2 * scale & ~3u, w.scale_bytes_all);
      }
      if (has_zeros<M>(w)) {
        const uint32_t byte = (zeros_ + group * kBits / 8) & ~3u;
        std::byte* words = room + kZeros + lane * 8;
        copy_word<M>(words, w.zeros, byte, w.zero_bytes_all);
        // The next one is only looked at where there is one.
        const auto last = static_cast<uint32_t>(larger<int64_t>(w.zero_bytes_all - 4, 0));
        copy_word<M>(words + 4, w.zeros, M == Manner::Any ? byte + 4 : smaller(byte + 4, last), w.zero_bytes_all);
      }
    }

   private:
    // The four bytes of a plane from `byte` on; beyond its end zeros, where it isn't whole words.
    template <Manner M>
    BITFOLD_DEVICE static void copy_word(std::byte* to, const uint8_t* plane, uint32_t byte, int64_t end) {
      if constexpr (M != Manner::Any) {
        ptx::cp_async<4>(to, plane + byte);
      } else {
        const auto bytes = static_cast<int>(smaller<int64_t>(end - byte, 4));
        ptx::cp_async<4>(to, bytes > 0 ? plane + byte : plane, larger(bytes, 0));
      }
    }

    const uint8_t* codes_;  // of the first row's next piece
    int piece_;
    int place_;            // in a room, of the first chunk: kept, or it would be made of the lane for each piece
    uint32_t row_, last_;  // the first row, and the last that there is, from that one on
    uint32_t offsets_[kTurns];
    uint32_t scale_, zeros_;  // the row's first scale, and the byte of its first zero point
  };

  struct Slot {
    uint32_t words[2][kWords];  // of the section
    uint32_t zeros[2];          // of the sections, one after the other
    const std::byte* room;
    const std::byte* scales;
    uint32_t group;
  };

  PlaneFragments() = default;
  // Rows that are 8 apart have their scales and zero points at the same places of a word.
  BITFOLD_DEVICE PlaneFragments(const Matrix& w, int64_t, const Tables& tables, const std::byte* head)
      : w_(&w),
        head_(head),
        tables_(&tables),
        scale_(static_cast<uint32_t>(ptx::lane_id() / 4) * static_cast<uint32_t>(w.row_scales)),
        zero_(static_cast<uint32_t>(ptx::lane_id() / 4) * static_cast<uint32_t>(w.row_zeros)),
        nested_offset_(kNested && w.scale == Scale::Nested ? ptx::load_fresh4(w.nested_offset) : 0) {}

  template <Manner M>
  BITFOLD_DEVICE void open(Slot& slot, int piece, const std::byte* room) {
    slot.room = room;
    slot.scales = head_;
    head_ += 4;
    slot.group = group_of(*w_, piece);
    if (!has_zeros<M>(*w_)) return;
    const uint32_t bit = slot.group * kBits;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 words = *reinterpret_cast<const uint2*>(room + kZeros + (ptx::lane_id() / 4 + 8 * i) * 8);
      slot.zeros[i] = ptx::funnel_right(words.x, words.y, (zero_ + bit / 8) % 4 * 8 + bit % 8);
    }
  }

  // What the sum of a section begins with, of rows g and g + 8: sum(x) is to be multiplied with.
  template <Manner M>
  BITFOLD_DEVICE Scales before(const Slot& slot, int section) const {
    if (M == Manner::Any) return {{0.0f, 0.0f}};
    if (!has_zeros<M>(*w_)) return {{-kMiddle, -kMiddle}};
    Scales zeros;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 2^23 + zero is exact
      zeros.of[i] = 0x1p23f - ptx::uint_as_float(0x4b000000u | zero(slot, i, section));
    }
    return zeros;
  }

  template <Manner M>
  BITFOLD_DEVICE void step(Slot& slot, int step, uint32_t (&a)[4]) const {
    const int section = step / kSectionSteps, within = step % kSectionSteps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (within == 0) load_words(slot.room, ptx::lane_id() / 4 + 8 * i, section, ptx::lane_id() % 4, slot.words[i]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t& operand = a[kLow0 + i + 2 * r];
        if constexpr (!kInteger) {
          operand = Codes::value(slot.words[i], within, r, 0, *tables_);
        } else {
          operand = Codes::raw(slot.words[i], within, r);
          if constexpr (M == Manner::Any) {
            const uint32_t subtracted = has_zeros<M>(*w_) ? zero(slot, i, section) : static_cast<uint32_t>(kMiddle);
            operand = ptx::hsub2(operand | magic(0), magic(0) + (0x00010001u * subtracted << Codes::place(within, r)));
          }
        }
      }
    }
  }

  template <Manner M>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    Scales scales;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = ptx::lane_id() / 4 + 8 * i;
      const std::byte* from = slot.room + kScales + row * kScaleStride;
      switch (stored_as<M>(*w_)) {
        case Scale::F32: scales.of[i] = reinterpret_cast<const float*>(from)[section]; break;
        case Scale::Nested: {
          if constexpr (kNested) {
            const auto code = static_cast<uint8_t>(from[(scale_ + slot.group) % 4 + section]);
            const float factor = *reinterpret_cast<const float*>(slot.room + kNestedScales + row * 4);
            scales.of[i] = ptx::add(ptx::mul(tables_->nested.map[code], factor), ptx::uint_as_float(nested_offset_));
          }
          break;
        }
        default: {
          const uint32_t of_word = (scale_ ^ slot.group) & 1;
          const std::byte* halves = kHead > 0 ? slot.scales + row * kHeadStride : from;
          const uint16_t half = reinterpret_cast<const uint16_t*>(halves)[Sections > 1 ? section : of_word];
          scales.of[i] = w_->scale == Scale::BF16 ? ptx::bf16_to_float(half) : ptx::half_to_float(half);
        }
      }
      if constexpr (kInteger && M == Manner::Any) scales.of[i] *= 1.0f / kUnit;
    }
    return scales;
  }

 private:
  template <Manner M>
  BITFOLD_DEVICE static Scale stored_as(const Matrix& w) {
    if (M == Manner::Full && kNested) return Scale::Nested;
    if (M != Manner::Any) return kFormats[Row].scale;
    return w.scale == Scale::F32 || (kNested && w.scale == Scale::Nested) ? w.scale : Scale::F16;
  }

  template <Manner M>
  BITFOLD_DEVICE static bool has_zeros(const Matrix& w) {
    return kInteger && (M == Manner::Full || (M == Manner::Any && w.zeros != nullptr));
  }

  // The piece's first.
  BITFOLD_DEVICE static uint32_t group_of(const Matrix& w, int piece) {
    const auto number = static_cast<uint32_t>(piece);
    return Sections > 1 ? number * Sections : w.pieces.divide(number);
  }

  BITFOLD_DEVICE static uint32_t zero(const Slot& slot, int i, int section) {
    return slot.zeros[i] >> section * kBits & ((1u << kBits) - 1u);
  }

  // Where a row's 64 or 128 bytes are read a section at a time, neighbouring rows have their chunks in other places.
  static constexpr bool kMoved = (Sections > 1 && (kRowBytes == 64 || kRowBytes == 128)) || kWords == 8;
  BITFOLD_DEVICE static constexpr int moved(int row) {
    if (!kMoved) return 0;
    if (kWords == 8) return row & 1;
    if (kRowBytes == 64) return (row >> 1 & 1) * 2 + (row >> 2 & 1);
    return kSectionBytes == 64 ? (row & 1) * 4 : (row & 3) * 2;
  }
  // Of the chunks of a lane's first turn; the rows of the others have their chunks moved alike.
  static_assert(!kMoved || kWarp / kChunksOfRow % (kRowBytes == 64 ? 8 : 4) == 0);
  BITFOLD_DEVICE static int place(int chunk) {
    if (!kMoved) return chunk * kChunk;
    const int row = chunk / kChunksOfRow;
    return row * kRowBytes + ((chunk % kChunksOfRow) ^ moved(row)) * kChunk;
  }

  // Of the lanes with lane % 4 == t.
  BITFOLD_DEVICE static void load_words(const std::byte* room, int row, int section, int t, uint32_t (&words)[kWords]) {
    const int lane = Row == kInt3 ? 6 * t / 4 * 4 : t * (kSectionBytes / 4);
    const std::byte* from = room + row * kRowBytes + ((section * kSectionBytes) ^ (lane ^ moved(row) * kChunk));
    if constexpr (Row == kInt3) {  // lanes 1 and 3 begin in the middle of a word
      const auto* two = reinterpret_cast<const uint32_t*>(from);
      const uint32_t shift = 16 * (t % 2);
      words[0] = ptx::funnel_right(two[0], two[1], shift);
      words[1] = two[1] >> shift;
    } else if constexpr (kWords == 8) {
      const uint4 first = *reinterpret_cast<const uint4*>(from);
      const uint4 second =
          *reinterpret_cast<const uint4*>(room + row * kRowBytes + ((lane + kChunk) ^ moved(row) * kChunk));
      words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
      words[4] = second.x, words[5] = second.y, words[6] = second.z, words[7] = second.w;
    } else if constexpr (kWords == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }

  const Matrix* w_;
  const std::byte* head_;  // the next piece's
  const Tables* tables_;
  uint32_t scale_, zero_;   // the row's first scale, and the byte of its first zero point, but for multiples of four
  uint32_t nested_offset_;  // the bits of a float
};

}  // namespace bitfold::cuda
