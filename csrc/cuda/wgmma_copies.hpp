// The way in of the kernel for many tokens (wgmma.hpp): one warpgroup copies packed rows of W, their scales, and x, as
// far ahead as there are stages, and barriers tell those who multiply.
#pragma once

#include "cuda/wgmma.hpp"

namespace bitfold::cuda {

// A stage that is filled and emptied in turn, and which half of its barriers' phases that is.
struct Turn {
  int slot = 0;
  unsigned parity = 0;
  BITFOLD_DEVICE void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// What a block of threads has, and where it lies.
template <int Row>
class WgmmaBlock {
 protected:
  using C = Chunk<Row>;
  static constexpr int kUnits = C::kColumns / kUnit;
  static constexpr int kSpans = C::kColumns / 32;  // scales of a row of planes

  BITFOLD_DEVICE explicit WgmmaBlock(const TileParameter& p)
      : p_(p),
        memory_(shared<Bytes>().bytes),
        at_(wgmma_places(chunk_size<C>(), p.shape.tokens, p.shape.x_stages, p.shape.w_stages)),
        row0_(int64_t{blockIdx.x} * kTileRows),
        quarter0_(static_cast<int>(blockIdx.z) * (p.shape.tokens / kQuarter)),
        quarters_(smaller(p.shape.tokens / kQuarter, p.groups / 8 - quarter0_)),
        first_(static_cast<int>(int64_t{p.chunks} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{p.chunks} * (blockIdx.y + 1) / p.shape.splits)) {}

  BITFOLD_DEVICE WgmmaBarriers& barriers() const { return *reinterpret_cast<WgmmaBarriers*>(memory_); }
  BITFOLD_DEVICE uint8_t* w_stage(int slot) const { return memory_ + at_.w + slot * (kTileRows * kStride<C>); }
  BITFOLD_DEVICE uint8_t* x_stage(int slot) const {
    return memory_ + at_.x + slot * (p_.shape.tokens / kQuarter * kQuarterBytes);
  }
  BITFOLD_DEVICE uint8_t* sums_stage(int slot) const {
    return memory_ + at_.sums + slot * (p_.shape.tokens / 8 * kSumBytes<C>);
  }
  BITFOLD_DEVICE ScaleZero* scales_stage(int slot) const {
    return reinterpret_cast<ScaleZero*>(memory_ + at_.scales) + slot * (kTileRows * kSpans);
  }
  // Where in its first piece a row's chunk begins.
  BITFOLD_DEVICE int skew(int64_t row, int chunk) const {
    if (!kSkewed<C> || !p_.in_words) return 0;
    return static_cast<int>(static_cast<uint32_t>(row) * static_cast<uint32_t>(p_.row_bytes) +
                            static_cast<uint32_t>(chunk) * C::kBytes) &
           15;
  }

  const TileParameter& p_;
  uint8_t* const memory_;
  const WgmmaPlaces at_;
  const int64_t row0_;
  const int quarter0_, quarters_;  // of this block
  const int first_, last_;         // chunks
};

// The warpgroup that copies: thread `thread` of it has a row's scales, and pieces of all rows in turn.
template <int Row>
class WgmmaCopies : WgmmaBlock<Row> {
  using Block = WgmmaBlock<Row>;
  using C = Chunk<Row>;
  using Block::at_;
  using Block::first_;
  using Block::kSpans;
  using Block::kUnits;
  using Block::last_;
  using Block::p_;
  using Block::quarter0_;
  using Block::quarters_;
  using Block::row0_;

 public:
  // Arrivals that fill a stage: of each thread one for its copies and one for what it stored, and one of the thread
  // that copies sums of x.
  static constexpr int kWArrivals = 2 * kWarpgroup + (C::kMins > 0 ? 1 : 0);

  BITFOLD_DEVICE WgmmaCopies(const TileParameter& p, int thread) : Block(p), thread_(thread) {}

  BITFOLD_DEVICE void run() {
    WgmmaBarriers& barriers = this->barriers();
    Turn w, x;
#pragma unroll 1
    for (int chunk = first_; chunk < last_; ++chunk) {
      LoadedScaleZero loaded[kTogether];
      if constexpr (C::kPlanes) load_scales(chunk, 0, loaded);
      ptx::barrier_wait(&barriers.w_empty[w.slot], w.parity ^ 1);
      if (p_.in_words && chunk + 1 < p_.chunks && row0_ + kTileRows <= p_.n) copy_whole(chunk, w.slot);
      else copy_edge(chunk, w.slot);
      if constexpr (C::kPlanes) {
        store_scales(loaded, w.slot, 0);
        if constexpr (kSpans > kTogether) {
          load_scales(chunk, kTogether, loaded);
          store_scales(loaded, w.slot, kTogether);
        }
      }
      ptx::cp_async_arrive(&barriers.w_full[w.slot]);
      ptx::barrier_arrive(&barriers.w_full[w.slot]);
      if (thread_ == 0) {
        if constexpr (C::kMins > 0) copy_sums(chunk, w.slot);
#pragma unroll 1
        for (int unit = 0; unit < kUnits; ++unit) {
          ptx::barrier_wait(&barriers.x_empty[x.slot], x.parity ^ 1);
          copy_x(int64_t{chunk} * kUnits + unit, x.slot);
          x.next(p_.shape.x_stages);
        }
      }
      w.next(p_.shape.w_stages);
    }
  }

