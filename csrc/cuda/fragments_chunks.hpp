// GGUF's blocks as sources of fragments (fragments.hpp). Blocks begin at any even byte (MXFP4's at any), so a chunk of
// each row comes to its room in whole pieces of 16 bytes, whatever lies before it in the first (chunk.hpp,
// chunk_blocks_*.hpp).
#pragma once

#include "cuda/chunk.hpp"
#include "cuda/chunk_blocks_large.hpp"

namespace bitfold::cuda {

struct BlockMatrix {
  const uint8_t* blocks;
  int64_t n;
  int64_t row_bytes;
};

// Where 16 rows' pieces of Bytes bytes lie in a room, Stride bytes apart: rows begin anywhere in 16 bytes of memory, at
// multiples of Align.
template <int Bytes, int Align, int Stride>
class SkewedRows {
 public:
  static constexpr int kBytes = Bytes, kStride = Stride;
  // What a piece can touch of memory.
  static constexpr int kQuads = (Bytes + 16 - smaller(Align, 16) + 15) / 16;
  static_assert(16 * kQuads <= Stride && Stride % 16 == 0);

  SkewedRows() = default;
  // Rows that are 16 apart begin at the same places of a piece of 16 bytes.
  BITFOLD_DEVICE explicit SkewedRows(const BlockMatrix& w) {
    for (int i = 0; i < 2; ++i) {
      skew_[i] = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(w.blocks)) +
                 static_cast<uint32_t>(ptx::lane_id() / 4 + 8 * i) * static_cast<uint32_t>(w.row_bytes);
    }
  }
  // The piece of row g + 8 i, of lane 4 g + t.
  BITFOLD_DEVICE const uint8_t* at(const std::byte* room, int piece, int i) const {
    const uint32_t skew = Align < 16 ? (skew_[i] + static_cast<uint32_t>(piece) * Bytes) % 16 : 0;
    return reinterpret_cast<const uint8_t*>(room + row_ + 8 * i * Stride + skew);
  }
  // Where what is copied of row g begins.
  BITFOLD_DEVICE int row() const { return row_; }

 private:
  int row_ = ptx::lane_id() / 4 * Stride;
  uint32_t skew_[2];  // the address of each row, but for multiples of 16
};

// The way there: the lanes of a row copy 16 bytes each in turn.
template <class Rows>
class SkewedCopies {
 public:
  SkewedCopies() = default;
  BITFOLD_DEVICE SkewedCopies(const BlockMatrix& w, int64_t row, int piece) {
    const int64_t at = int64_t{piece} * Rows::kBytes;
    for (int i = 0; i < 2; ++i) {
      next_[i] =
          w.blocks + smaller<int64_t>(row + ptx::lane_id() / 4 + 8 * i, w.n - 1) * w.row_bytes + at + 16 * first_;
    }
    left_ = static_cast<int>(smaller<int64_t>(w.row_bytes - at, 1 << 30));
  }

  BITFOLD_DEVICE void begin(const BlockMatrix&, int, std::byte*) const {}
  template <Manner>
  BITFOLD_DEVICE void fetch(const BlockMatrix& w, std::byte* room) {
    if (left_ >= 16 * Rows::kQuads) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint8_t* from = align(next_[i]);
        std::byte* to = room + to_ + 8 * i * Rows::kStride;
#pragma unroll
        for (int quad = 0; quad < Rows::kQuads; quad += 4) {
          if (quad + 4 <= Rows::kQuads || first_ < Rows::kQuads % 4)
            ptx::cp_async<16>(to + 16 * quad, from + 16 * quad);
        }
      }
    } else {
      fetch_end(w, room);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) next_[i] += Rows::kBytes;
    left_ -= Rows::kBytes;
  }

 private:
  // A piece at the row's end: what is behind that is zero.
  BITFOLD_DEVICE void fetch_end(const BlockMatrix& w, std::byte* room) const {
    for (int i = 0; i < 2; ++i) {
      const uint8_t* next = i == 0 ? next_[0] : next_[1];
      const uint8_t* from = align(next);
#pragma unroll 1
      for (int quad = 0; quad + first_ < Rows::kQuads; quad += 4) {
        const int left = left_ + static_cast<int>(next - from) - 16 * (quad + first_);
        const int bytes = smaller(larger(left, 0), 16);
        std::byte* to = room + to_ + 8 * i * Rows::kStride + 16 * quad;
        ptx::cp_async<16>(to, bytes > 0 ? from + 16 * quad : w.blocks, bytes);
      }
    }
  }
  // Planes begin at multiples of 16 bytes, so this is never before them.
  BITFOLD_DEVICE static const uint8_t* align(const uint8_t* p) {
    return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(p) & ~uintptr_t{15});
  }

  int first_ = ptx::lane_id() % 4;
  int to_ = ptx::lane_id() / 4 * Rows::kStride + 16 * first_;
  const uint8_t* next_[2];  // the lane's first 16 bytes of either row's piece, but for where that begins in them
  int left_;                // bytes of a row from there on
};

