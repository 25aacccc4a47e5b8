// y = x W^T + b for more than 32 tokens where there is wgmma (wgmma.hpp).
//
// A warpgroup has 64 rows of W as the A operand in registers: warp w rows 16 w ... 16 w + 15, decoded as the tile
// kernel does it (chunk.hpp) and then multiplied with their scales, as halves (wgmma.hpp). A unit, once decoded, meets
// one quarter of tokens or two, and all units add to the same sums: while one is multiplied the next is decoded, and
// nobody waits for a product but for its operand's registers.
#pragma once

#include <type_traits>

#include "cuda/tile_sums.hpp"
#include "cuda/wgmma_copies.hpp"

namespace bitfold::cuda {

template <int Row, int Quarters>
class WgmmaProducts : WgmmaBlock<Row, Quarters> {
  using Block = WgmmaBlock<Row, Quarters>;
  using C = Chunk<Row>;
  using Block::at_;
  using Block::first_;
  using Block::kRows;
  using Block::kUnits;
  using Block::last_;
  using Block::memory_;
  using Block::p_;
  using Block::quarter0_;
  using Block::row0_;
  static constexpr int kSums = kQuarter / 2;                  // of a thread, for a quarter
  static constexpr int kCoreBytes = 128;                      // 8 tokens, 16 bytes each
  static constexpr int kMinsPairs = larger(C::kMins / 8, 1);  // of a lane
  static constexpr int kChangesBarrier = kSumsBarrier + 1;    // and the next

 public:
  BITFOLD_DEVICE explicit WgmmaProducts(const TileParameter& p)
      : Block(p), lane_(ptx::lane_id()), row_(16 * ptx::warp_id() + lane_ / 4), power_{kFinest, kFinest} {}

