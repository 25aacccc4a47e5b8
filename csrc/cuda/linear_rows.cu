// y[m, n] = x[m, k] W^T + bias for m <= 8: what decides is how fast W is read.
//
// A block of 16 warps is at home on a multiprocessor and takes tiles of 16 or 32 rows of W in turn. Its warps share the
// columns of a tile: warp w has the pieces w, w + 16, ... of each row, so that together they read rows from end to end.
// Packed bytes come to shared memory by asynchronous copies into a ring of each warp's own: as soon as a piece was
// multiplied, its room is asked for the next one, whichever tile that is of, so that memory never waits for sums, for x
// or for other warps. From there they go as fragments into mma with W as the 16 rows and x, which lies in shared memory
// too, as the 8 columns: all m <= 8 cost the same, and a token's bits don't depend on the others. A warp keeps its sums
// of two tiles, and the warps' sums meet in shared memory in the order of warps. Where x of 8 tokens is larger than
// shared memory, k is cut into slices (by n, k and GPU alone), whose sums are added in order.
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
// Tiles whose sums a warp keeps while x of slice after slice comes to shared memory.
constexpr int kRound = 2;
// Slices of x that may all be there at once.
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
  int rooms;      // of a warp's ring, one of kRooms
};

// How many pieces a warp has room for: all but one of them are on their way while it multiplies. In flight for a
// multiprocessor should be more than the 32 KB that come in the microsecond that memory takes to answer.
constexpr int kRooms[] = {8, 6, 3};
constexpr int64_t kInFlight = 104 << 10;

// R: tiles of 16 rows that a warp multiplies with each fragment of x.
template <class Source, int R>
inline constexpr int kRoomBytes = R * Source::kRoom;

// Behind it lie the rings of the warps, and then x.
template <class Source, int R>
struct alignas(16) Memory {
  typename Source::Tables tables;
  float4 partial[kWarps][R][kWarp];
  TokenScales scales[kSlices];
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
BITFOLD_DEVICE int64_t first_row(int tile) {
  return (blockIdx.x + int64_t{tile} * gridDim.x) * (16 * R);
}

// Which pieces a warp has of a tile: share, share + 16, .... In every other tile they are dealt out backwards, so that
// two tiles are the same work for all warps.
BITFOLD_DEVICE int share_of(int tile, int warp) { return tile % 2 == 0 ? warp : kWarps - 1 - warp; }

// A warp's rooms, one after the other and again.
template <int Bytes>
struct Room {
  std::byte* at;
  std::byte* const begin;
  std::byte* const end;

  BITFOLD_DEVICE Room(std::byte* ring, int rooms) : at(ring), begin(ring), end(ring + rooms * Bytes) {}
  BITFOLD_DEVICE void next() {
    at += Bytes;
    if (at == end) at = begin;
  }
};

// What goes ahead: the copies of a warp's pieces, unit after unit.
template <class Source, int R>
class Feed {
 public:
  BITFOLD_DEVICE Feed(const Args<Source>& args, int tiles, int warp, std::byte* ring)
      : args_(args), tiles_(tiles), warp_(warp), room_(ring, args.rooms) {
    open();
    settle();
    for (int i = 1; i < args.rooms; ++i) next<Manner::Any>();
  }

  // The next piece into the next room of the ring, if there is one; a group of copies in either case.
  template <Manner M>
  BITFOLD_DEVICE void next() {
    if (more_) {
      copies_.template fetch<M>(args_.w, piece_, room_.at);
      piece_ += kWarps;
      settle();
    }
    ptx::cp_async_commit();
    room_.next();
  }

  // Until the oldest piece has come: all but the newest rooms - 2.
  BITFOLD_DEVICE void wait() const {
    if (args_.rooms == 3) ptx::cp_async_wait<1>();
    else if (args_.rooms == 6) ptx::cp_async_wait<4>();
    else ptx::cp_async_wait<6>();
  }

 private:
  BITFOLD_DEVICE void open() {
    piece_ = unit_.slice * args_.slice + share_of(unit_.tile, warp_);
    end_ = smaller((unit_.slice + 1) * args_.slice, args_.pieces);
    copies_ = typename Source::template Copies<R>(args_.w, first_row<Source, R>(unit_.tile));
  }
  // To a unit that has a piece.
  BITFOLD_DEVICE void settle() {
    while (piece_ >= end_) {
      more_ = unit_.next(tiles_, args_.slices);
      if (!more_) return;
      open();
    }
  }

  const Args<Source>& args_;
  const int tiles_, warp_;
  Room<kRoomBytes<Source, R>> room_;
  Unit unit_{0, 0, 0};
  bool more_ = true;
  int piece_, end_;
  typename Source::template Copies<R> copies_;
};

// What follows: a piece of R tiles with all tokens.
template <class Source, int R>
class Product {
  using X = Tokens<Source>;

