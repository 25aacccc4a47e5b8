// y[m, n] = x[m, k] W^T + bias for m <= 8: what decides is how fast W is read.
//
// A block of 16 warps is at home on a multiprocessor and takes tiles of 16 or 32 rows of W in turn. Its warps share the
// columns of a tile: warp w has the pieces w, w + 16, ... of each row, so that together they read rows from end to end.
// Codes go from global memory into registers, kDepth pieces ahead, and from there as fragments into mma with W as the
// 16 rows and x, which lies in shared memory, as the 8 columns: all m <= 8 cost the same, and a token's bits don't
// depend on the others. The warps' sums meet in shared memory in the order of warps, while the next tile is on its way.
// Where x of 8 tokens is larger than shared memory, k is cut into slices (by n, k and GPU alone), whose sums are added
// in order.
//
// Compiled once for each format, and once for what its kernels don't fit (BITFOLD_PART).
#include "cuda/fragments_chunks.hpp"
#include "cuda/fragments_ragged.hpp"
#include "cuda/linear_rows.hpp"
#include "cuda/tokens.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarp * kWarps;
// Tiles whose sums wait in shared memory for the other slices; slices of x that may all be there at once.
constexpr int kRound = 8;
constexpr int kSlices = 16;

template <class Source>
struct Args {
  typename Source::Matrix w;
  TokensArgs x;
  const uint16_t* bias;  // may be null
  uint16_t* y;
  int64_t n;
  int pieces;
  int slice;  // pieces
  int slices;
  bool resident;  // x of all slices is staged once
};

// Pieces in flight for a warp: some 2 KB, so that 16 warps have 32 KB on the way while they compute, in the registers
// that there are.
template <class Source, int R>
constexpr int kDepth = Source::kRoom > 0                    ? 2
                       : Source::kLaneBytes * R >= 32       ? 2
                       : Source::kLaneBytes >= 16 || R == 2 ? 3
                                                            : 4;

// R: tiles of 16 rows that a warp multiplies with each fragment of x.
template <class Source, int R>
struct Memory {
  typename Source::Tables tables;
  float4 partial[kWarps][R][kWarp];
  float sums[kRound][kTokens * 16 * R];
  TokenScales scales[kSlices];
  alignas(16) std::byte rooms[kWarps][kDepth<Source, R>][R][larger(Source::kRoom, 1)];
};

// The units of a block: for each round of tiles each slice, and in it each tile of the round.
struct Unit {
  int tile, slice, round_begin;

  BITFOLD_DEVICE bool next(int tiles, int slices) {
    const int round_end = smaller(round_begin + kRound, tiles);
    if (++tile < round_end) return true;
    tile = round_begin;
    if (++slice < slices) return true;
    slice = 0;
    tile = round_begin = round_end;
    return tile < tiles;
  }
};

template <class Source, int R>
struct Feed {
  static constexpr int kAhead = kDepth<Source, R>;
  Source source[R];
  typename Source::Slot slots[kAhead][R];
  std::byte (*rooms)[R][larger(Source::kRoom, 1)];   // of this warp
  int begin, end;                                    // pieces of the unit
  const int warp = ptx::shuffle(ptx::warp_id(), 0);  // which tells the compiler that all lanes have the same

  template <Manner M>
  BITFOLD_DEVICE void fetch(int d, int piece) {
#pragma unroll
    for (int r = 0; r < R; ++r) source[r].template fetch<M>(slots[d][r], piece, rooms[d][r]);
  }
  // After each place of a piece, whether there is one or not: so there are always kAhead - 1 groups behind a slot's.
  BITFOLD_DEVICE void commit() {
    if constexpr (Source::kRoom > 0) ptx::cp_async_commit();
  }