  BITFOLD_DEVICE void run() {
    ptx::wait_for_earlier();
    float sums[Quarters][kSums];
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[q][i] = 0.0f;
    }
    multiply(sums);
    const float down[2] = {inverse(power_[0]), inverse(power_[1])};
    TileSums<0, kRows, kWgmmaMultiply<Quarters>>(p_, memory_ + at_.out, quarter0_ * (kQuarter / 8))
        .finish([&](float* out) {
#pragma unroll
          for (int q = 0; q < Quarters; ++q) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
              const int token = kQuarter * q + 8 * (i / 4) + lane_ % 4 * 2 + i % 2;
              out[token * out_stride(kRows) + row_ + 8 * (i / 2 % 2)] = ptx::mul(sums[q][i], down[i / 2 % 2]);
            }
          }
          ptx::bar_sync(kSumsBarrier, kWgmmaMultiply<Quarters>);
        });
  }

  // A unit's A, with its scales.
  struct Decoded {
    uint32_t a[kUnitSteps][4];
  };

  // Products with what minima lack read the sums of x that lie with a chunk, and are not waited for before its second
  // unit.
  static constexpr bool kLeavesEarly = !kLacks<C>;

  // While a unit is multiplied the one before is waited for, whose registers the next is then decoded into.
  BITFOLD_DEVICE void multiply(float (&sums)[Quarters][kSums]) {
    Turn w, x;
    int chunk = first_, unit = 0, before = -1;  // what is decoded; the stage of x of the unit before
    bool more = true;
    Decoded even, odd{};
    open(chunk, w, sums);
    decode(unit, even);
    constexpr int kLast = kUnits - 1;
    // opens: it may be a chunk's first unit.
    const auto turn = [&](Decoded& now, Decoded& next, auto opens) {
      if constexpr (kLacks<C> && opens) {
        if (unit == 0) multiply_lacks(sums, w.slot);
      }
      ptx::barrier_wait(&this->head().x_full[x.slot], x.parity);
      ptx::wgmma_fence();
      multiply_unit(sums, now, x.slot);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_keep(next.a);
      if (before >= 0) release(&this->head().x_empty[before]);
      before = x.slot;
      x.next(p_.shape.x_stages);
      if (++unit == kUnits) {
        if constexpr (!kLeavesEarly) release(&this->head().w_empty[w.slot]);
        w.next(p_.shape.w_stages);
        unit = 0;
        more = ++chunk < last_;
        if (more) open(chunk, w, sums);
      }
      if (more) decode(unit, next);
      // Nothing of the chunk is wanted once its last unit is in registers, which is an odd one.
      if constexpr (kLeavesEarly && opens) {
        if (unit == kLast) release(&this->head().w_empty[w.slot]);
      }
    };
    static_assert(kUnits % 2 == 0);
#pragma unroll 1
    do {
      turn(even, odd, std::true_type());
      turn(odd, even, std::false_type());
    } while (more);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int q = 0; q < Quarters; ++q) ptx::wgmma_keep(sums[q]);
  }

  // This warp has looked at all of a stage that it will.
  BITFOLD_DEVICE void release(ptx::Barrier* empty) const {
    ptx::sync_warp();
    if (lane_ == 0) ptx::barrier_arrive(empty);
  }

  BITFOLD_DEVICE Lane lane(int i) const {
    Lane lane{};
    lane.bytes = rows_ + 8 * i * kStride<C>;
    lane.scales = nullptr;  // they are scaled themselves
    lane.tables = memory_ + at_.tables;
    lane.t = lane_ % 4;
    return lane;
  }
  // A chunk, as soon as it is there, and the powers of two of its rows.
  BITFOLD_DEVICE void open(int chunk, const Turn& w, float (&sums)[Quarters][kSums]) {
    ptx::barrier_wait(&this->head().w_full[w.slot], w.parity);
    // Rows have an even number of bytes, so that all of a lane's, eight apart, begin at the same place of a piece.
    rows_ = this->w_stage(w.slot) + row_ * kStride<C> + this->skew(row0_ + row_, chunk);
    if constexpr (C::kPlanes) scales_ = this->scales_of(w.slot, row_);
#pragma unroll
    for (int i = 0; i < 2; ++i) heads_[i] = C::head(lane(i).bytes);
    if constexpr (C::kPlanes) {
      if (changes(w.slot)) {
        change_powers({this->power_of(w.slot, row_), this->power_of(w.slot, row_ + 8)}, sums);
      }
    } else {
      const float peak[2] = {C::peak(lane(0), heads_[0]), C::peak(lane(1), heads_[1])};
      const bool mine = ptx::any(peak[0] * power_[0] >= kScaleLimit<C> || peak[1] * power_[1] >= kScaleLimit<C>);
      if (lane_ == 0) this->head().changes[w.slot][ptx::warp_id()] = mine ? 1 : 0;
      ptx::bar_sync(kChangesBarrier + ptx::warp_id() / 4, kWarpgroup);
      if (changes(w.slot)) {
        float power[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // of what all four lanes see of a row
          const float two = larger(peak[i], ptx::shuffle_xor(peak[i], 1));
          power[i] = power_for<C>(larger(two, ptx::shuffle_xor(two, 2)), power_[i]);
        }
        change_powers(power, sums);
      }
    }
    if constexpr (C::kMins > 0) decode_mins();
  }
  // Whether a row of the warpgroup changes its power of two: all of its warps wait for products, or none.
  BITFOLD_DEVICE bool changes(int slot) const {
    const uint4 tiles = reinterpret_cast<const uint4*>(this->head().changes[slot])[ptx::warp_id() / 4];
    // By a vote, so that the compiler knows that lanes stay together, and keeps what all have in uniform registers.
    return ptx::any((tiles.x | tiles.y | tiles.z | tiles.w) != 0);
  }
  // Seldom: sums so far become what they are with other powers of two, which are smaller; in two steps, since a float
  // may not have what is between them.
  BITFOLD_DEVICE void change_powers(const float (&power)[2], float (&sums)[Quarters][kSums]) {
    float factor[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int down = exponent_of(power_[i]) - exponent_of(power[i]);
      factor[0][i] = power_of_two(-(down / 2));
      factor[1][i] = power_of_two(-(down - down / 2));
      power_[i] = power[i];
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
      ptx::wgmma_keep(sums[q]);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[q][i] = ptx::mul(ptx::mul(sums[q][i], factor[0][i / 2 % 2]), factor[1][i / 2 % 2]);
      }
    }
  }

  BITFOLD_DEVICE void decode(int unit, Decoded& out) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Operands<C::kSpan> row;
      uint32_t scale[kUnitSteps / C::kSpan];  // in both halves
      if constexpr (C::kPlanes) {
        const uint4 two = reinterpret_cast<const uint4*>(scales_ + 8 * i * (kScaleBytes<C> / 8))[unit];
        C::operands(lane(i), unit, {0.0f, two.y}, {0.0f, two.w}, row);
        scale[0] = two.x;
        if constexpr (C::kSpan < kUnitSteps) scale[1] = two.z;
      } else {
        C::unit(lane(i), heads_[i], unit, row);
#pragma unroll
        for (int s = 0; s < kUnitSteps / C::kSpan; ++s)
          scale[s] = both_halves(row.scales[s] * (power_[i] / two_to(C::kUp)));
      }
      uint32_t mins[kUnitSteps];
      if constexpr (C::kMins > 0) mins_of(i, unit, mins);
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s) {
        const uint32_t of_step = scale[s / C::kSpan];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t halves = up<C::kUp>(row.halves[s][h]);
          uint32_t& a = out.a[s][(h == 0 ? kLow0 : kLow1) + i];
          if constexpr (C::kMins > 0) a = ptx::hfma2(halves, of_step, mins[s]);
          else a = ptx::hmul2(halves, of_step);
        }
      }
    }
  }
  // The minima of a unit's steps, in both halves, from the lane of the row that has them.
  BITFOLD_DEVICE void mins_of(int i, int unit, uint32_t (&out)[kUnitSteps]) const {
    if constexpr (C::kMins == 8) {  // sub-blocks 2 unit and 2 unit + 1, of two steps each
      const uint32_t two = ptx::shuffle_of_four(mins_[i][0], unit);
      out[0] = out[1] = ptx::prmt(two, 0, 0x1010u);
      out[2] = out[3] = ptx::prmt(two, 0, 0x3232u);
    } else {  // 8 (unit / 2) + 2 step + unit % 2
      const uint32_t own = ptx::prmt(mins_[i][0], mins_[i][1], 0x1010u + 0x2222u * static_cast<uint32_t>(unit));
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s) out[s] = ptx::shuffle_of_four(own, s);
    }
  }
  // Minima of sub-blocks 2 t and 2 t + 1 (and eight further ones) of both rows, as halves of operands. What a half
  // lacks of an integer times the block's own number is a half again, and meets a 32nd of the sum of x.
  BITFOLD_DEVICE void decode_mins() {
    if constexpr (kLacks<C>) ptx::wgmma_keep(lacks_);
    constexpr float kParts = 32.0f;  // of C::mins
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t mins[2];
      const uint32_t scale = both_halves(C::mins(lane(i), heads_[i], mins) * (power_[i] / two_to(C::kMinsUp) / kParts));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t whole = up<C::kMinsUp>(mins[r]), high = ptx::hmul2(whole, scale);
        if (r < kMinsPairs) mins_[i][r] = high;
        if constexpr (kLacks<C>) {
          const uint32_t lack = ptx::hfma2(whole, scale, high ^ 0x80008000u);
          lacks_[0][2 * r + i] = ptx::hmul2(lack, both_halves(kParts));
        }
      }
    }
  }

  // One unit with all tokens.
  BITFOLD_DEVICE void multiply_unit(float (&sums)[Quarters][kSums], const Decoded& unit, int slot) const {
    const uint64_t b = matrix(this->x_stage(slot));
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
#pragma unroll
      for (int step = 0; step < kUnitSteps; ++step) {
        ptx::wgmma_f16<kQuarter>(sums[q], unit.a[step], b + (q * kQuarterBytes + step * kStepBytes) / 16, true);
      }
    }
  }
  // What minima of the chunk's sub-blocks lack, with the sums of x over them: high parts, and low ones where both are
  // one step.
  BITFOLD_DEVICE void multiply_lacks(float (&sums)[Quarters][kSums], int slot) const {
    const uint64_t b = matrix(this->sums_stage(slot));
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
      ptx::wgmma_f16<kQuarter>(sums[q], lacks_[0], b + q * 8 * kSumBytes<C> / 16, true);
    }
  }

  BITFOLD_DEVICE static uint64_t matrix(const uint8_t* quarters) {
    return ptx::wgmma_matrix(quarters, kQuarter / 8 * kCoreBytes, kCoreBytes);
  }
  static constexpr float two_to(int power) { return static_cast<float>(1 << power); }
  // Both halves times 2^Power.
  template <int Power>
  BITFOLD_DEVICE static uint32_t up(uint32_t halves) {
    if constexpr (Power == 0) return halves;
    else return ptx::hmul2(halves, 0x00010001u * ((15u + Power) << 10));
  }
  BITFOLD_DEVICE static uint32_t both_halves(float value) { return ptx::floats_to_halves(value, value); }

  const int lane_;
  const int row_;  // of the block's: the lane's first
  // Of the chunk at hand: that row, and what its scales and the other's are multiplied with.
  const uint8_t* rows_;
  const ScaledZero* scales_;
  typename C::Head heads_[2];
  float power_[2];
  uint32_t mins_[2][kMinsPairs];  // of those rows
  uint32_t lacks_[1][4];
};

