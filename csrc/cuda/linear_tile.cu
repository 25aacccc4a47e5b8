// y = x W^T + b for 9 to 128 tokens: W is read once, and every weight of it decoded once in each block of threads.
// Where there is wgmma up to 32 of them are linear_few.hpp's and more linear_wgmma.hpp's.
//
// W is the A operand, 16 rows at a time, and x is B, 8 tokens at a time, so that a weight meets all tokens of the block
// while it is in registers. Packed bytes come to shared memory as they lie in memory, chunk by chunk, several chunks
// ahead; so does x, which arrange has put into the order in which codes come out of those bytes. A warp decodes 64
// columns of 32 rows (a unit), multiplies them with all tokens in fresh sums, and adds these, scaled, to its own.
// Everything is added in an order that the shape alone determines.
#include "cuda/chunk_blocks_large.hpp"
#include "cuda/chunk_planes.hpp"
#include "cuda/linear_few.hpp"
#include "cuda/linear_wgmma.hpp"
#include "cuda/tile_copies.hpp"
#include "cuda/tile_sums.hpp"

namespace bitfold::cuda {
namespace {

// What a chunk of planes has beside its bytes; blocks have nothing.
template <class C>
struct ScaleRowOf {
  struct Type {};
};
template <class C>
  requires(C::kPlanes)
struct ScaleRowOf<C> {
  using Type = typename C::ScaleRow;
};

template <int Row, int Tokens>
class Tile : TileCopies<Row, Tokens> {
  using Copies = TileCopies<Row, Tokens>;
  using C = Chunk<Row>;
  using Copies::at_;
  using Copies::first_;
  using Copies::group0_;
  using Copies::groups_;
  using Copies::kGroups;
  using Copies::kKeepsPlaces;
  using Copies::kUnits;
  using Copies::kXUnit;
  using Copies::kXUnits;
  using Copies::last_;
  using Copies::memory_;
  using Copies::p_;
  using Copies::row0_;
  using Copies::w_;
  using Copies::x_;
  static constexpr int kParts = kUnits / kXUnits;  // stages of x of a chunk
  static constexpr bool kPlanes = C::kPlanes;
  // Scales of a row of planes in a unit: one for 32 columns, of narrow codes for all 64.
  static constexpr int kScales = kUnitSteps / C::kSpan;

 public:
  BITFOLD_DEVICE explicit Tile(const TileParameter& p)
      : Copies(p),
        lane_(ptx::lane_id()),
        row_warp_(ptx::warp_id() % kRowWarps),
        column_warp_(ptx::warp_id() / kRowWarps),
        scales_unit_(first_ * kUnits + ptx::warp_id() / kRowWarps) {}

  BITFOLD_DEVICE void run() {
    if constexpr (C::kTables > 0) {
      C::fill(p_.planes, memory_ + at_.tables, static_cast<int>(threadIdx.x), kTileThreads);
    }
    ptx::wait_for_earlier();
    ptx::let_later_begin();
    start();
    for (int chunk = first_; chunk < last_; ++chunk) {
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        this->wait();
        ptx::sync_block();
        this->issue(part == 0);
        if (part == 0) open(chunk);
#pragma unroll 1
        for (int q = column_warp_; q < kXUnits; q += kColumnWarps) {
          const int unit = part * kXUnits + q;
          const uint8_t* x = this->x_stage(x_) + q * this->x_unit();
          if constexpr (kPlanes && C::kSpan < kUnitSteps) {
            if (p_.whole_units) multiply<kUnitSteps>(unit, x);
            else multiply<C::kSpan>(unit, x);
          } else {
            multiply<C::kSpan>(unit, x);
          }
        }
        x_.next(p_.shape.x_stages);
      }
      if constexpr (C::kMins > 0) {
        if (chunk % kColumnWarps == column_warp_) subtract_mins();
      }
      w_.next(p_.shape.w_stages);
    }
    TileSums<Tokens>(p_, memory_, group0_).finish([&](float* out) { put_sums(out); });
  }