 public:
  // x: of the slice; pieces: of the slice.
  BITFOLD_DEVICE Product(const Args<Source>& args, const typename Source::Tables& tables, int tile, const uint4* x,
                         int pieces)
      : there_(ptx::lane_id() / 4 < args.x.m) {
#pragma unroll
    for (int r = 0; r < R; ++r) source_[r] = Source(args.w, first_row<Source, R>(tile) + 16 * r, tables);
    const int token = there_ ? ptx::lane_id() / 4 : 0, t = ptx::lane_id() % 4;
    // Pairs lie in turns, or the other way round (Tokens::place).
    const int swapped = X::place(token, 0);
    even_ = x + token * X::kQuads + t + 4 * swapped;
    odd_ = x + token * X::kQuads + t - 4 * swapped;
    mins_ = X::mins(x, pieces, args.x.m) + (4 * token + t) * X::kMinWords;
    const float* sums = X::sums(x, pieces, args.x.m);
#pragma unroll
    for (int j = 0; j < 2; ++j) sums_[j] = sums + 4 * smaller(2 * t + j, args.x.m - 1);
  }

  // blocks: of x before this piece's in the slice, m for each piece.
  template <Manner M>
  BITFOLD_DEVICE void add(int piece, int blocks, const std::byte* room, float (&total)[R][4]) {
    constexpr int kSectionSteps = Source::kSteps / Source::kSections;
    float part[R][4];
    typename Source::Slot slots[R];
#pragma unroll
    for (int r = 0; r < R; ++r) source_[r].template open<M>(slots[r], piece, room + r * Source::kRoom);
    const uint4 *even = even_ + blocks * X::kQuads, *odd = odd_ + blocks * X::kQuads;
    uint4 quad{};
#pragma unroll
    for (int step = 0; step < Source::kSteps; ++step) {
      // Columns of tokens that aren't there go nowhere, and cost no load. (Two statements: of an index behind ?: g++ 12
      // with -fsanitize=shift computes `step / 2` in the first arm alone, and takes what it was before in the other.)
      const uint4* quads = step % 4 == 0 ? even : odd;
      if (step % 2 == 0 && there_) quad = quads[4 * (step / 2)];
      const uint32_t b[2] = {step % 2 == 0 ? quad.x : quad.z, step % 2 == 0 ? quad.y : quad.w};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        source_[r].template step<M>(slots[r], step, a);
        if (step % kSectionSteps == 0) begin<M>(part[r], r, slots[r], step / kSectionSteps, blocks, a, b);
        else ptx::mma_f16(part[r], a, b);
        if (step % kSectionSteps == kSectionSteps - 1) {
          add_scaled(total[r], part[r], source_[r].template scales<M>(slots[r], step / kSectionSteps));
        }
      }
    }
    if constexpr (Source::kMins > 0) {
      const uint32_t* mins = mins_ + 4 * blocks * X::kMinWords;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        const Scales scales = source_[r].mins(slots[r], a);
        const uint32_t b[2] = {mins[0], mins[1]};
        ptx::mma_f16_zero(part[r], a, b);
        if constexpr (Source::kMins == 16) {
          const uint32_t low[2] = {mins[2], mins[3]};
          ptx::mma_f16(part[r], a, low);
        }
        add_scaled(total[r], part[r], scales);
      }
    }
  }

 private:
  // The first product of a section, which what zero points make of sums of x comes to.
  template <Manner M>
  BITFOLD_DEVICE void begin(float (&part)[4], int r, const typename Source::Slot& slot, int section, int blocks,
                            const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    if constexpr (Source::kSums == 0 || M == Manner::Any) {
      ptx::mma_f16_zero(part, a, b);
    } else {
      const Scales before = source_[r].template before<M>(slot, section);
      float from[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) from[i] = before.of[i / 2] * sums_[i % 2][4 * blocks + section];
      ptx::mma_f16_from(part, a, b, from);
    }
  }
  BITFOLD_DEVICE static void add_scaled(float (&total)[4], const float (&part)[4], const Scales& scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = ptx::fma(part[i], scales.of[i / 2], total[i]);
  }

  const bool there_;
  Source source_[R];
  const uint4 *even_, *odd_;  // of even pairs of steps, of odd ones
  const uint32_t* mins_;
  const float* sums_[2];  // of the tokens 2 t and 2 t + 1
};

