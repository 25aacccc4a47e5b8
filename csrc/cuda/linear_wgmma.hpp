// y = x W^T + b for more than 32 tokens where there is wgmma (wgmma.hpp).
//
// A warpgroup has 64 rows of W as the A operand in registers: warp w rows 16 w ... 16 w + 15, decoded as the tile
// kernel does it (chunk.hpp). A unit, once decoded, meets up to four quarters of tokens. Each product of a quarter and
// a span (the steps that share a scale) begins at zero in temporary sums, of which there are two sets: while one is
// multiplied the other is added to the block's sums, times its scale. Where there are registers for it, the next unit
// is decoded while this one is multiplied; else while the other warpgroup multiplies.
#pragma once

#include "cuda/tile_sums.hpp"
#include "cuda/wgmma_copies.hpp"

namespace bitfold::cuda {

template <int Row>
class WgmmaProducts : WgmmaBlock<Row> {
  using Block = WgmmaBlock<Row>;
  using C = Chunk<Row>;
  using Block::at_;
  using Block::first_;
  using Block::kUnits;
  using Block::last_;
  using Block::memory_;
  using Block::p_;
  using Block::quarter0_;
  using Block::quarters_;
  using Block::row0_;
  static constexpr int kSums = kQuarter / 2;  // of a thread, for a quarter
  // Sums of more quarters leave no registers for a second unit.
  static constexpr int kMostQuartersAhead = 2;
  // Where products take the time the warpgroups issue a unit's by turns: else both decode at the same time, and then
  // multiply at the same time.
  template <int Quarters>
  static constexpr bool kOrdered = Quarters > kMostQuartersAhead;
  static constexpr int kOrderBarrier = kSumsBarrier + 1;  // and the next
  static constexpr int kCoreBytes = 128;                  // 8 tokens, 16 bytes each

 public:
  BITFOLD_DEVICE explicit WgmmaProducts(const TileParameter& p)
      : Block(p),
        lane_(ptx::lane_id()),
        group_(ptx::shuffle(ptx::warp_id(), 0) / 4),
        row_(16 * ptx::warp_id() + lane_ / 4) {}

  BITFOLD_DEVICE void run() {
    if constexpr (C::kPlanes && C::kSpan < kUnitSteps) {
      if (p_.whole_units) return multiply_all<kUnitSteps>();
    }
    multiply_all<C::kSpan>();
  }

