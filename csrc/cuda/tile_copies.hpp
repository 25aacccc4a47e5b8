// The tile kernel's way in (linear_tile.cu): packed bytes of W and arranged x to shared memory, stage by stage, several
// stages ahead, by asynchronous copies.
#pragma once

#include "cuda/tile.hpp"

namespace bitfold::cuda {

// Rows of a chunk in shared memory: whole pieces of 16 bytes, also of rows that begin within one, and an odd number of
// them, so that the words that a warp reads at once lie in banks of their own.
template <class C>
inline constexpr int kPieces = (C::kBytes + 16 - smaller(C::kAlign, 16) + 15) / 16;
template <class C>
inline constexpr bool kSkewed = C::kAlign < 16;
template <class C>
inline constexpr int kStride = 16 * (kPieces<C> | 1);
template <class C>
inline constexpr int kSumBytes = kWarp * C::kMins;

// Scales of a row of planes, for the kernel with wgmma: 16 bytes more, so that eight rows lie in banks of their own.
template <class C>
inline constexpr int kScaleBytes = C::kPlanes ? C::kColumns / 32 * static_cast<int>(sizeof(ScaleZero)) + 16 : 0;

template <class C>
BITFOLD_HOST_DEVICE constexpr ChunkSize chunk_size() {
  return {C::kColumns, kStride<C>, kSumBytes<C>, kScaleBytes<C>, C::kTables};
}

// Slots that are filled and emptied in turn.
struct Ring {
  int slot = 0;
  BITFOLD_DEVICE void next(int slots) { slot = slot + 1 == slots ? 0 : slot + 1; }
};

// What a block of threads has, and what waits in its shared memory.
template <int Row, int Tokens>
class TileCopies {
 protected:
  using C = Chunk<Row>;
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kUnits = C::kColumns / kUnit;
  static constexpr int kXUnits = tile_x_units(Tokens, kUnits);
  static constexpr int kXUnit = kGroups * kUnitBytes;
  // The sums of many tokens leave the copies few registers.
  static constexpr bool kKeepsPlaces = Tokens == kFewTokens;
  static constexpr int kTurns = (kTileRows * kPieces<C> + kTileThreads - 1) / kTileThreads;  // of copying a chunk of W
  static constexpr int kUnrolled = kKeepsPlaces ? kTurns : 1;

  BITFOLD_DEVICE explicit TileCopies(const TileParameter& p)
      : p_(p),
        at_(tile_places(chunk_size<C>(), Tokens, p.shape.x_stages, p.shape.w_stages)),
        memory_(shared<Bytes>().bytes),
        row0_(int64_t{blockIdx.x} * kTileRows),
        group0_(static_cast<int>(blockIdx.z) * kGroups),
        groups_(smaller(kGroups, p.groups - group0_)),
        first_(static_cast<int>(int64_t{p.chunks} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{p.chunks} * (blockIdx.y + 1) / p.shape.splits)),
        next_chunk_(first_),
        next_unit_(first_ * kUnits) {
    if constexpr (kKeepsPlaces) w_from_ = w_place();
  }

  BITFOLD_DEVICE uint8_t* w_stage(Ring ring) const { return memory_ + at_.w + ring.slot * (kTileRows * kStride<C>); }
  BITFOLD_DEVICE uint8_t* sums_stage(Ring ring) const {
    return memory_ + at_.sums + ring.slot * (kGroups * kSumBytes<C>);
  }
  BITFOLD_DEVICE uint8_t* x_stage(Ring ring) const { return memory_ + at_.x + ring.slot * (kXUnits * kXUnit); }

  BITFOLD_DEVICE int64_t real_row(int row) const { return smaller<int64_t>(row0_ + row, p_.n - 1); }
  // Where in its first piece a row's chunk begins.
  BITFOLD_DEVICE int skew(int64_t row, int chunk) const {
    if (!kSkewed<C> || !p_.in_words) return 0;
    return static_cast<int>(static_cast<uint32_t>(row) * static_cast<uint32_t>(p_.row_bytes) +
                            static_cast<uint32_t>(chunk) * C::kBytes) &
           15;
  }