// A unit's pieces of this warp, from `room` on.
template <class Source, int R, Manner M>
BITFOLD_DEVICE void multiply(const Args<Source>& args, const Unit& unit, Feed<Source, R>& feed,
                             Product<Source, R>& product, int warp, Room<kRoomBytes<Source, R>>& room,
                             float (&total)[R][4]) {
  const int begin = unit.slice * args.slice, end = smaller(begin + args.slice, args.pieces);
  int blocks = share_of(unit.tile, warp) * args.x.m;
#pragma unroll 1
  for (int piece = begin + share_of(unit.tile, warp); piece < end; piece += kWarps) {
    feed.wait();
    ptx::sync_warp();  // all lanes' copies are there, and all have read the room that is filled next
    feed.template next<M>();
    product.template add<M>(piece, blocks, room.at, total);
    blocks += kWarps * args.x.m;
    room.next();
  }
}

// Sums the totals of a tile's shares in their order and writes y. Ends with a barrier.
template <class Source, int R>
BITFOLD_DEVICE void reduce(const Args<Source>& args, Memory<Source, R>& memory, int tile, const float (&total)[R][4]) {
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    memory.partial[share_of(tile, ptx::warp_id())][r][ptx::lane_id()] = {total[r][0], total[r][1], total[r][2],
                                                                         total[r][3]};
  }
  ptx::sync_block();
  const int token = thread / (16 * R), row = thread % (16 * R);
  const int64_t n = first_row<Source, R>(tile) + row;
  if (token < args.x.m && n < args.n) {
    // D: row g + 8 i of token 2 t + j is d[2 i + j] of lane 4 g + t.
    const int lane = row % 8 * 4 + token / 2, place = row % 16 / 8 * 2 + token % 2;
    float sum = 0.0f;
#pragma unroll
    for (int share = 0; share < kWarps; ++share) {
      sum += reinterpret_cast<const float*>(&memory.partial[share][row / 16][lane])[place];
    }
    if (args.bias != nullptr) {
      sum += args.x.bf16 ? ptx::bf16_to_float(args.bias[n]) : ptx::half_to_float(args.bias[n]);
    }
    args.y[token * args.n + n] = args.x.bf16 ? ptx::float_to_bf16(sum) : ptx::float_to_half(sum);
  }
  ptx::sync_block();
}

template <class Source, int R>
__global__ void __launch_bounds__(kThreads, 1) linear_rows_kernel(Args<Source> args) {
  auto& memory = shared<Memory<Source, R>>();
  const int warp = ptx::shuffle(ptx::warp_id(), 0);  // which tells the compiler that all lanes have the same
  auto* rings = reinterpret_cast<std::byte*>(&memory + 1);
  std::byte* ring = rings + warp * args.rooms * kRoomBytes<Source, R>;
  auto* x = reinterpret_cast<uint4*>(rings + kWarps * args.rooms * kRoomBytes<Source, R>);
  const int64_t slice_quads = int64_t{args.slice} * args.x.m * (Tokens<Source>::kPieceBytes / 16);
  const int64_t all = ceil_div<int64_t>(args.n, 16 * R);
  const auto tiles = static_cast<int>(ceil_div<int64_t>(all - blockIdx.x, gridDim.x));
  const auto pieces_of = [&](int slice) { return smaller(args.slice, args.pieces - slice * args.slice); };
  Feed<Source, R> feed(args, tiles, warp, ring);  // W doesn't wait for x
  Source::fill(args.w, memory.tables, static_cast<int>(threadIdx.x), kThreads);
  if (args.resident) {
    for (int s = 0; s < args.slices; ++s) {
      Tokens<Source>::stage(args.x, s * args.slice, pieces_of(s), x + s * slice_quads, memory.scales[s]);
    }
  }
  Unit unit{0, 0, 0};
  Room<kRoomBytes<Source, R>> room(ring, args.rooms);
  float totals[kRound][R][4] = {};
  for (int staged = -1;;) {
    if (!args.resident && staged != unit.slice) {
      staged = unit.slice;
      Tokens<Source>::stage(args.x, staged * args.slice, pieces_of(staged), x, memory.scales[0]);
    }
    const int place = args.resident ? unit.slice : 0;
    Product<Source, R> product(args, memory.tables, unit.tile, x + place * slice_quads, pieces_of(unit.slice));
    float total[R][4] = {};
    const bool finite = Source::kSums == 0 || Tokens<Source>::finite(args.x, memory.scales[place]);
    switch (finite ? Source::manner(args.w) : Manner::Any) {
      case Manner::Plain: multiply<Source, R, Manner::Plain>(args, unit, feed, product, warp, room, total); break;
      case Manner::Full: multiply<Source, R, Manner::Full>(args, unit, feed, product, warp, room, total); break;
      case Manner::Any: multiply<Source, R, Manner::Any>(args, unit, feed, product, warp, room, total); break;
    }
      // Column j of a lane's sums is token 2 t + j.
#pragma unroll
    for (int i = 0; i < 4 * R; ++i) {
      const float factor = memory.scales[place].unit[ptx::lane_id() % 4 * 2 + i % 2];
#pragma unroll
      for (int q = 0; q < kRound; ++q) {
        float& sum = totals[q][i / 4][i % 4];
        const float more = ptx::fma(total[i / 4][i % 4] * Source::kUnit, factor, sum);
        sum = unit.tile - unit.round_begin == q ? more : sum;
      }
    }
    const Unit done = unit;
    const bool more = unit.next(tiles, args.slices);
    if (!more || unit.round_begin != done.round_begin) {
#pragma unroll
      for (int q = 0; q < kRound; ++q) {
        if (done.round_begin + q < tiles) reduce<Source, R>(args, memory, done.round_begin + q, totals[q]);
#pragma unroll
        for (int i = 0; i < 4 * R; ++i) totals[q][i / 4][i % 4] = 0.0f;
      }
    }
    if (!more) return;
  }
}

