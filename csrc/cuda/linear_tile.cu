// y = x W^T + b for 9 to 128 tokens: W is read once, and every weight of it decoded once in each block of threads.
//
// W is the A operand, 16 rows at a time, and x is B, 8 tokens at a time, so that a weight meets all tokens of the block
// while it is in registers. Packed bytes come to shared memory as they lie in memory, chunk by chunk, several chunks
// ahead; so does x, which arrange has put into the order in which codes come out of those bytes. A warp decodes 64
// columns of 32 rows (a unit), multiplies them with all tokens in fresh sums, and adds these, scaled, to its own.
// Everything is added in an order that the shape alone determines.
#include "cuda/chunk_blocks.hpp"
#include "cuda/chunk_planes.hpp"
#include "cuda/tile.hpp"

namespace bitfold::cuda {
namespace {

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

template <class C>
BITFOLD_HOST_DEVICE constexpr ChunkSize chunk_size() {
  const int row_scales = C::kPlanes ? C::kColumns / 32 * static_cast<int>(sizeof(ScaleZero)) : 0;
  return {C::kColumns, kStride<C>, kSumBytes<C>, row_scales, C::kTables};
}

struct alignas(1024) Bytes {
  uint8_t bytes[1024];
};

// Slots that are filled and emptied in turn.
struct Ring {
  int slot = 0;
  BITFOLD_DEVICE void next(int slots) { slot = slot + 1 == slots ? 0 : slot + 1; }
};

template <int Row, int Tokens>
class Tile {
  using C = Chunk<Row>;
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kUnits = C::kColumns / kUnit;
  static constexpr int kXUnits = tile_x_units(Tokens, kUnits);
  static constexpr int kParts = kUnits / kXUnits;  // stages of x of a chunk
  static constexpr int kXUnit = kGroups * kUnitBytes;
  static constexpr bool kPlanes = C::kPlanes;
  static constexpr int kUnrolled = Tokens == kFewTokens ? 2 : 1;  // copies: the sums leave them few registers
  static constexpr int kSpans = C::kColumns / 32;                 // scales of a row of planes

 public:
  BITFOLD_DEVICE explicit Tile(const TileParameter& p)
      : p_(p),
        at_(tile_places(chunk_size<C>(), Tokens, p.shape.x_stages, p.shape.w_stages)),
        memory_(shared<Bytes>().bytes),
        lane_(ptx::lane_id()),
        row_warp_(ptx::warp_id() % kRowWarps),
        column_warp_(ptx::warp_id() / kRowWarps),
        row0_(int64_t{blockIdx.x} * kTileRows),
        group0_(static_cast<int>(blockIdx.z) * kGroups),
        groups_(smaller(kGroups, p.groups - group0_)),
        first_(static_cast<int>(int64_t{p.chunks} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{p.chunks} * (blockIdx.y + 1) / p.shape.splits)) {}

  BITFOLD_DEVICE void run() {
    if constexpr (C::kTables > 0) {
      C::fill(p_.planes.row, memory_ + at_.tables, static_cast<int>(threadIdx.x), kTileThreads);
    }
    start();
    for (int chunk = first_; chunk < last_; ++chunk) {
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        wait();
        ptx::sync_block();
        issue(part == 0);
        if (part == 0) open(chunk);
#pragma unroll 1
        for (int q = column_warp_; q < kXUnits; q += kColumnWarps)
          multiply(part * kXUnits + q, x_stage(x_) + q * kXUnit);
        x_.next(p_.shape.x_stages);
      }
      if constexpr (C::kMins > 0) {
        if (chunk % kColumnWarps == column_warp_) subtract_mins();
      }
      if constexpr (kPlanes) store_scales(chunk + 1);
      w_.next(p_.shape.w_stages);
    }
    finish();
  }