template <int Row>
class ChunkFragments {
  using C = Chunk<Row>;
  static constexpr int kSpans = kUnitSteps / C::kSpan;  // of a unit
  // An odd number of pieces of 16 bytes, so that what the lanes of 8 rows read at once lies in different banks.
  static constexpr int kQuads = (C::kBytes + 16 - smaller(C::kAlign, 16) + 15) / 16;
  static constexpr int kStride = 16 * (kQuads | 1);

 public:
  static constexpr int kColumns = C::kColumns;
  static constexpr int kSteps = kColumns / 16;
  static constexpr int kSections = kSteps / C::kSpan;
  static constexpr int kMins = C::kMins;
  static constexpr int kHead = 0;
  static constexpr int kTogether = 1;
  static constexpr int kSums = 0;
  static constexpr int kRoom = 16 * kStride;
  static constexpr float kUnit = 1.0f / kDown;

  static constexpr int column(int step, int t, int half) {
    return C::column(step / kUnitSteps, step % kUnitSteps, t, half);
  }

  BITFOLD_HOST_DEVICE static constexpr int down(int, int) { return 0; }

  using Matrix = BlockMatrix;
  static Matrix matrix(const Weight& w) {
    constexpr FormatRow kFormat = kFormats[Row];
    return {static_cast<const uint8_t*>(w.codes), w.n, w.k / kFormat.group * kFormat.block_bytes};
  }

  static_assert(C::kTables == 0);
  using Tables = NoTables;
  BITFOLD_DEVICE static void fill(const Matrix&, Tables&, int, int) {}

  struct Slot {
    Lane lane[2];
    typename C::Head head[2];
    Operands<C::kSpan> unit[2];
  };

  BITFOLD_DEVICE static constexpr Manner manner(const Matrix&) { return Manner::Any; }

  using Rows = SkewedRows<C::kBytes, C::kAlign, kStride>;
  using Copies = SkewedCopies<Rows>;

  ChunkFragments() = default;
  BITFOLD_DEVICE ChunkFragments(const Matrix& w, int64_t, const Tables&, const std::byte*) : rows_(w) {}

  template <Manner>
  BITFOLD_DEVICE void open(Slot& slot, int piece, const std::byte* room) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* bytes = rows_.at(room, piece, i);
      slot.lane[i] = {bytes, nullptr, nullptr, ptx::lane_id() % 4};
      slot.head[i] = C::head(bytes);
    }
  }

  template <Manner>
  BITFOLD_DEVICE void step(Slot& slot, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (step % kUnitSteps == 0) C::unit(slot.lane[i], slot.head[i], step / kUnitSteps, slot.unit[i]);
      a[kLow0 + i] = slot.unit[i].halves[step % kUnitSteps][0];
      a[kLow1 + i] = slot.unit[i].halves[step % kUnitSteps][1];
    }
  }

  template <Manner>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    return {{slot.unit[0].scales[section % kSpans], slot.unit[1].scales[section % kSpans]}};
  }

  BITFOLD_DEVICE Scales mins(const Slot& slot, uint32_t (&a)[4]) const {
    Scales scales{};
    if constexpr (kMins > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t two[2];
        scales.of[i] = C::mins(slot.lane[i], slot.head[i], two);
        a[kLow0 + i] = two[0];
        a[kLow1 + i] = two[1];
      }
    }
    return scales;
  }

 private:
  Rows rows_;
};

}  // namespace bitfold::cuda
