// y = x W^T + b for 9 to 128 tokens: W is read once, and every weight of it decoded once in each block of threads.
//
// W is the A operand, 16 rows at a time, and x is B, 8 tokens at a time, so that a weight meets all tokens of the block
// while it is in registers. Packed bytes come to shared memory as they lie in memory, chunk by chunk, several chunks
// ahead; so does x, which arrange has put into the order in which codes come out of those bytes. A warp decodes 64
// columns of 32 rows (a unit), multiplies them with all tokens in fresh sums, and adds these, scaled, to its own.
// Everything is added in an order that the shape alone determines.
#include "cuda/chunk_planes.hpp"
#include "cuda/fragments_blocks.hpp"
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

template <int Row, int Tokens>
class Tile {
  using C = Chunk<Row>;
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kUnits = C::kColumns / kUnit;
  static constexpr int kXUnit = kGroups * kUnitBytes;
  static constexpr bool kPlanes = C::kPlanes;
  static constexpr int kSpans = C::kColumns / 32;  // scales of a row of planes

 public:
  BITFOLD_DEVICE explicit Tile(const TileParameter& p)
      : p_(p),
        at_(tile_places(chunk_size<C>(), p.shape)),
        memory_(shared<Bytes>().bytes),
        lane_(ptx::lane_id()),
        row_warp_(ptx::warp_id() % p.shape.row_warps),
        k_warp_(ptx::warp_id() / p.shape.row_warps),
        row0_(int64_t{static_cast<int>(blockIdx.x)} * p.shape.rows()),
        group0_(static_cast<int>(blockIdx.z) * kGroups),
        groups_(smaller(kGroups, p.groups - group0_)),
        first_(static_cast<int>(int64_t{p.chunks} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{p.chunks} * (blockIdx.y + 1) / p.shape.splits)) {}

  BITFOLD_DEVICE void run() {
    fill_tables();
    clear_sums();
    const int parts = kUnits / p_.shape.x_units, total = (last_ - first_) * parts;
    start(total);
    for (int i = 0; i < total; ++i) {
      const int chunk = first_ + i / parts, part = i % parts;
      wait();
      ptx::sync_block();
      issue(i, parts, total);
      if (part == 0) open(chunk);
      if constexpr (kPlanes) {
        if (part == 0) load_scales(chunk + 1);
      }
      for (int q = k_warp_; q < p_.shape.x_units; q += p_.shape.k_warps) {
        const int unit = part * p_.shape.x_units + q;
        if (unit * kUnit < columns_) multiply(unit, x_stage(i) + q * kXUnit);
      }
      if (C::kMins > 0 && part == 0 && chunk % p_.shape.k_warps == k_warp_) subtract_mins(chunk);
      if constexpr (kPlanes) {
        if (part == parts - 1) store_scales(chunk + 1);
      }
    }
    finish();
  }

 private:
  // ---- copies ----

  BITFOLD_DEVICE uint8_t* w_stage(int chunk) const {
    return memory_ + at_.w + (chunk - first_) % p_.shape.w_stages * (p_.shape.rows() * kStride<C>);
  }
  BITFOLD_DEVICE uint8_t* sums_stage(int chunk) const {
    return memory_ + at_.sums + (chunk - first_) % p_.shape.w_stages * (kGroups * kSumBytes<C>);
  }
  BITFOLD_DEVICE uint8_t* x_stage(int i) const {
    return memory_ + at_.x + i % p_.shape.x_stages * (p_.shape.x_units * kXUnit);
  }

  // Where in its first piece a row's chunk begins.
  BITFOLD_DEVICE int skew(int64_t row, int chunk) const {
    if (!kSkewed<C> || !p_.in_words) return 0;
    return static_cast<int>((row * p_.row_bytes + int64_t{chunk} * C::kBytes) & 15);
  }
  BITFOLD_DEVICE int64_t real_row(int row) const { return smaller<int64_t>(row0_ + row, p_.n - 1); }

  BITFOLD_DEVICE void copy_w(int chunk) const {
    const int64_t begin = int64_t{chunk} * C::kBytes;
    // What lies beyond the row's end becomes zero.
    const int length = static_cast<int>(smaller<int64_t>(C::kBytes, p_.row_bytes - begin));
    uint8_t* to = w_stage(chunk);
    for (int i = static_cast<int>(threadIdx.x); i < p_.shape.rows() * kPieces<C>; i += kTileThreads) {
      const int row = i / kPieces<C>, piece = i % kPieces<C>;
      const int64_t from = real_row(row) * p_.row_bytes + begin;
      uint8_t* place = to + row * kStride<C> + 16 * piece;
      if (p_.in_words) {
        const int within = skew(real_row(row), chunk), bytes = within + length - 16 * piece;
        if (kSkewed<C> && 16 * piece >= within + C::kBytes) continue;
        ptx::cp_async<16>(place, p_.codes + (bytes > 0 ? from - within + 16 * piece : 0),
                          larger(smaller(bytes, 16), 0));
      } else {
        for (int b = 0; b < 16; ++b) {
          place[b] = 16 * piece + b < length ? ptx::load1(p_.codes + from + 16 * piece + b) : uint8_t{0};
        }
      }
    }
    if constexpr (C::kMins > 0) {
      const uint8_t* sums = p_.sums + (int64_t{chunk} * p_.groups + group0_) * kSumBytes<C>;
      for (int i = static_cast<int>(threadIdx.x); i < groups_ * (kSumBytes<C> / 16); i += kTileThreads) {
        ptx::cp_async<16>(sums_stage(chunk) + 16 * i, sums + 16 * i);
      }
    }
  }