 private:
  // Span: steps that share a scale here.
  template <int Span>
  BITFOLD_DEVICE void multiply_all() {
    if (quarters_ == 1) return multiply_all<Span, 1>();
    if (quarters_ == 2) return multiply_all<Span, 2>();
    if constexpr (kMostQuartersOf<C> > 2) {
      if (quarters_ == 3) return multiply_all<Span, 3>();
      multiply_all<Span, 4>();
    }
  }
  template <int Span, int Quarters>
  BITFOLD_DEVICE void multiply_all() {
    float sums[Quarters][kSums];
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[q][i] = 0.0f;
    }
    if (kOrdered<Quarters> && group_ == 1) ptx::bar_arrive(kOrderBarrier, kTileThreads);
    if constexpr (Quarters <= kMostQuartersAhead) multiply_ahead<Span>(sums);
    else multiply_in_turn<Span>(sums);
    TileSums<0>(p_, memory_ + at_.out, quarter0_ * (kQuarter / 8)).finish([&](float* out) {
#pragma unroll
      for (int q = 0; q < Quarters; ++q) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int token = kQuarter * q + 8 * (i / 4) + lane_ % 4 * 2 + i % 2;
          out[token * kOutStride + row_ + 8 * (i / 2 % 2)] = sums[q][i];
        }
      }
      ptx::bar_sync(kSumsBarrier, kTileThreads);
    });
  }

  // Each unit is decoded, then multiplied.
  template <int Span, int Quarters>
  BITFOLD_DEVICE void multiply_in_turn(float (&sums)[Quarters][kSums]) {
    Turn w, x;
#pragma unroll 1
    for (int chunk = first_; chunk < last_; ++chunk) {
      open(chunk, w);
      if constexpr (C::kMins > 0) subtract_mins(sums, w.slot);
#pragma unroll 1
      for (int unit = 0; unit < kUnits; ++unit) {
        Decoded<Span> decoded;
        decode(unit, decoded);
        ptx::barrier_wait(&this->barriers().x_full[x.slot], x.parity);
        const bool last = chunk + 1 == last_ && unit + 1 == kUnits;
        multiply(sums, decoded, x.slot, last, [] {});
        release(&this->barriers().x_empty[x.slot]);
        x.next(p_.shape.x_stages);
      }
      release(&this->barriers().w_empty[w.slot]);
      w.next(p_.shape.w_stages);
    }
  }
  // The next unit is decoded while this one is multiplied.
  template <int Span, int Quarters>
  BITFOLD_DEVICE void multiply_ahead(float (&sums)[Quarters][kSums]) {
    Turn w, x;
    int chunk = first_, unit = 0;  // that is decoded
    bool more = true;
    Decoded<Span> even, odd;
    open(chunk, w);
    decode(unit, even);
    const auto turn = [&](Decoded<Span>& now, Decoded<Span>& next) {
      ptx::barrier_wait(&this->barriers().x_full[x.slot], x.parity);
      multiply(sums, now, x.slot, false, [&] {
        if (++unit == kUnits) {
          release(&this->barriers().w_empty[w.slot]);
          w.next(p_.shape.w_stages);
          unit = 0;
          more = ++chunk < last_;
          if (more) open(chunk, w);
        }
        if (more) decode(unit, next);
      });
      ptx::wgmma_keep(now.a);
      release(&this->barriers().x_empty[x.slot]);
      x.next(p_.shape.x_stages);
    };
    static_assert(kUnits % 2 == 0);
#pragma unroll 1
    do {
      if constexpr (C::kMins > 0) {
        if (unit == 0) subtract_mins(sums, w.slot);
      }
      turn(even, odd);
      turn(odd, even);
    } while (more);
  }

  // This warp has looked at all of a stage that it will.
  BITFOLD_DEVICE void release(ptx::Barrier* empty) const {
    ptx::sync_warp();
    if (lane_ == 0) ptx::barrier_arrive(empty);
  }

  BITFOLD_DEVICE Lane lane(int i) const {
    const int row = 8 * i;
    Lane lane{};
    lane.bytes = rows_ + row * kStride<C>;
    lane.scales = C::kPlanes ? scales_ + row * (kScaleBytes<C> / static_cast<int>(sizeof(ScaleZero))) : nullptr;
    lane.tables = memory_ + at_.tables;
    lane.t = lane_ % 4;
    return lane;
  }
  // A chunk, as soon as it is there.
  BITFOLD_DEVICE void open(int chunk, const Turn& w) {
    ptx::barrier_wait(&this->barriers().w_full[w.slot], w.parity);
    // Rows have an even number of bytes, so that all of a lane's, eight apart, begin at the same place of a piece.
    rows_ = this->w_stage(w.slot) + row_ * kStride<C> + this->skew(row0_ + row_, chunk);
    if constexpr (C::kPlanes) scales_ = this->scales_of(w.slot, row_);
#pragma unroll
    for (int i = 0; i < 2; ++i) heads_[i] = C::head(lane(i).bytes);
  }

  // A unit's A, and its scales.
  template <int Span>
  struct Decoded {
    uint32_t a[kUnitSteps][4];
    float scale[kUnitSteps / Span][2];
  };
  template <int Span>
  BITFOLD_DEVICE void decode(int unit, Decoded<Span>& out) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Operands<C::kSpan> row;
      C::unit(lane(i), heads_[i], unit, row);
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s) {
        out.a[s][kLow0 + i] = row.halves[s][0];
        out.a[s][kLow1 + i] = row.halves[s][1];
      }