 private:
  BITFOLD_DEVICE int64_t real_row(int row) const { return smaller<int64_t>(row0_ + row, p_.n - 1); }

  // ---- W ----

  // All rows are there, and no piece reaches beyond one: pieces of all rows in turn, kWarpgroup at a time.
  BITFOLD_DEVICE void copy_whole(int chunk, int slot) const {
    constexpr int kRowStep = kWarpgroup / kPieces<C>, kPieceStep = kWarpgroup % kPieces<C>;
    int piece = thread_ % kPieces<C>;
    const int row = thread_ / kPieces<C>;
    const uint8_t* from = p_.codes + (row0_ + row) * p_.row_bytes + int64_t{chunk} * C::kBytes;
    uint8_t* to = this->w_stage(slot) + row * kStride<C> + 16 * piece;
#pragma unroll 1
    for (int i = 0; i < kTileRows * kPieces<C>; i += kWarpgroup) {
      const int within = kSkewed<C> ? static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15) : 0;
      ptx::cp_async<16>(to, from - within + 16 * piece);
      piece += kPieceStep;
      from += kRowStep * p_.row_bytes;
      to += kRowStep * kStride<C> + 16 * kPieceStep;
      if (piece >= kPieces<C>) {
        piece -= kPieces<C>;
        from += p_.row_bytes;
        to += kStride<C> - 16 * kPieces<C>;
      }
    }
  }
  // What lies beyond a row's end becomes zero, and rows that aren't there are the last.
  BITFOLD_DEVICE void copy_edge(int chunk, int slot) const {
    const int64_t begin = int64_t{chunk} * C::kBytes;
    const int length = static_cast<int>(smaller<int64_t>(C::kBytes, p_.row_bytes - begin));
#pragma unroll 1
    for (int i = thread_; i < kTileRows * kPieces<C>; i += kWarpgroup) {
      const int row = i / kPieces<C>, at = 16 * (i % kPieces<C>);
      const uint8_t* from = p_.codes + real_row(row) * p_.row_bytes + begin;
      uint8_t* to = this->w_stage(slot) + row * kStride<C> + at;
      if (p_.in_words) {
        const int within = this->skew(real_row(row), chunk), bytes = smaller(within + length - at, 16);
        if (at >= within + C::kBytes) continue;
        if (bytes > 0) ptx::cp_async<16>(to, from - within + at, bytes);
        else ptx::cp_async<16>(to, p_.codes, 0);
      } else {
#pragma unroll 1
        for (int b = 0; b < 16; ++b) to[b] = at + b < length ? ptx::load1(from + at + b) : uint8_t{0};
      }
    }
  }

  // ---- scales of planes: a thread has those of a row, as many together as there are registers for ----

  static constexpr int kTogether = 4;
  static_assert(kSpans == kTogether || kSpans == 2 * kTogether);
  BITFOLD_DEVICE void load_scales(int chunk, int begin, LoadedScaleZero (&loaded)[kTogether]) const {
    const auto row = C::scale_row(p_.planes, real_row(thread_));
    const uint32_t first = static_cast<uint32_t>(chunk) * kSpans + static_cast<uint32_t>(begin);
    const auto end = static_cast<uint32_t>((p_.k - 1) / 32);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((i > 0 && p_.wide_groups) || (i % 2 > 0 && p_.whole_units)) loaded[i] = loaded[i - 1];
      else loaded[i] = C::load_scale(p_.planes, row, p_.planes.pieces.divide(smaller(first + i, end)));
    }
  }
  BITFOLD_DEVICE void store_scales(const LoadedScaleZero (&loaded)[kTogether], int slot, int begin) const {
    ScaleZero* to = this->scales_stage(slot) + thread_ * kSpans + begin;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) to[i] = C::scale_zero(p_.planes, loaded[i]);
  }

  // ---- x, and its sums: whole quarters on end ----

  BITFOLD_DEVICE void copy_x(int64_t unit, int slot) const {
    const uint8_t* from = p_.x + (unit * (p_.groups / 8) + quarter0_) * kQuarterBytes;
    const auto bytes = static_cast<unsigned>(quarters_ * kQuarterBytes);
    ptx::Barrier* barrier = &this->barriers().x_full[slot];
    ptx::barrier_expect(barrier, bytes);
    ptx::copy_bulk(this->x_stage(slot), from, bytes, barrier);
  }
  BITFOLD_DEVICE void copy_sums(int64_t chunk, int slot) const {
    const uint8_t* from = p_.sums + (chunk * p_.groups + quarter0_ * 8) * kSumBytes<C>;
    const auto bytes = static_cast<unsigned>(quarters_ * 8 * kSumBytes<C>);
    ptx::Barrier* barrier = &this->barriers().w_full[slot];
    ptx::barrier_expect(barrier, bytes);
    ptx::copy_bulk(this->sums_stage(slot), from, bytes, barrier);
  }

  const int thread_;
};

}  // namespace bitfold::cuda