 private:
  // ---- copies ----

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
  }
  // All rows are there, and no piece reaches beyond one: pieces of all rows in turn, kTileThreads at a time.
  BITFOLD_DEVICE void copy_whole() const {
    constexpr int kRowStep = kTileThreads / kPieces<C>, kPieceStep = kTileThreads % kPieces<C>;
    const auto thread = static_cast<int>(threadIdx.x);
    const int row = thread / kPieces<C>;
    int piece = thread % kPieces<C>;
    const uint8_t* from = p_.codes + (row0_ + row) * p_.row_bytes + int64_t{next_chunk_} * C::kBytes;
    uint8_t* to = w_stage(next_w_) + row * kStride<C> + 16 * piece;
#pragma unroll(kUnrolled)
    for (int i = 0; i < kTileRows * kPieces<C>; i += kTileThreads) {
      if (i + kTileThreads <= kTileRows * kPieces<C> || i + thread < kTileRows * kPieces<C>) {
        const int within = kSkewed<C> ? static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15) : 0;
        ptx::cp_async<16>(to, from - within + 16 * piece);
      }
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

  // The next units of x.
  BITFOLD_DEVICE void copy_x() {
    constexpr int kEach = kXUnit / 16;
    if (next_unit_ >= last_ * kUnits) return;
    const uint8_t* from = p_.x + (int64_t{next_unit_} * p_.groups + group0_) * kUnitBytes;
#pragma unroll(kUnrolled)
    for (int i = 0; i < kXUnits * kEach; i += kTileThreads) {
      const int piece = i + static_cast<int>(threadIdx.x), unit = piece / kEach, within = piece % kEach;
      if (within < groups_ * (kUnitBytes / 16) && piece < kXUnits * kEach) {
        ptx::cp_async<16>(x_stage(next_x_) + 16 * piece, from + unit * p_.groups * kUnitBytes + 16 * within);
      }
    }
    next_x_.next(p_.shape.x_stages);
    next_unit_ += kXUnits;
  }

  // Stages 0 ... x_stages - 2 of x are a group of copies each, and those of W are distributed over them.
  BITFOLD_DEVICE void start() {
    next_chunk_ = first_;
    next_unit_ = first_ * kUnits;
    int chunks = p_.shape.w_stages - 1;
    for (int groups = p_.shape.x_stages - 1; groups > 0; --groups) {
      for (int now = groups == 1 ? chunks : smaller(chunks, 1); now > 0; --now, --chunks) copy_w();
      copy_x();
      ptx::cp_async_commit();
    }
    if constexpr (kPlanes) {
      load_scales(first_);
      store_scales(first_);
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

  // ---- scales of planes: made floats once for each row and 32 columns, while the chunk before is multiplied ----

  // A thread has half of a row's.
  static constexpr int kScales = kSpans / 2;
  static_assert(kTileThreads == 2 * kTileRows);
  BITFOLD_DEVICE ScaleZero* scales_of(int chunk) const {
    return reinterpret_cast<ScaleZero*>(memory_ + at_.scales) + (chunk - first_) % 2 * (kTileRows * kSpans);
  }
  BITFOLD_DEVICE void load_scales(int chunk) {
    if (chunk >= last_) return;
    const uint32_t first = static_cast<uint32_t>(chunk) * kSpans + threadIdx.x % 2 * kScales;
    const auto end = static_cast<uint32_t>((p_.k - 1) / 32);
    const auto row = C::scale_row(p_.planes, real_row(static_cast<int>(threadIdx.x) / 2));
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      if (i > 0 && p_.wide_groups) loaded_[i] = loaded_[0];
      else loaded_[i] = C::load_scale(p_.planes, row, p_.planes.pieces.divide(smaller(first + i, end)));
    }
  }
  BITFOLD_DEVICE void store_scales(int chunk) const {
    if (chunk >= last_) return;
    ScaleZero* to = scales_of(chunk) + static_cast<int>(threadIdx.x) * kScales;
#pragma unroll
    for (int i = 0; i < kScales; ++i) to[i] = C::scale_zero(p_.planes, loaded_[i]);
  }

  // ---- products ----

  BITFOLD_DEVICE Lane lane(int tile, int i) const {
    const int row = 16 * tile + 8 * i;
    Lane lane{};
    lane.bytes = rows_ + row * kStride<C>;
    lane.scales = kPlanes ? scales_ + row * kSpans : nullptr;
    lane.tables = memory_ + at_.tables;
    lane.t = lane_ % 4;
    return lane;
  }
  BITFOLD_DEVICE void open(int chunk) {
    const int first_row = row_warp_ * (kTiles * 16) + lane_ / 4;
    // Rows have an even number of bytes, so that all of a lane's, eight apart, begin at the same place of a piece.
    rows_ = w_stage(w_) + first_row * kStride<C> + skew(row0_ + first_row, chunk);
    if constexpr (kPlanes) {
      scales_ = scales_of(chunk) + first_row * kSpans;
      load_scales(chunk + 1);
    }
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        heads_[r][i] = C::head(lane(r, i).bytes);
      }
    }
  }

