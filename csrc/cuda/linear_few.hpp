// y = x W^T + b for 9 to 32 tokens where a block has much shared memory (few.hpp): Hopper's.
//
// As in the tile kernel W is the A operand, 16 rows at a time, decoded once in registers, and x is B, 8 tokens at a
// time. What decides is how few instructions that takes, for memory brings 4 bits a weight faster than they are opened:
// so a block has 256 rows, for which x comes once; a warpgroup of its own copies, and the warps that multiply neither
// ask for bytes nor wait for each other; a warp takes the words of its 16 rows by ldmatrix, and a lane keeps the scales
// of one row and hands them round. Sums of a unit begin at zero and come, scaled, to the warp's own.
#pragma once

#include "cuda/chunk_blocks_large.hpp"
#include "cuda/chunk_planes.hpp"
#include "cuda/few_copies.hpp"
#include "cuda/tile_sums.hpp"

namespace bitfold::cuda {

// Blocks have their scales with them.
struct NoScales {
  static constexpr bool kOne = false, kZeros = false;
};

// How planes' codes are opened; blocks do it themselves.
template <int Row, bool Planes>
struct FewCodes {
  using Tables = NoTables;
};
template <int Row>
struct FewCodes<Row, true> : PlaneCodes<Row> {};

template <int Row>
using FewTables = typename FewCodes<Row, Chunk<Row>::kPlanes>::Tables;

template <int Row>
constexpr FewSize few_size_of() {
  using C = Chunk<Row>;
  using Stage = FewStage<C>;
  const bool tables = kFormats[Row].grid == Grid::Codebook;
  return {.columns = Stage::kColumns,
          .stride = Stage::kStride,
          .sums = Stage::kSums,
          .tables = tables ? static_cast<int>(few_aligned(sizeof(FewTables<Row>))) : 0};
}

// The warps that multiply. Groups: of 8 tokens.
template <int Row, int Groups>
class FewProducts : FewBlock<Row> {
  using Block = FewBlock<Row>;
  using C = Chunk<Row>;
  using Codes = FewCodes<Row, C::kPlanes>;
  using Stage = FewStage<C>;
  using Block::at_;
  using Block::first_;
  using Block::last_;
  using Block::memory_;
  using Block::p_;
  using Block::row0_;
  static constexpr int kUnitBytesOfX = Groups * kUnitBytes;
  static constexpr int kUnits = Stage::kUnits / kFewColumnWarps;  // of a warp
  static constexpr bool kPlanes = C::kPlanes;
  static constexpr bool kKeeps = Groups == 2;  // sums of more tokens leave no registers for them
  // Whether a lane's and a warp's numbers stay in registers. Where codes are looked up they don't: the compiler then
  // adds the table's place to each in an instruction of its own.
  static constexpr bool kKeepsNumbers = kKeeps && kFormats[Row].grid != Grid::Codebook;
  // Where the lane's number would lie on a stack instead, as the machine code says: there a stage waited for it longer
  // than for anything else.
  static constexpr bool kAsksAnew = !kKeeps && (kPlanes || Row == kQ4_1 || Row == kQ2K);
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr int kBits = kFormats[Row].bits;

 public:
  BITFOLD_DEVICE FewProducts(const TileParameter& p, const FewSize& size)
      : Block(p, size),
        lane_(kKeepsNumbers ? ptx::shuffle(ptx::lane_id(), ptx::lane_id()) : ptx::lane_id()),
        row_warp_(warp() % kFewRowWarps),
        column_warp_(warp() / kFewRowWarps) {}