  // The next chunk of W, and its sums of x.
  BITFOLD_DEVICE void copy_w() {
    if (next_chunk_ >= last_) return;
    if (p_.in_words && next_chunk_ + 1 < p_.chunks && row0_ + kTileRows <= p_.n) copy_whole();
    else copy_edge();
    if constexpr (C::kMins > 0) {
      const uint8_t* sums = p_.sums + (int64_t{next_chunk_} * p_.groups + group0_) * kSumBytes<C>;
      for (int i = static_cast<int>(threadIdx.x); i < groups_ * (kSumBytes<C> / 16); i += kTileThreads) {
        ptx::cp_async<16>(sums_stage(next_w_) + 16 * i, sums + 16 * i);
      }
    }
    next_w_.next(p_.shape.w_stages);
    ++next_chunk_;
    if constexpr (kKeepsPlaces) w_from_ += C::kBytes;
  }
  // All rows are there, and no piece reaches beyond one: pieces of all rows in turn, kTileThreads at a time.
  BITFOLD_DEVICE void copy_whole() const {
    constexpr int kRowStep = kTileThreads / kPieces<C>, kPieceStep = kTileThreads % kPieces<C>;
    const auto thread = static_cast<int>(threadIdx.x);
    int piece = thread % kPieces<C>;
    const uint8_t* from = kKeepsPlaces ? w_from_ : w_place();
    uint8_t* to = w_stage(next_w_) + thread / kPieces<C> * kStride<C> + 16 * piece;
#pragma unroll(kUnrolled)
    for (int i = 0; i < kTileRows * kPieces<C>; i += kTileThreads) {
      if (i + kTileThreads <= kTileRows * kPieces<C> || i + thread < kTileRows * kPieces<C>) {
        const int within = kSkewed<C> ? static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15) : 0;
        ptx::cp_async<16>(to, from - within + 16 * piece);
      }
      from += kRowStep * p_.row_bytes;
      to += kRowStep * kStride<C>;
      if constexpr (kPieceStep > 0) {
        piece += kPieceStep;
        to += 16 * kPieceStep;
        if (piece >= kPieces<C>) {
          piece -= kPieces<C>;
          from += p_.row_bytes;
          to += kStride<C> - 16 * kPieces<C>;
        }
      }
    }
  }
  // What lies beyond a row's end becomes zero, and rows that aren't there are the last.
  BITFOLD_DEVICE void copy_edge() const {
    const int64_t begin = int64_t{next_chunk_} * C::kBytes;
    const int length = static_cast<int>(smaller<int64_t>(C::kBytes, p_.row_bytes - begin));
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kPieces<C>; i += kTileThreads) {
      const int row = i / kPieces<C>, at = 16 * (i % kPieces<C>);
      const uint8_t* from = p_.codes + real_row(row) * p_.row_bytes + begin;
      uint8_t* to = w_stage(next_w_) + row * kStride<C> + at;
      if (p_.in_words) {
        const int within = skew(real_row(row), next_chunk_), bytes = smaller(within + length - at, 16);
        if (at >= within + C::kBytes) continue;
        if (bytes > 0) ptx::cp_async<16>(to, from - within + at, bytes);
        else ptx::cp_async<16>(to, p_.codes, 0);
      } else {
#pragma unroll 1
        for (int b = 0; b < 16; ++b) to[b] = at + b < length ? ptx::load1(from + at + b) : uint8_t{0};
      }
    }
  }

  // Bytes of a unit of x in shared memory, where those of all groups lie together.
  BITFOLD_DEVICE int x_unit() const { return groups_ * kUnitBytes; }
  // The next units of x, kTileThreads pieces at a time: one run of memory where the block has all tokens.
  BITFOLD_DEVICE void copy_x() {
    if (next_unit_ >= last_ * kUnits) return;
    const uint8_t* from = x_place();
    uint8_t* to = x_stage(next_x_) + 16 * static_cast<int>(threadIdx.x);
    if (groups_ == p_.groups) {
      copy_run<kXUnits * kXUnit>(to, from, kXUnits * x_unit());
    } else {
#pragma unroll 1
      for (int unit = 0; unit < kXUnits; ++unit) {
        copy_run<kXUnit>(to + unit * x_unit(), from + unit * p_.groups * kUnitBytes, x_unit());
      }
    }
    next_x_.next(p_.shape.x_stages);
    next_unit_ += kXUnits;
  }
  // This thread's pieces of so many bytes, at most Most.
  template <int Most>
  BITFOLD_DEVICE static void copy_run(uint8_t* to, const uint8_t* from, int bytes) {
    constexpr int kTurn = 16 * kTileThreads;
    static_assert(Most % kTurn == 0);
    const int there = bytes - 16 * static_cast<int>(threadIdx.x);
#pragma unroll
    for (int at = 0; at < Most; at += kTurn) {
      if (at >= there) break;
      ptx::cp_async<16>(to + at, from + at);
    }
  }

  // Stages 0 ... x_stages - 2 of x are a group of copies each, and those of W are distributed over them.
  BITFOLD_DEVICE void start_copies() {
    int chunks = p_.shape.w_stages - 1;
    for (int groups = p_.shape.x_stages - 1; groups > 0; --groups) {
      for (int now = groups == 1 ? chunks : smaller(chunks, 1); now > 0; --now, --chunks) copy_w();
      copy_x();
      ptx::cp_async_commit();
    }
  }
  // What comes while this stage is multiplied; the newest group.
  BITFOLD_DEVICE void issue(bool chunk) {
    if (chunk) copy_w();
    copy_x();
    ptx::cp_async_commit();
  }
  // Until all but the newest x_stages - 2 groups have arrived.
  template <int Newest = 2>
  BITFOLD_DEVICE void wait() const {
    if constexpr (Newest > 0) {
      if (p_.shape.x_stages < Newest + 2) return wait<Newest - 1>();
    }
    ptx::cp_async_wait<Newest>();
  }

  const TileParameter& p_;
  const TilePlaces at_;
  uint8_t* const memory_;
  const int64_t row0_;
  const int group0_, groups_;  // of 8 tokens
  const int first_, last_;     // chunks
  Ring w_, x_;                 // what is multiplied

 private:
  Ring next_w_, next_x_;  // what is copied
  int next_chunk_, next_unit_;

  // This thread's first piece of the next chunk of W, and of the next units of x.
  BITFOLD_DEVICE const uint8_t* w_place() const {
    const int row = static_cast<int>(threadIdx.x) / kPieces<C>;
    return p_.codes + (row0_ + row) * p_.row_bytes + int64_t{next_chunk_} * C::kBytes;
  }
  BITFOLD_DEVICE const uint8_t* x_place() const {
    const auto group =
        static_cast<uint32_t>(next_unit_) * static_cast<uint32_t>(p_.groups) + static_cast<uint32_t>(group0_);
    return p_.x + (uint64_t{group} * kUnitBytes + 16 * threadIdx.x);
  }
  const uint8_t* w_from_;
};

}  // namespace bitfold::cuda