// All of a block's threads.
template <int Row, int Quarters>
BITFOLD_DEVICE void linear_wgmma(const TileParameter& p) {
  using C = Chunk<Row>;
  auto* memory = shared<Bytes>().bytes;
  auto& head = *reinterpret_cast<WgmmaHead*>(memory);
  const auto thread = static_cast<int>(threadIdx.x);
  if constexpr (C::kTables > 0) {
    C::fill(p.planes, memory + wgmma_places(chunk_size<C>(), wgmma_rows(Quarters), kQuarter, 0, 0).tables, thread,
            kWgmmaThreads<Quarters>);
  }
  if (thread == 0) {
    for (int i = 0; i < p.shape.x_stages; ++i) {
      ptx::barrier_init(&head.x_full[i], 1);
      ptx::barrier_init(&head.x_empty[i], kWgmmaMultiply<Quarters> / kWarp);
    }
    for (int i = 0; i < p.shape.w_stages; ++i) {
      ptx::barrier_init(&head.w_full[i], WgmmaCopies<Row, Quarters>::kWArrivals);
      ptx::barrier_init(&head.w_empty[i], kWgmmaMultiply<Quarters> / kWarp);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (thread < kWgmmaMultiply<Quarters>) {
    ptx::registers_up<kUp<C, Quarters>>();
    WgmmaProducts<Row, Quarters>(p).run();
  } else {
    ptx::registers_down<kDownTo<C, Quarters>>();
    WgmmaCopies<Row, Quarters>(p, thread - kWgmmaMultiply<Quarters>).run();
  }
}

}  // namespace bitfold::cuda