  BITFOLD_DEVICE void run() {
    if constexpr (kFormats[Row].grid == Grid::Codebook) {
      tables().fill(p_.planes.row, static_cast<int>(threadIdx.x), kFewMultiply);
      ptx::bar_sync(kSumsBarrier, kFewMultiply);
    }
    ptx::wait_for_earlier();
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < Groups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[r][j][i] = 0.0f;
      }
    }
    if constexpr (kPlanes) {
      const bool one = Stage::kColumns == 256 ? p_.wide_groups : p_.whole_units;
      if (one) go_planes<kUnitSteps, true>();
      else if (C::kSpan == kUnitSteps || p_.whole_units) go_planes<kUnitSteps, false>();
      else go_planes<C::kSpan, false>();
    } else {
      NoScales none;
      go<C::kSpan>(none);
    }
    TileSums<0, kFewRows, kFewMultiply>(p_, memory_ + at_.tables, 0).finish([&](float* out) { put_sums(out); });
  }

 private:
  // Brought by a shuffle, as the lane is: what comes from a special register is asked for again and again instead of
  // kept, for tens of clocks each time.
  BITFOLD_DEVICE static int warp() { return kKeepsNumbers ? ptx::shuffle(ptx::warp_id(), 0) : ptx::warp_id(); }

  // Span: steps that share a scale; One: whether all of a stage do.
  template <int Span, bool One>
  BITFOLD_DEVICE void go_planes() {
    switch (few_manner<C>(p_.planes)) {
      case Manner::Plain: go_planes<Span, One, Manner::Plain>(); break;
      case Manner::Full:
        if constexpr (C::kInteger || C::kNested) go_planes<Span, One, Manner::Full>();
        break;
      case Manner::Any: go_planes<Span, One, Manner::Any>(); break;
    }
  }
  template <int Span, bool One, Manner M>
  BITFOLD_DEVICE void go_planes() {
    const NestedScales* nested = nullptr;
    if constexpr (C::kNested) nested = &tables().nested;
    FewScales<C, Span, One, M, kKeeps> scales(p_, row0_, column_warp_, nested);
    scales.load(first_);
    go<Span>(scales);
  }

  template <int Span, class Scales>
  BITFOLD_DEVICE void go(Scales& scales) {
    Turn turn;
#pragma unroll 1
    for (int stage = first_; stage < last_; ++stage) {
      if constexpr (kScalesAhead<Scales>) next_scales(scales, stage);
      ptx::barrier_wait(&this->barriers().full[turn.slot], turn.parity);
      const uint8_t* bytes = this->stage(turn.slot);
      open(bytes, stage);
      const int there = this->units(stage) - column_warp_ * kUnits;
      // Without a branch the next unit's loads come before this one's products.
      const bool all = kPlanes && kKeepsNumbers && !Scales::kOne && there >= kUnits;
#pragma unroll
      for (int unit = 0; all && unit < kUnits; ++unit) multiply<Span>(scales, stage, unit, bytes);
#pragma unroll
      for (int unit = 0; !all && unit < kUnits; ++unit) {
        if (unit < there) multiply<Span>(scales, stage, unit, bytes);
      }
      if constexpr (C::kMins > 0) {
        if (stage % kFewColumnWarps == column_warp_) subtract_mins(bytes);
      }
      ptx::sync_warp();  // all lanes have looked at all of the stage that they will
      if (lane_now() == 0) ptx::barrier_arrive(&this->barriers().empty[turn.slot]);
      turn.next(p_.shape.w_stages);
    }
  }

  BITFOLD_DEVICE FewTables<Row>& tables() const { return *reinterpret_cast<FewTables<Row>*>(memory_ + at_.tables); }
  BITFOLD_DEVICE int lane_now() const { return kAsksAnew ? ptx::lane_id_anew() : lane_; }
  BITFOLD_DEVICE int first_row() const { return row_warp_ * (kTiles * 16); }  // of the warp

  BITFOLD_DEVICE Lane lane(int tile, int i) const {
    Lane lane{};
    lane.bytes = rows_ + (16 * tile + 8 * i) * Stage::kStride;
    lane.t = lane_ % 4;
    return lane;
  }
  BITFOLD_DEVICE void open(const uint8_t* bytes, int stage) {
    if constexpr (!kPlanes || kBits == 3) {
      // Rows have an even number of bytes, so that all of a lane's, eight apart, begin at the same place of a piece.
      const int row = first_row() + lane_ / 4;
      rows_ = bytes + row * Stage::kStride + this->skew(row0_ + row, stage);
    }
    if constexpr (!kPlanes && kKeeps) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) heads_[r][i] = C::head(lane(r, i).bytes);
      }
    }
  }
  BITFOLD_DEVICE typename C::Head head(int r, int i) const {
    if constexpr (kKeeps) return heads_[r][i];
    else return C::head(lane(r, i).bytes);
  }

  // The words of a unit, rows g and g + 8 of each tile (PlaneChunk::load): a matrix of ldmatrix is 8 rows and 16 bytes.
  BITFOLD_DEVICE void load_words(const uint8_t* bytes, int unit, uint32_t (&words)[kTiles][2][4]) const {
    if constexpr (kBits == 3) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) C::load(lane(r, i).bytes + unit * (kUnit * kBits / 8), lane_ % 4, words[r][i]);
      }
    } else if constexpr (kBits == 2) {  // 16 bytes of each row: both tiles
      uint32_t four[4];
      ptx::ldmatrix_x4(four, bytes + (first_row() + lane_) * Stage::kStride + 16 * unit);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i / 2][i % 2][0] = four[i];
    } else {
      const int row = first_row() + lane_ % 8 + lane_ / 16 * 8;
      const uint8_t* mine = bytes + row * Stage::kStride + lane_ / 8 % 2 * 16 + unit * (kUnit * kBits / 8);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int w = 0; w < kBits / 2; w += 2) {
          uint32_t four[4];
          ptx::ldmatrix_x4(four, mine + 16 * r * Stage::kStride + 16 * w);
#pragma unroll
          for (int i = 0; i < 4; ++i) words[r][i / 2][w + i % 2] = four[i];
        }
      }
    }
  }

  // The operands of one of the warp's units, and what their sums are multiplied with.
  template <int Span, class Scales>
  BITFOLD_DEVICE void decode(Scales& scales, int stage, int unit, const uint8_t* bytes,
                             uint32_t (&a)[kTiles][kUnitSteps][4], float (&scale)[kTiles][kUnitSteps / Span][2]) const {
    if constexpr (kPlanes) {
      uint32_t words[kTiles][2][4];
      // The warp's half is counted in bytes, or in units, as fewer registers go to the stack (of int3 rows_ has the
      // bytes).
      constexpr bool kInUnits = kFormats[Row].grid == Grid::Codebook || kBits == 3;
      const uint8_t* half = kInUnits ? bytes : bytes + column_warp_ * (kUnits * kUnit * kBits / 8);
      load_words(half, kInUnits ? column_warp_ * kUnits + unit : unit, words);
      if (!kScalesAhead<Scales> && kScalesFirst<Scales> && unit == 0) next_scales(scales, stage);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t zero = 0x00010001u << (kBits - 1);
#pragma unroll
          for (int s = 0; s < kUnitSteps; ++s) {
            if (Scales::kZeros && s % Span == 0)
              zero = scales.zero(Scales::kOne ? 0 : unit * (kUnitSteps / Span) + s / Span, r, i);
            const uint32_t* word = words[r][i] + C::word_of(s);
            a[r][s][kLow0 + i] = Codes::value(word, C::of_word(s), 0, zero, tables());
            a[r][s][kLow1 + i] = Codes::value(word, C::of_word(s), 1, zero, tables());
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Operands<C::kSpan> row;
          C::unit(lane(r, i), head(r, i), column_warp_ * kUnits + unit, row);
#pragma unroll
          for (int s = 0; s < kUnitSteps; ++s) {
            a[r][s][kLow0 + i] = row.halves[s][0];
            a[r][s][kLow1 + i] = row.halves[s][1];
            if (s % Span == 0) scale[r][s / Span][i] = row.scales[s / Span];
          }
        }
      }
    }
  }

  // Scales are looked at when nothing else of the stage can go on without them, or first, where zero points are needed
  // or registers are few; one for all of a stage before it has come.
  template <class Scales>
  static constexpr bool kScalesAhead = Scales::kOne && !Scales::kZeros;
  template <class Scales>
  static constexpr bool kScalesFirst = Scales::kZeros || !kKeeps;
  template <class Scales>
  BITFOLD_DEVICE void next_scales(Scales& scales, int stage) const {
    scales.open(stage);
    scales.load(stage + 1);
  }

  // One unit of the warp's rows with all tokens.
  template <int Span, class Scales>
  BITFOLD_DEVICE void multiply(Scales& scales, int stage, int unit, const uint8_t* bytes) {
    // Groups of tokens whose products take turns: one where a unit's scales leave no registers for two, as the machine
    // code says.
    constexpr bool kMany = kPlanes ? Span < kUnitSteps || (kBits < 4 && Scales::kZeros && !Scales::kOne)
                                   : Row == kQ4_1 || Row == kQ5_1 || Row == kIq4Xs || Row == kMxfp4;
    constexpr int kTurns = Groups > 2 && kMany ? 1 : 2;
    uint32_t a[kTiles][kUnitSteps][4];
    float scale[kTiles][kUnitSteps / Span][2];
    decode<Span>(scales, stage, unit, bytes, a, scale);
    // [group][2][lane]
    const int block = column_warp_ * kUnits + unit;
    const auto* x = reinterpret_cast<const uint4*>(bytes + at_.x + block * kUnitBytesOfX) + lane_now();
#pragma unroll
    for (int group = 0; group < Groups; group += kTurns) {
      // Never; but so the compiler doesn't mix those of more, for which there are no registers.
      if (Groups > 2 && group >= p_.groups) break;
      uint32_t b[kTurns][kUnitSteps][2];
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const uint4 b0 = x[64 * (group + j)], b1 = x[64 * (group + j) + 32];
        b[j][0][0] = b0.x, b[j][0][1] = b0.y, b[j][1][0] = b0.z, b[j][1][1] = b0.w;
        b[j][2][0] = b1.x, b[j][2][1] = b1.y, b[j][3][0] = b1.z, b[j][3][1] = b1.w;
      }
      float part[kTiles][kTurns][4];
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s) {
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            if (s % Span == 0) ptx::mma_f16_zero(part[r][j], a[r][s], b[j][s]);
            else ptx::mma_f16(part[r][j], a[r][s], b[j][s]);
          }
        }
        if (s % Span < Span - 1) continue;
        if constexpr (kPlanes) {
          if (!kScalesAhead<Scales> && !kScalesFirst<Scales> && unit == 0 && group == 0 && s == Span - 1)
            next_scales(scales, stage);
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              scale[r][s / Span][i] = scales.scale(unit * (kUnitSteps / Span) + s / Span, r, i);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
#pragma unroll
          for (int r = 0; r < kTiles; ++r) add_scaled(sums_[r][group + j], part[r][j], scale[r][s / Span]);
        }
      }
    }
  }
  BITFOLD_DEVICE static void add_scaled(float (&to)[4], const float (&sum)[4], const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = ptx::fma(scale[i / 2], sum[i], to[i]);
  }

  // Minima of the stage's sub-blocks with the sums of x over them, high and low parts.
  BITFOLD_DEVICE void subtract_mins(const uint8_t* bytes) {
    uint32_t a[kTiles][4];
    float scale[kTiles][2];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t mins[2];
        scale[r][i] = C::mins(lane(r, i), head(r, i), mins);
        a[r][kLow0 + i] = mins[0];
        a[r][kLow1 + i] = mins[1];
      }
    }
    const uint8_t* b = bytes + at_.sums + lane_now() * C::kMins;