// ---- the launcher ----

template <class Source, int R>
void launch_rows(const LinearArgs& a, Stream stream) {
  const Gpu& device = gpu();
  const auto fixed = [](int64_t rooms) {
    return static_cast<int64_t>(sizeof(Memory<Source, R>)) + kWarps * rooms * kRoomBytes<Source, R>;
  };
  constexpr int64_t kFewest = 3;
  const int64_t token_bytes = Tokens<Source>::kPieceBytes;
  const int64_t pieces = ceil_div<int64_t>(a.w.k, Source::kColumns);
  // Of 8 tokens, whatever m is, so that it doesn't change the order of sums.
  const int64_t room = (device.shared_bytes - fixed(kFewest)) / (kTokens * token_bytes);
  const int64_t longest = room < kWarps ? larger<int64_t>(room, 1) : room / kWarps * kWarps;
  const int64_t fewest = larger<int64_t>(ceil_div<int64_t>(pieces, longest), 1);
  const int64_t even = ceil_div<int64_t>(ceil_div<int64_t>(pieces, fewest), kWarps) * kWarps;
  const int64_t slice = smaller(longest, even);
  const int64_t slices = larger<int64_t>(ceil_div<int64_t>(pieces, larger<int64_t>(slice, 1)), 1);
  const int64_t one = slice * a.x.rows * token_bytes, all = slices * one;
  const bool resident = slices <= kSlices && fixed(kFewest) + all <= device.shared_bytes;
  int64_t rooms = kFewest;
  for (const int64_t more : kRooms) {
    const bool fits = fixed(more) + (resident ? all : one) <= device.shared_bytes;
    if (more > rooms && fits && kWarps * (more - 1) * kRoomBytes<Source, R> <= kInFlight) rooms = more;
  }
  const bool aligned = a.x.column_stride == 1 && (a.x.row_stride % 8 == 0 || a.x.rows == 1) &&
                       a.w.k % Source::kColumns == 0 && reinterpret_cast<uintptr_t>(a.x.data) % 16 == 0;
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
      .rooms = static_cast<int>(rooms),
  };
  const int64_t tiles = ceil_div<int64_t>(a.w.n, 16 * R);
  launch({.grid = static_cast<unsigned>(smaller<int64_t>(tiles, device.multiprocessors)),
          .block = kThreads,
          .shared_bytes = fixed(rooms) + (resident ? all : one),
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

// The kernels of a format with planes, the widest pieces first: their columns, the groups in them, and the most tiles
// at a time. Codes of 8 bits leave the instructions that a tile of its own costs.
template <int Columns, int Sections, int Tiles>
struct Pieces {};
template <class... Widest>
struct Choice {};

template <int Row>
struct KernelsOf : Choice<Pieces<64, 1, 1>, Pieces<32, 1, 1>> {};
template <>
struct KernelsOf<kInt4> : Choice<Pieces<128, 1, 2>, Pieces<128, 2, 2>, Pieces<128, 4, 1>, Pieces<32, 1, 1>> {};
template <>
struct KernelsOf<kInt3> : Choice<Pieces<64, 1, 2>> {};
template <>
struct KernelsOf<kInt2> : Choice<Pieces<128, 1, 2>, Pieces<128, 2, 2>> {};
template <>
struct KernelsOf<kNf4> : Choice<Pieces<128, 2, 2>, Pieces<32, 1, 1>> {};

template <int Row, int Columns, int Sections, int Tiles>
bool launch_where_it_fits(const LinearArgs& args, Stream stream, Pieces<Columns, Sections, Tiles>) {
  using Source = PlaneFragments<Row, Columns, Sections>;
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