  BITFOLD_DEVICE void copy_x(int i) const {
    const int64_t unit = int64_t{first_} * kUnits + int64_t{i} * p_.shape.x_units;
    for (int q = 0; q < p_.shape.x_units; ++q) {
      const uint8_t* from = p_.x + ((unit + q) * p_.groups + group0_) * kUnitBytes;
      uint8_t* to = x_stage(i) + q * kXUnit;
      for (int j = static_cast<int>(threadIdx.x); j < groups_ * (kUnitBytes / 16); j += kTileThreads) {
        ptx::cp_async<16>(to + 16 * j, from + 16 * j);
      }
    }
  }

  // Stages 0 ... x_stages - 2 of x are a group of copies each, and those of W are distributed over them.
  BITFOLD_DEVICE void start(int total) {
    const int groups = p_.shape.x_stages - 1, chunks = p_.shape.w_stages - 1;
    for (int j = 0; j < groups; ++j) {
      const int end = j == groups - 1 ? chunks : smaller(j + 1, chunks);
      for (int c = j; c < end; ++c) {
        if (c < last_ - first_) copy_w(first_ + c);
      }
      if (j < total) copy_x(j);
      ptx::cp_async_commit();
    }
    if constexpr (kPlanes) {
      load_scales(first_);
      store_scales(first_);
    }
  }
  // What iteration i lets come while it multiplies; its group is the newest.
  BITFOLD_DEVICE void issue(int i, int parts, int total) const {
    const int chunk = first_ + i / parts + p_.shape.w_stages - 1;
    if (i % parts == 0 && chunk < last_) copy_w(chunk);
    if (i + p_.shape.x_stages - 1 < total) copy_x(i + p_.shape.x_stages - 1);
    ptx::cp_async_commit();
  }
  BITFOLD_DEVICE void wait() const {
    switch (p_.shape.x_stages) {
      case 2: return ptx::cp_async_wait<0>();
      case 3: return ptx::cp_async_wait<1>();
      default: return ptx::cp_async_wait<2>();
    }
  }

  // ---- scales of planes: made floats once for each row and 32 columns ----