 private:
  BITFOLD_DEVICE void start() {
    this->start_copies();
    if constexpr (kPlanes) {
      if constexpr (kKeepsPlaces) scale_row_ = find_scale_row();
      load_scales();
    }
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[r][j][i] = 0.0f;
      }
    }
  }

  // ---- scales of planes: those of the warp's next unit are on their way while this one is multiplied ----

  // A lane has those of one of the warp's 32 rows: 8 t + g, which is row 8 i + g of tile r where t = 2 r + i.
  BITFOLD_DEVICE auto find_scale_row() const {
    return C::scale_row(p_.planes, this->real_row(row_warp_ * (kTiles * 16) + 8 * (lane_ % 4) + lane_ / 4));
  }
  // Sums of many tokens leave no registers to keep it.
  BITFOLD_DEVICE auto scale_row() const {
    if constexpr (kKeepsPlaces) return scale_row_;
    else return find_scale_row();
  }
  BITFOLD_DEVICE void load_scales() {
    const auto row = scale_row();
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      if (i > 0 && p_.whole_units) break;
      const uint32_t group = group_of(scales_unit_, i);
      loaded_[i] = C::load_scale(p_.planes, row, group, p_.planes.scale);
      if constexpr (C::kInteger) {
        if (p_.planes.zeros != nullptr) C::load_zero(row.zeros, group, loaded_[i].more, behind_[C::kBits == 3 ? i : 0]);
      }
    }
    scales_unit_ += kColumnWarps;
  }
  // Of a unit's scale i.
  BITFOLD_DEVICE uint32_t group_of(int unit, int i) const {
    return p_.planes.pieces.divide(smaller(static_cast<uint32_t>(2 * unit + i), p_.last_run));
  }
  // This unit's of the rows that the lane multiplies; asks for those of the warp's next unit.
  template <int Count>
  BITFOLD_DEVICE void take_scales(ScaleZero (&scales)[kTiles][2][Count]) {
    ScaleZero mine[Count];
    const float* map = nullptr;
    float offset = 0.0f;
    if constexpr (C::kNested) {
      const NestedScales* nested = C::nested(memory_ + at_.tables);
      map = nested->map;
      if (p_.planes.scale == Scale::Nested) offset = nested->mine();
    }
#pragma unroll
    for (int s = 0; s < Count; ++s) {
      if constexpr (C::kInteger) {
        uint32_t& zero = loaded_[s].more;
        if (p_.planes.zeros != nullptr)
          zero = C::zero_of(zero, behind_[C::kBits == 3 ? s : 0], group_of(scales_unit_ - kColumnWarps, s));
      }
      mine[s] = C::scale_zero(p_.planes, loaded_[s], p_.planes.scale, map, offset);
    }
    load_scales();
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
#pragma unroll
      for (int s = 0; s < Count; ++s) {
        scales[row / 2][row % 2][s] = {ptx::shuffle(mine[s].scale, lane_ / 4 * 4 + row), mine[s].zero};
      }
    }
    if (p_.planes.zeros == nullptr) return;  // all rows have the same
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
#pragma unroll
      for (int s = 0; s < Count; ++s) {
        scales[row / 2][row % 2][s].zero = ptx::shuffle(mine[s].zero, lane_ / 4 * 4 + row);
      }
    }
  }

  // ---- products ----

  BITFOLD_DEVICE Lane lane(int tile, int i) const {
    const int row = 16 * tile + 8 * i;
    Lane lane{};
    lane.bytes = rows_ + row * kStride<C>;
    lane.scales = nullptr;  // those of planes are in registers
    lane.tables = memory_ + at_.tables;
    lane.t = lane_ % 4;
    return lane;
  }
  BITFOLD_DEVICE void open(int chunk) {
    const int first_row = row_warp_ * (kTiles * 16) + lane_ / 4;
    // Rows have an even number of bytes, so that all of a lane's, eight apart, begin at the same place of a piece.
    rows_ = this->w_stage(w_) + first_row * kStride<C> + this->skew(row0_ + first_row, chunk);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        heads_[r][i] = C::head(lane(r, i).bytes);
      }
    }
  }

  // One unit of the warp's rows with all tokens: `x` is its [group][2][lane]. Span: steps that share a scale here.
  template <int Span>
  BITFOLD_DEVICE void multiply(int unit, const uint8_t* x) {
    constexpr int kSpansOfUnit = kUnitSteps / Span;
    uint32_t a[kTiles][kUnitSteps][4];
    float scale[kTiles][kSpansOfUnit][2];
    ScaleZero scales[kTiles][2][kSpansOfUnit];
    if constexpr (kPlanes) take_scales(scales);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Operands<C::kSpan> row;
        if constexpr (kPlanes) {
          C::operands(lane(r, i), unit, scales[r][i][0], scales[r][i][kSpansOfUnit - 1], row);
        } else {
          C::unit(lane(r, i), heads_[r][i], unit, row);
        }
#pragma unroll
        for (int s = 0; s < kUnitSteps; ++s) {
          a[r][s][kLow0 + i] = row.halves[s][0];
          a[r][s][kLow1 + i] = row.halves[s][1];
        }
#pragma unroll
        for (int s = 0; s < kSpansOfUnit; ++s) scale[r][s][i] = row.scales[s];
      }
    }
    const auto* b = reinterpret_cast<const uint4*>(x) + lane_;
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      if (2 * pair >= groups_) break;
#pragma unroll
      for (int j = 2 * pair; j < 2 * pair + 2; ++j) {
        const uint4 b0 = b[64 * j], b1 = b[64 * j + 32];
        const uint32_t steps[kUnitSteps][2] = {{b0.x, b0.y}, {b0.z, b0.w}, {b1.x, b1.y}, {b1.z, b1.w}};
#pragma unroll
        for (int s = 0; s < kUnitSteps; s += Span) {
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            float sum[4];
            ptx::mma_f16_zero(sum, a[r][s], steps[s]);
#pragma unroll
            for (int next = s + 1; next < s + Span; ++next) ptx::mma_f16(sum, a[r][next], steps[next]);
            add_scaled(sums_[r][j], sum, scale[r][s / Span]);
          }
        }
      }
    }
  }
  BITFOLD_DEVICE static void add_scaled(float (&to)[4], const float (&sum)[4], const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = ptx::fma(scale[i / 2], sum[i], to[i]);
  }

  // Minima of the chunk's sub-blocks with the sums of x over them, high and low parts.
  BITFOLD_DEVICE void subtract_mins() {
    if constexpr (C::kMins > 0) {
      uint32_t a[kTiles][4];
      float scale[kTiles][2];
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t mins[2];
          scale[r][i] = C::mins(lane(r, i), heads_[r][i], mins);
          a[r][kLow0 + i] = mins[0];
          a[r][kLow1 + i] = mins[1];
        }
      }
      const uint8_t* b = this->sums_stage(w_) + lane_ * C::kMins;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups_) break;
        uint32_t high[2], low[2];
        if constexpr (C::kMins == 8) {
          const uint2 both = *reinterpret_cast<const uint2*>(b + j * kSumBytes<C>);
          high[0] = both.x, high[1] = both.y;
        } else {
          const uint4 both = *reinterpret_cast<const uint4*>(b + j * kSumBytes<C>);
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
  }

  // The warps that share rows add theirs up in turn. Who this is, is asked again: nothing is kept for it.
  BITFOLD_DEVICE void put_sums(float* out) const {
    for (int turn = 0; turn < kColumnWarps; ++turn) {
      if (turn == ptx::warp_id() / kRowWarps) put_mine(out, turn > 0);
      ptx::sync_block();
    }
  }
  BITFOLD_DEVICE void put_mine(float* out, bool add) const {
    const int lane = ptx::lane_id(), row_warp = ptx::warp_id() % kRowWarps;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + lane % 4 * 2 + i % 2;
          const int row = 16 * (row_warp * kTiles + r) + lane / 4 + 8 * (i / 2);
          float& place = out[token * kOutStride + row];
          place = add ? ptx::add(place, sums_[r][j][i]) : sums_[r][j][i];
        }
      }
    }
  }

  const int lane_, row_warp_, column_warp_;
  // Of the chunk at hand: the lane's first row.
  const uint8_t* rows_;
  typename C::Head heads_[kTiles][2];
  float sums_[kTiles][kGroups][4];
  // Of planes: scales of the warp's next unit, and which comes after it.
  LoadedScaleZero loaded_[kScales];
  uint32_t behind_[kScales];  // of zero points of three bits: the byte behind
  int scales_unit_;
  typename ScaleRowOf<C>::Type scale_row_;
};