#pragma unroll
      for (int s = 0; s < kUnitSteps / Span; ++s) out.scale[s][i] = row.scales[s];
    }
  }

  // One unit with all tokens; last: of the block's. meanwhile(): what is done while the first products are on their
  // way.
  template <int Span, int Quarters, class Meanwhile>
  BITFOLD_DEVICE void multiply(float (&sums)[Quarters][kSums], Decoded<Span>& unit, int slot, bool last,
                               const Meanwhile& meanwhile) const {
    constexpr int kProducts = Quarters * (kUnitSteps / Span), kBefore = smaller(kProducts, 2);
    const uint64_t b = matrix(this->x_stage(slot));
    float products[2][kSums];
    if (kOrdered<Quarters>) ptx::bar_sync(kOrderBarrier + group_, kTileThreads);
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      if (j == kProducts - 1 && kOrdered<Quarters> && !(last && group_ == 1)) {
        ptx::bar_arrive(kOrderBarrier + 1 - group_, kTileThreads);
      }
      if (j >= kBefore) {
        ptx::wgmma_wait<1>();
        add_scaled(sums[(j - 2) % Quarters], products[j % 2], unit.scale[(j - 2) / Quarters]);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Span; ++i) {
        const int step = j / Quarters * Span + i;
        ptx::wgmma_f16<kQuarter>(products[j % 2], unit.a[step],
                                 b + (j % Quarters * kQuarterBytes + step * kStepBytes) / 16, i > 0);
      }
      ptx::wgmma_commit();
      if (j == kBefore - 1) meanwhile();
    }
    if constexpr (kProducts > 1) {
      ptx::wgmma_wait<1>();
      add_scaled(sums[(kProducts - 2) % Quarters], products[kProducts % 2], unit.scale[(kProducts - 2) / Quarters]);
    }
    ptx::wgmma_wait<0>();
    add_scaled(sums[Quarters - 1], products[(kProducts - 1) % 2], unit.scale[kUnitSteps / Span - 1]);
  }

  // Minima of the chunk's sub-blocks with the sums of x over them, high and low parts: one product more, of one step,
  // or of two with the same A.
  template <int Quarters>
  BITFOLD_DEVICE void subtract_mins(float (&sums)[Quarters][kSums], int slot) const {
    uint32_t a[4];
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t mins[2];
      scale[i] = C::mins(lane(i), heads_[i], mins);
      a[kLow0 + i] = mins[0];
      a[kLow1 + i] = mins[1];
    }
    const uint64_t b = matrix(this->sums_stage(slot));
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
      float product[kSums];
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < C::kMins / 8; ++step) {
        ptx::wgmma_f16<kQuarter>(product, a, b + (q * 8 * kSumBytes<C> + step * kStepBytes) / 16, step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      add_scaled(sums[q], product, scale);
    }
  }

  BITFOLD_DEVICE static uint64_t matrix(const uint8_t* quarters) {
    return ptx::wgmma_matrix(quarters, kQuarter / 8 * kCoreBytes, kCoreBytes);
  }
  BITFOLD_DEVICE static void add_scaled(float (&to)[kSums], float (&product)[kSums], const float (&scale)[2]) {
    ptx::wgmma_keep(product);
#pragma unroll
    for (int i = 0; i < kSums; ++i) to[i] = ptx::fma(scale[i / 2 % 2], product[i], to[i]);
  }

  const int lane_;
  const int group_;  // which warpgroup
  const int row_;    // of the block's: the lane's first
  // Of the chunk at hand: that row.
  const uint8_t* rows_;
  const ScaleZero* scales_;
  typename C::Head heads_[2];
};

// All of a block's threads.
template <int Row>
BITFOLD_DEVICE void linear_wgmma(const TileParameter& p) {
  using C = Chunk<Row>;
  auto* memory = shared<Bytes>().bytes;
  auto& barriers = *reinterpret_cast<WgmmaBarriers*>(memory);
  const auto thread = static_cast<int>(threadIdx.x);
  if constexpr (C::kTables > 0) {
    C::fill(p.planes.row, memory + wgmma_places(chunk_size<C>(), kQuarter, 0, 0).tables, thread, kWgmmaThreads);
  }
  if (thread == 0) {
    for (int i = 0; i < p.shape.x_stages; ++i) {
      ptx::barrier_init(&barriers.x_full[i], 1);
      ptx::barrier_init(&barriers.x_empty[i], kTileThreads / kWarp);
    }
    for (int i = 0; i < p.shape.w_stages; ++i) {
      ptx::barrier_init(&barriers.w_full[i], WgmmaCopies<Row>::kWArrivals);
      ptx::barrier_init(&barriers.w_empty[i], kTileThreads / kWarp);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (thread < kTileThreads) {
    ptx::registers_up<kUp<C>>();
    WgmmaProducts<Row>(p).run();
  } else {
    ptx::registers_down<kDownTo<C>>();
    WgmmaCopies<Row>(p, thread - kTileThreads).run();
  }
}

}  // namespace bitfold::cuda