  BITFOLD_DEVICE void start(const Args<Source>& args, const typename Source::Tables& tables, const Unit& unit) {
    const int64_t row = (blockIdx.x + int64_t{unit.tile} * gridDim.x) * (16 * R);
#pragma unroll
    for (int r = 0; r < R; ++r) source[r] = Source(args.w, row + 16 * r, tables);
    begin = unit.slice * args.slice;
    end = smaller(begin + args.slice, args.pieces);
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      const int piece = begin + warp + d * kWarps;
      if (piece < end) fetch<Manner::Any>(d, piece);
      commit();
    }
  }

  // One piece of R tiles with all tokens. x: this lane's 16 bytes of the piece's first pair.
  template <Manner M>
  BITFOLD_DEVICE void product(int d, int piece, const uint4* x, int odd, const uint32_t* mins, float (&total)[R][4]) {
    constexpr int kSectionSteps = Source::kSteps / Source::kSections;
    float part[R][4];
    if constexpr (Source::kRoom > 0) {
      ptx::cp_async_wait<kAhead - 1>();
      ptx::sync_warp();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) source[r].template open<M>(slots[d][r], piece, rooms[d][r]);
    uint4 quad{};
#pragma unroll
    for (int step = 0; step < Source::kSteps; ++step) {
      if (step % 2 == 0)
        quad = Tokens<Source>::kPairs % 2 == 0 ? x[4 * (step / 2) + (step % 4 == 0 ? odd : -odd)] : x[4 * (step / 2)];
      const uint32_t b[2] = {step % 2 == 0 ? quad.x : quad.z, step % 2 == 0 ? quad.y : quad.w};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        source[r].step(slots[d][r], step, a);
        if (step % kSectionSteps == 0) ptx::mma_f16_zero(part[r], a, b);
        else ptx::mma_f16(part[r], a, b);
        if (step % kSectionSteps == kSectionSteps - 1) {
          add_scaled(total[r], part[r], source[r].template scales<M>(slots[d][r], step / kSectionSteps));
        }
      }
    }
    if constexpr (Source::kMins > 0) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        const Scales scales = source[r].mins(slots[d][r], a);
        const uint32_t b[2] = {mins[0], mins[1]};
        ptx::mma_f16_zero(part[r], a, b);
        if constexpr (Source::kMins == 16) {
          const uint32_t low[2] = {mins[2], mins[3]};
          ptx::mma_f16(part[r], a, low);
        }
        add_scaled(total[r], part[r], scales);
      }
    }
    if constexpr (Source::kRoom > 0) ptx::sync_warp();  // all have read what is overwritten now
  }
  BITFOLD_DEVICE static void add_scaled(float (&total)[4], const float (&part)[4], const Scales& scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = ptx::fma(part[i], scales.of[i / 2], total[i]);
  }

  // x: the slice's.
  template <Manner M>
  BITFOLD_DEVICE void multiply(uint4* x, int m, float (&total)[R][4]) {
    const int token = smaller(ptx::lane_id() / 4, m - 1);  // columns of tokens that aren't there hold the last one
    const int odd = 4 * (token & 1);
    const uint4* mine = x + token * Tokens<Source>::kQuads + ptx::lane_id() % 4;
    const uint32_t* mins =
        Tokens<Source>::mins(x, end - begin, m) + (4 * token + ptx::lane_id() % 4) * Tokens<Source>::kMinWords;
    for (int first = begin + warp; first < end; first += kAhead * kWarps) {
#pragma unroll
      for (int d = 0; d < kAhead; ++d) {
        const int piece = first + d * kWarps;
        if (piece < end) {
          const int tokens = (piece - begin) * m;  // each a piece of its own
          product<M>(d, piece, mine + tokens * Tokens<Source>::kQuads, odd,
                     mins + 4 * tokens * Tokens<Source>::kMinWords, total);
          if (piece + kAhead * kWarps < end) fetch<M>(d, piece + kAhead * kWarps);
          commit();
        }
      }
    }
  }
};