// Few tokens and more: a kernel each, with the code that a GPU is best at; on Hopper "few" are those of blocks of 640
// threads, at most 64. Either may begin before `arrange` has ended, and wgmma's copies of W, which isn't arrange's to
// write, do (as those for few tokens on Hopper).
template <int Row>
__global__ void __launch_bounds__(kWgmma ? kFewThreads : kTileThreads, kWgmma ? 1 : 2)
    linear_tile_kernel(const TileParameter p) {
  static_assert(kFewThreads == kWgmmaThreads<1>);
  if (wgmma_where(p.shape.few || p.shape.wgmma)) {
    if (p.shape.few) linear_few<Row>(p);
    else linear_wgmma<Row, 1>(p);
  } else {
    Tile<Row, kFewTokens>(p).run();
  }
}
template <int Row>
__global__ void __launch_bounds__(kWgmma ? kWgmmaThreads<2> : kTileThreads, 1)
    linear_many_kernel(const TileParameter p) {
  if (wgmma_where(p.shape.wgmma)) linear_wgmma<Row, 2>(p);
  else Tile<Row, kManyTokens>(p).run();
}

}  // namespace

template <>
ChunkSize tile_chunk<BITFOLD_PART>() {
  return chunk_size<Chunk<BITFOLD_PART>>();
}
template <>
FewSize few_size<BITFOLD_PART>() {
  return few_size_of<BITFOLD_PART>();
}
template <>
const Order& tile_order<BITFOLD_PART>() {
  static constexpr Order kOrder = order_of<BITFOLD_PART>();
  return kOrder;
}
template <>
bool tile_in_words<BITFOLD_PART>(const Weight& w) {
  constexpr int kAlign = Chunk<BITFOLD_PART>::kAlign;
  const int64_t row_bytes = tile_row_bytes(w);
  return reinterpret_cast<uintptr_t>(w.codes) % 16 == 0 && row_bytes % larger(kAlign, 2) == 0;
}
template <>
PlaneMatrix tile_planes<BITFOLD_PART>(const Weight& w) {
  if constexpr (Chunk<BITFOLD_PART>::kPlanes) return plane_matrix(w, 32);
  else return {};
}
template <>
void tile_launch<BITFOLD_PART>(const TileParameter& p, Stream stream) {
  const bool few = p.shape.few || p.shape.tokens == kFewTokens || (p.shape.wgmma && p.shape.tokens == kQuarter);
  launch({.grid = {static_cast<unsigned>(p.shape.row_blocks), static_cast<unsigned>(p.shape.splits),
                   static_cast<unsigned>(p.shape.token_blocks)},
          .block = !p.shape.wgmma && !p.shape.few ? kTileThreads
                   : few                          ? kFewThreads
                                                  : kWgmmaThreads<2>,
          .shared_bytes = p.shape.shared_bytes,
          .name = few ? "linear_tile" : "linear_many",
          .stream = stream,
          .early = gpu().early},
         few ? linear_tile_kernel<BITFOLD_PART> : linear_many_kernel<BITFOLD_PART>, p);
}

}  // namespace bitfold::cuda