  static constexpr int kScales = kTileWarps / 2 * kTiles * 16 * kSpans / kTileThreads;  // of a thread, at most
  BITFOLD_DEVICE ScaleZero* scales_of(int chunk) const {
    return reinterpret_cast<ScaleZero*>(memory_ + at_.scales) + (chunk - first_) % 2 * (p_.shape.rows() * kSpans);
  }
  template <class Each>
  BITFOLD_DEVICE void for_scales(int chunk, Each&& each) {
    if (chunk >= last_) return;
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int entry = static_cast<int>(threadIdx.x) + i * kTileThreads;
      if (entry < p_.shape.rows() * kSpans) each(i, entry);
    }
  }
  BITFOLD_DEVICE void load_scales(int chunk) {
    for_scales(chunk, [&](int i, int entry) {
      const int64_t column = int64_t{chunk} * C::kColumns + entry % kSpans * 32;
      loaded_[i] = C::load_scale(p_.planes, real_row(entry / kSpans), smaller(column, p_.k - 1));
    });
  }
  BITFOLD_DEVICE void store_scales(int chunk) {
    for_scales(chunk, [&](int i, int entry) { scales_of(chunk)[entry] = C::scale_zero(p_.planes, loaded_[i]); });
  }

  // ---- products ----

  BITFOLD_DEVICE void fill_tables() {
    if constexpr (C::kTables > 0) {
      C::fill(memory_ + at_.tables, static_cast<int>(threadIdx.x), kTileThreads);
      ptx::sync_block();
    }
  }
  BITFOLD_DEVICE void clear_sums() {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[r][j][i] = 0.0f;
      }
    }
  }

  BITFOLD_DEVICE Lane lane(int tile, int i) const {
    const int row = 16 * (row_warp_ * kTiles + tile) + 8 * i + lane_ / 4;
    Lane lane{};
    lane.bytes = chunk_bytes_ + row * kStride<C> + skew(real_row(row), chunk_);
    lane.scales = kPlanes ? scales_of(chunk_) + row * kSpans : nullptr;
    lane.tables = memory_ + at_.tables;
    lane.t = lane_ % 4;
    return lane;
  }
  BITFOLD_DEVICE void open(int chunk) {
    chunk_ = chunk;
    chunk_bytes_ = w_stage(chunk);
    columns_ = static_cast<int>(smaller<int64_t>(C::kColumns, p_.k - int64_t{chunk} * C::kColumns));
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) heads_[r][i] = C::head(lane(r, i).bytes);
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
  BITFOLD_DEVICE void subtract_mins(int chunk) {
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
      const uint8_t* b = sums_stage(chunk) + lane_ * (C::kMins);
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
    const int stride = tile_out_stride(p_.shape), rows = p_.shape.rows();
    auto* out = reinterpret_cast<float*>(memory_);
    ptx::cp_async_wait<0>();
    ptx::sync_block();
    for (int turn = 0; turn < p_.shape.k_warps; ++turn) {
      if (turn == k_warp_) put_sums(out, stride, turn > 0);
      ptx::sync_block();
    }
    const int tokens = static_cast<int>(smaller<int64_t>(Tokens, p_.m - int64_t{group0_} * 8));
    const int quads = rows / 4, count = tokens * quads;
    if (p_.shape.splits == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
        const float4 sum = *reinterpret_cast<const float4*>(out + i / quads * stride + i % quads * 4);
        put(sum, i / quads, i % quads * 4);
      }
      return;
    }
    const int block = static_cast<int>(blockIdx.z) * p_.shape.row_blocks + static_cast<int>(blockIdx.x);
    const int64_t size = int64_t{Tokens} * rows;
    float* partial = p_.partial + block * p_.shape.splits * size;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      const float4 sum = *reinterpret_cast<const float4*>(out + i / quads * stride + i % quads * 4);
      *reinterpret_cast<float4*>(partial + blockIdx.y * size + i * 4) = sum;
    }
    ptx::fence();
    ptx::sync_block();  // nobody looks at `out` any more
    auto& arrived = *reinterpret_cast<uint32_t*>(memory_);
    if (threadIdx.x == 0) arrived = ptx::atomic_add(p_.arrivals + block, 1u);
    ptx::sync_block();
    if (arrived != static_cast<uint32_t>(p_.shape.splits) - 1) return;
    ptx::fence();
    // The last to come adds all of them, in their order.
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      float4 sum = ptx::load_written16(partial + i * 4);
      for (int s = 1; s < p_.shape.splits; ++s) {
        const float4 more = ptx::load_written16(partial + s * size + i * 4);
        sum.x = ptx::add(sum.x, more.x), sum.y = ptx::add(sum.y, more.y);
        sum.z = ptx::add(sum.z, more.z), sum.w = ptx::add(sum.w, more.w);
      }
      put(sum, i / quads, i % quads * 4);
    }
  }

  BITFOLD_DEVICE void put_sums(float* out, int stride, bool add) const {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + lane_ % 4 * 2 + i % 2;
          const int row = 16 * (row_warp_ * kTiles + r) + lane_ / 4 + 8 * (i / 2);
          float& place = out[token * stride + row];
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
  TilePlaces at_;
  uint8_t* memory_;
  int lane_, row_warp_, k_warp_;
  int64_t row0_;
  int group0_, groups_;  // of 8 tokens
  int first_, last_;     // chunks
  int chunk_, columns_;
  const uint8_t* chunk_bytes_;
  typename C::Head heads_[kTiles][2];
  float sums_[kTiles][kGroups][4];
  LoadedScaleZero loaded_[kPlanes ? kScales : 1];
};

template <int Row, int Tokens>
__global__ void __launch_bounds__(kTileThreads, Tokens <= 32 ? 2 : 1) linear_tile_kernel(const TileParameter p) {
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
  return reinterpret_cast<uintptr_t>(w.codes) % 16 == 0 && row_bytes % kAlign == 0;
}
template <>
PlaneMatrix tile_planes<BITFOLD_PART>(const Weight& w) {
  if constexpr (Chunk<BITFOLD_PART>::kPlanes) return plane_matrix<BITFOLD_PART>(w, 32);
  else return {};
}
template <>
void tile_launch<BITFOLD_PART>(const TileParameter& p, Stream stream) {
  switch (p.shape.tokens) {
    case 16: return launch_tile<BITFOLD_PART, 16>(p, stream);
    case 32: return launch_tile<BITFOLD_PART, 32>(p, stream);
    case 64: return launch_tile<BITFOLD_PART, 64>(p, stream);
    default: return launch_tile<BITFOLD_PART, 128>(p, stream);
  }
}

}  // namespace bitfold::cuda