// Sums the warps' totals of a unit, and after the last slice writes y.
template <class Source, int R>
BITFOLD_DEVICE void reduce(const Args<Source>& args, Memory<Source, R>& memory, const Unit& unit,
                           const TokenScales& scales, const float (&total)[R][4]) {
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    memory.partial[ptx::warp_id()][r][ptx::lane_id()] = {total[r][0], total[r][1], total[r][2], total[r][3]};
  }
  ptx::sync_block();
  const int token = thread / (16 * R), row = thread % (16 * R);
  if (token < args.x.m) {
    // D: row g + 8 i of token 2 t + j is d[2 i + j] of lane 4 g + t.
    const int lane = row % 8 * 4 + token / 2, place = row % 16 / 8 * 2 + token % 2;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += reinterpret_cast<const float*>(&memory.partial[warp][row / 16][lane])[place];
    }
    sum *= scales.unit[token] * Source::kUnit;
    float& kept = memory.sums[unit.tile - unit.round_begin][thread];
    if (unit.slice > 0) sum += kept;
    const int64_t n = (blockIdx.x + int64_t{unit.tile} * gridDim.x) * (16 * R) + row;
    if (unit.slice + 1 < args.slices) {
      kept = sum;
    } else if (n < args.n) {
      if (args.bias != nullptr) {
        sum += args.x.bf16 ? ptx::bf16_to_float(args.bias[n]) : ptx::half_to_float(args.bias[n]);
      }
      args.y[token * args.n + n] = args.x.bf16 ? ptx::float_to_bf16(sum) : ptx::float_to_half(sum);
    }
  }
  ptx::sync_block();
}

template <class Source, int R>
__global__ void __launch_bounds__(kThreads, 1) linear_rows_kernel(Args<Source> args) {
  auto& memory = shared<Memory<Source, R>>();
  auto* x = reinterpret_cast<uint4*>(&memory + 1);
  const int64_t slice_quads = int64_t{args.slice} * args.x.m * (Tokens<Source>::kPieceBytes / 16);
  const int64_t all = ceil_div<int64_t>(args.n, 16 * R);
  const auto tiles = static_cast<int>(ceil_div<int64_t>(all - blockIdx.x, gridDim.x));
  Feed<Source, R> feed;
  feed.rooms = memory.rooms[ptx::warp_id()];
  Unit unit{0, 0, 0};
  feed.start(args, memory.tables, unit);  // W doesn't wait for x
  Source::fill(args.w, memory.tables, static_cast<int>(threadIdx.x), kThreads);
  if (args.resident) {
    for (int s = 0; s < args.slices; ++s) {
      const int first = s * args.slice;
      Tokens<Source>::stage(args.x, first, smaller(args.slice, args.pieces - first), x + s * slice_quads,
                            memory.scales[s]);
    }
  }
  for (int staged = -1;;) {
    if (!args.resident && staged != unit.slice) {
      staged = unit.slice;
      const int first = staged * args.slice;
      Tokens<Source>::stage(args.x, first, smaller(args.slice, args.pieces - first), x, memory.scales[0]);
    }
    float total[R][4] = {};
    const int place = args.resident ? unit.slice : 0;
    uint4* mine = x + place * slice_quads;
    switch (Source::manner(args.w)) {
      case Manner::Plain: feed.template multiply<Manner::Plain>(mine, args.x.m, total); break;
      case Manner::Full: feed.template multiply<Manner::Full>(mine, args.x.m, total); break;
      case Manner::Any: feed.template multiply<Manner::Any>(mine, args.x.m, total); break;
    }
    const Unit done = unit;
    const bool more = unit.next(tiles, args.slices);
    if (more) feed.start(args, memory.tables, unit);
    reduce<Source, R>(args, memory, done, memory.scales[place], total);
    if (!more) return;
  }
}

// ---- the launcher ----