  // One unit of the warp's rows with all tokens: `x` is its [group][2][lane].
  BITFOLD_DEVICE void multiply(int unit, const uint8_t* x) {
    constexpr int kSpan = C::kSpan, kSpansOfUnit = kUnitSteps / kSpan;
    uint32_t a[kTiles][kUnitSteps][4];
    float scale[kTiles][kSpansOfUnit][2];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Operands<kSpan> row;
        C::unit(lane(r, i), heads_[r][i], unit, row);
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
        for (int s = 0; s < kUnitSteps; s += kSpan) {
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            float sum[4];
            ptx::mma_f16_zero(sum, a[r][s], steps[s]);
#pragma unroll
            for (int next = s + 1; next < s + kSpan; ++next) ptx::mma_f16(sum, a[r][next], steps[next]);
            add_scaled(sums_[r][j], sum, scale[r][s / kSpan]);
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
      const uint8_t* b = sums_stage(w_) + lane_ * C::kMins;
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

  // ---- the way out ----

  BITFOLD_DEVICE void finish() {
    auto* out = reinterpret_cast<float*>(memory_);
    ptx::sync_block();  // all copies have arrived, and all stages were looked at
    for (int turn = 0; turn < kColumnWarps; ++turn) {
      if (turn == column_warp_) put_sums(out, turn > 0);
      ptx::sync_block();
    }
    constexpr int kQuads = kTileRows / 4;
    const int count = static_cast<int>(smaller<int64_t>(Tokens, p_.m - int64_t{group0_} * 8)) * kQuads;
    const auto sums = [&](int i) { return reinterpret_cast<const float4*>(out + i / kQuads * kOutStride)[i % kQuads]; };
    if (p_.shape.splits == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads)
        put(sums(i), i / kQuads, i % kQuads * 4);
      return;
    }
    constexpr int kSize = Tokens * kTileRows;
    const auto block = static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x);
    float* partial = p_.partial + int64_t{block} * p_.shape.splits * kSize;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      reinterpret_cast<float4*>(partial + int64_t{blockIdx.y} * kSize)[i] = sums(i);
    }
    ptx::fence();
    ptx::sync_block();  // all sums are written before the block counts, and nobody looks at `out` any more
    auto& arrived = *reinterpret_cast<uint32_t*>(memory_);
    if (threadIdx.x == 0) arrived = ptx::atomic_add(p_.arrivals + block, 1u);
    ptx::sync_block();
    if (arrived != static_cast<uint32_t>(p_.shape.splits) - 1) return;
    ptx::fence();
    // The last to come adds all of them, in their order.
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      float4 sum = ptx::load_written16(partial + i * 4);
      for (int s = 1; s < p_.shape.splits; ++s) {
        const float4 more = ptx::load_written16(partial + int64_t{s} * kSize + i * 4);
        sum.x = ptx::add(sum.x, more.x), sum.y = ptx::add(sum.y, more.y);
        sum.z = ptx::add(sum.z, more.z), sum.w = ptx::add(sum.w, more.w);
      }
      put(sum, i / kQuads, i % kQuads * 4);
    }
  }

  BITFOLD_DEVICE void put_sums(float* out, bool add) const {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + lane_ % 4 * 2 + i % 2;
          const int row = 16 * (row_warp_ * kTiles + r) + lane_ / 4 + 8 * (i / 2);
          float& place = out[token * kOutStride + row];
          place = add ? ptx::add(place, sums_[r][j][i]) : sums_[r][j][i];
        }
      }
    }
  }

  // Four rows of W and one token.
  BITFOLD_DEVICE void put(const float4& sum, int block_token, int block_row) const {
    const int64_t token = int64_t{group0_} * 8 + block_token, row = row0_ + block_row;
    const float factor = p_.factors[token];
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    const auto* bias = static_cast<const uint16_t*>(p_.bias);
    uint16_t* y = static_cast<uint16_t*>(p_.y) + token * p_.n + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i >= p_.n) return;
      // Twice, and the rest of the power of two: neither overflows where the result doesn't.
      float value = ptx::mul(ptx::add(sums[i], sums[i]), factor);
      const bool half = p_.dtype == DType::F16;
      if (bias != nullptr) {
        const uint16_t bits = ptx::load2(bias + row + i);
        value = ptx::add(value, half ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits));
      }
      y[i] = half ? ptx::float_to_half(value) : ptx::float_to_bf16(value);
    }
  }

  const TileParameter& p_;
  const TilePlaces at_;
  uint8_t* const memory_;
  const int lane_, row_warp_, column_warp_;
  const int64_t row0_;
  const int group0_, groups_;  // of 8 tokens
  const int first_, last_;     // chunks
  Ring w_, x_, next_w_, next_x_;
  int next_chunk_, next_unit_;
  // Of the chunk at hand: the lane's first row.
  const uint8_t* rows_;
  const ScaleZero* scales_;
  typename C::Head heads_[kTiles][2];
  float sums_[kTiles][kGroups][4];
  LoadedScaleZero loaded_[kScales];
};

template <int Row, int Tokens>
__global__ void __launch_bounds__(kTileThreads, Tokens == kFewTokens ? 2 : 1)
    linear_tile_kernel(const TileParameter p) {
  Tile<Row, Tokens>(p).run();
}

template <int Row, int Tokens>
void launch_tile(const TileParameter& p, Stream stream) {
  launch({.grid = {static_cast<unsigned>(p.shape.row_blocks), static_cast<unsigned>(p.shape.splits),
                   static_cast<unsigned>(p.shape.token_blocks)},
          .block = kTileThreads,
          .shared_bytes = p.shape.shared_bytes,
          .name = "linear_tile",
          .stream = stream},
         linear_tile_kernel<Row, Tokens>, p);
}

}  // namespace

template <>
ChunkSize tile_chunk<BITFOLD_PART>() {
  return chunk_size<Chunk<BITFOLD_PART>>();
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
  if (p.shape.tokens == kFewTokens) return launch_tile<BITFOLD_PART, kFewTokens>(p, stream);
  return launch_tile<BITFOLD_PART, kManyTokens>(p, stream);
}

}  // namespace bitfold::cuda