#pragma unroll
    for (int j = 0; j < Groups; ++j) {
      uint32_t high[2], low[2];
      if constexpr (C::kMins == 8) {
        const uint2 both = *reinterpret_cast<const uint2*>(b + j * Stage::kSums);
        high[0] = both.x, high[1] = both.y;
      } else {
        const uint4 both = *reinterpret_cast<const uint4*>(b + j * Stage::kSums);
        high[0] = both.x, high[1] = both.y, low[0] = both.z, low[1] = both.w;
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        float sum[4];
        ptx::mma_f16_zero(sum, a[r], high);
        if constexpr (C::kMins == 16) ptx::mma_f16(sum, a[r], low);
        add_scaled(sums_[r][j], sum, scale[r]);
      }
    }
  }

  // The warps that share rows add theirs up in turn.
  BITFOLD_DEVICE void put_sums(float* out) const {
    for (int turn = 0; turn < kFewColumnWarps; ++turn) {
      if (turn == column_warp_) put_mine(out, turn > 0);
      ptx::bar_sync(kSumsBarrier, kFewMultiply);
    }
  }
  BITFOLD_DEVICE void put_mine(float* out, bool add) const {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < Groups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + lane_ % 4 * 2 + i % 2;
          const int row = first_row() + 16 * r + lane_ / 4 + 8 * (i / 2);
          float& place = out[token * out_stride(kFewRows) + row];
          place = add ? ptx::add(place, sums_[r][j][i]) : sums_[r][j][i];
        }
      }
    }
  }

  const int lane_, row_warp_, column_warp_;
  float sums_[kTiles][Groups][4];
  // Of blocks' stage at hand: the lane's first row, and what its units share.
  const uint8_t* rows_;
  typename C::Head heads_[kKeeps ? kTiles : 1][2];
};

template <int Row>
BITFOLD_DEVICE void linear_few(const TileParameter& p) {
  constexpr FewSize kSize = few_size_of<Row>();
  auto& barriers = *reinterpret_cast<FewBarriers*>(shared<Bytes>().bytes);
  if constexpr (kFormats[Row].nested) {
    auto& tables = *reinterpret_cast<FewTables<Row>*>(shared<Bytes>().bytes + kFewBarrierBytes);
    tables.nested.fill(p.planes.nested_offset, static_cast<int>(threadIdx.x), kFewThreads);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.shape.w_stages; ++i) {
      ptx::barrier_init(&barriers.full[i], FewCopies<Row>::kArrivals);
      ptx::barrier_init(&barriers.empty[i], kFewWarps);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (threadIdx.x < kFewMultiply) {
    ptx::registers_up<kFewUp>();
    if (p.groups == 2) FewProducts<Row, 2>(p, kSize).run();
    else FewProducts<Row, 4>(p, kSize).run();
  } else {
    ptx::registers_down<kFewDownTo>();
    FewCopies<Row>(p, kSize, static_cast<int>(threadIdx.x) - kFewMultiply).run();
  }
}

}  // namespace bitfold::cuda