template <class Source, int R>
void launch_rows(const LinearArgs& a, Stream stream) {
  const Gpu& device = gpu();
  const int64_t fixed = sizeof(Memory<Source, R>);
  const int64_t token_bytes = Tokens<Source>::kPieceBytes;
  const int64_t pieces = ceil_div<int64_t>(a.w.k, Source::kColumns);
  // Of 8 tokens, whatever m is, so that it doesn't change the order of sums.
  const int64_t room = (device.shared_bytes - fixed) / (kTokens * token_bytes);
  const int64_t longest = room < kWarps ? larger<int64_t>(room, 1) : room / kWarps * kWarps;
  const int64_t fewest = larger<int64_t>(ceil_div<int64_t>(pieces, longest), 1);
  const int64_t even = ceil_div<int64_t>(ceil_div<int64_t>(pieces, fewest), kWarps) * kWarps;
  const int64_t slice = smaller(longest, even);
  const int64_t slices = larger<int64_t>(ceil_div<int64_t>(pieces, larger<int64_t>(slice, 1)), 1);
  const int64_t all = slices * slice * a.x.rows * token_bytes;
  const bool resident = slices <= kSlices && fixed + all <= device.shared_bytes;
  const bool aligned = a.x.column_stride == 1 && a.x.row_stride % 4 == 0 && a.w.k % Source::kColumns == 0 &&
                       reinterpret_cast<uintptr_t>(a.x.data) % 8 == 0;
  const Args<Source> args{
      .w = Source::matrix(a.w),
      .x = {static_cast<const uint16_t*>(a.x.data), a.x.row_stride, a.x.column_stride, a.w.k,
            static_cast<int>(a.x.rows), a.x.dtype == DType::BF16, aligned},
      .bias = static_cast<const uint16_t*>(a.bias),
      .y = static_cast<uint16_t*>(a.y),
      .n = a.w.n,
      .pieces = static_cast<int>(pieces),
      .slice = static_cast<int>(slice),
      .slices = static_cast<int>(slices),
      .resident = resident,
  };
  const int64_t tiles = ceil_div<int64_t>(a.w.n, 16 * R);
  launch({.grid = static_cast<unsigned>(smaller<int64_t>(tiles, device.multiprocessors)),
          .block = kThreads,
          .shared_bytes = fixed + (resident ? all : slice * a.x.rows * token_bytes),
          .name = "linear_rows",
          .stream = stream},
         linear_rows_kernel<Source, R>, args);
}

// 32 rows at a time where that makes no block wait longer for the last.
template <class Source>
void launch_tiles(const LinearArgs& args, Stream stream) {
  const int64_t blocks = gpu().multiprocessors;
  const auto turns = [&](int64_t rows) { return ceil_div<int64_t>(ceil_div<int64_t>(args.w.n, rows), blocks); };
  return 2 * turns(32) <= turns(16) ? launch_rows<Source, 2>(args, stream) : launch_rows<Source, 1>(args, stream);
}

// The kernels of a format with planes, the widest pieces first: their columns, and the most tiles at a time. Codes of 8
// bits leave the instructions that a tile of its own costs.
template <int Columns, int Tiles>
struct Pieces {};
template <class... Widest>
struct Choice {};

template <int Row>
struct KernelsOf : Choice<Pieces<64, 1>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt4> : Choice<Pieces<128, 2>, Pieces<64, 2>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt3> : Choice<Pieces<64, 2>> {};
template <>
struct KernelsOf<kInt2> : Choice<Pieces<128, 2>, Pieces<64, 2>> {};
template <>
struct KernelsOf<kNf4> : Choice<Pieces<64, 2>, Pieces<32, 1>> {};

template <int Row, int Columns, int Tiles>
bool launch_where_it_fits(const LinearArgs& args, Stream stream, Pieces<Columns, Tiles>) {
  using Source = PlaneFragments<Row, Columns>;
  if (!Source::fits(args.w)) return false;
  if constexpr (Tiles == 1) launch_rows<Source, 1>(args, stream);
  else launch_tiles<Source>(args, stream);
  return true;
}

template <int Row, class... Widest>
void launch_widest(const LinearArgs& args, Stream stream, Choice<Widest...>) {
  const bool launched = (... || launch_where_it_fits<Row>(args, stream, Widest{}));
  if (!launched) linear_rows_of<kRagged>(args, stream);
}

}  // namespace

template <>
void linear_rows_of<BITFOLD_PART>(const LinearArgs& args, Stream stream) {
  constexpr int kRow = BITFOLD_PART;
  if constexpr (kRow == kRagged) launch_rows<RaggedFragments, 1>(args, stream);
  else if constexpr (kRow >= kQ4_0) launch_rows<ChunkFragments<kRow>, 1>(args, stream);
  else launch_widest<kRow>(args, stream, KernelsOf<kRow>());
}

}  // namespace bitfold::cuda
