// y[m, n] = x[m, k] W^T + bias for m <= 8: what decides is how fast W is read.
//
// A block of 16 warps is at home on a multiprocessor. k is cut into slices, by n, k and shared memory alone, and a
// *unit* is a slice of 16 rows of W, which a warp multiplies from its first column to its last by itself. Packed bytes
// come to shared memory by asynchronous copies into a ring of each warp's own: as soon as a piece was multiplied, its
// room is asked for the next one, whichever unit that is of, so that memory never waits for sums, for x or for other
// warps. From there they go as fragments into mma with W as the 16 rows and x, which lies in shared memory too, as the
// 8 columns: all m <= 8 cost the same, and a token's bits don't depend on the others.
//
// Where all of x fits beside the rings, a block has *whole* tiles: the sums of their slices meet in shared memory, and
// are added in the order of slices. Where it doesn't, a block has some slices and many tiles, and leaves its sums to
// another kernel, which adds them in the same order (rows_sums.cu): the same bits.
//
// Compiled once for each format, and once for what its kernels don't fit (BITFOLD_PART).
#include <stdexcept>

#include "cuda/fragments_chunks.hpp"
#include "cuda/fragments_k.hpp"
#include "cuda/fragments_ragged.hpp"
#include "cuda/linear_rows.hpp"
#include "cuda/rows_sums.hpp"
#include "cuda/tokens.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarp * kWarps;
// Slices of x that a block may have at once.
constexpr int kSlices = 32;

template <class Source>
struct Args {
  typename Source::Matrix w;
  TokensArgs x;
  const uint16_t* bias;  // may be null
  uint16_t* y;
  float* partials;  // sums of slices, [slices, m, rows of all tiles]; null where blocks have whole tiles
  int64_t n;
  int tiles;
  int pieces;
  int slices_log2;
  int longest;     // pieces of a slice
  int kept;        // slices of x that are in shared memory
  int each, more;  // tiles (or units) of a block, and how many blocks have one more
  int round;       // units of a block, from one addition of slices to the next
  int rooms;       // of a warp's ring, one of kRooms
};

// How many pieces a warp has room for: all but one of them are on their way while it multiplies. In flight for a
// multiprocessor should be more than the 32 KB that come in the microsecond that memory takes to answer.
constexpr int kRooms[] = {4, 3};  // or 2
constexpr int64_t kInFlight = 78 << 10;

// A room of a ring, and what is copied once for a unit: there are no more units under way than pieces.
template <class Source>
inline constexpr int kRoomBytes = Source::kRoom + Source::kHead;

// Behind it lie the rings of the warps, x, and the sums of a round.
template <class Source>
struct alignas(16) Memory {
  typename Source::Tables tables;
  TokenScales scales[kSlices];
};

// The units that a block has, one after the other: tile after tile with all of its slices, or slice after slice.
template <class Source>
struct Units {
  int begin, end;

  BITFOLD_DEVICE explicit Units(const Args<Source>& args) {
    const int block = static_cast<int>(blockIdx.x), log2 = args.partials == nullptr ? args.slices_log2 : 0;
    begin = (block * args.each + smaller(block, args.more)) << log2;
    end = ((block + 1) * args.each + smaller(block + 1, args.more)) << log2;
  }
};

// A slice of a tile, which a warp multiplies from its first piece to its last.
struct Unit {
  int tile, slice, first, end;  // pieces

  template <class Source>
  BITFOLD_DEVICE Unit(const Args<Source>& args, int unit) {
    const bool whole = args.partials == nullptr;
    const int slices = args.slices_log2;
    slice = whole ? unit & ((1 << slices) - 1) : unit / args.tiles;
    tile = whole ? unit >> slices : unit - slice * args.tiles;
    first = first_of(args, slice);
    end = first_of(args, slice + 1);
  }
  template <class Source>
  BITFOLD_DEVICE static int first_of(const Args<Source>& args, int slice) {
    return static_cast<int>(int64_t{args.pieces} * slice >> args.slices_log2);
  }
};

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
template <class Source>
class Feed {
 public:
  BITFOLD_DEVICE Feed(const Args<Source>& args, const Units<Source>& units, int warp, std::byte* ring)
      : args_(args),
        unit_(units.begin + warp),
        units_(units.end),
        room_(ring, args.rooms),
        head_(ring + args.rooms * Source::kRoom, args.rooms) {
    next<Manner::Any>();
  }
  // The other pieces that there is room for.
  BITFOLD_DEVICE void fill() {
    for (int i = 2; i < args_.rooms; ++i) next<Manner::Any>();
  }

  // The next piece into the next room of the ring, if there is one; a group of copies in either case.
  template <Manner M>
  BITFOLD_DEVICE void next() {
    if (left_ == 0 && unit_ < units_) open();
    if (left_ > 0) {
      copies_.template fetch<M>(args_.w, room_.at);
      --left_;
    }
    ptx::cp_async_commit();
    room_.next();
  }

  // Until the oldest piece has come: all but the newest rooms - 2.
  BITFOLD_DEVICE void wait() const {
    if (args_.rooms == 4) ptx::cp_async_wait<2>();
    else if (args_.rooms == 3) ptx::cp_async_wait<1>();
    else ptx::cp_async_wait<0>();
  }

 private:
  BITFOLD_DEVICE void open() {
    const Unit unit(args_, unit_);
    unit_ += kWarps;
    left_ = unit.end - unit.first;
    copies_ = typename Source::Copies(args_.w, int64_t{unit.tile} * 16, unit.first);
    copies_.begin(args_.w, left_, head_.at);
    head_.next();
  }

  const Args<Source>& args_;
  int unit_;
  const int units_;
  Room<Source::kRoom> room_;
  Room<Source::kHead> head_;
  int left_ = 0;
  typename Source::Copies copies_;
};

// What follows: a piece of a tile with all tokens.
template <class Source>
class Product {
  using X = Tokens<Source>;
  // Pairs of steps whose x a lane loads together, so that it waits for shared memory once.
  static constexpr int kQuads = smaller(Source::kTogether, Source::kSteps / 2);
  static constexpr int kSectionSteps = Source::kSteps / Source::kSections;
  static_assert(Source::kSteps / 2 % kQuads == 0);
  // Sums of a section: two where they are long, so that products wait less for each other.
  static constexpr int kSums = kSectionSteps >= 8 ? 2 : 1;

 public:
  // x: of the slice; pieces: of the slice.
  BITFOLD_DEVICE Product(const Args<Source>& args, const typename Source::Tables& tables, int tile, const uint4* x,
                         int pieces, const std::byte* head)
      : m_(args.x.m), there_(ptx::lane_id() / 4 < args.x.m), source_(args.w, int64_t{tile} * 16, tables, head) {
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

  // The slice's next piece, which is `piece` of all.
  template <Manner M>
  BITFOLD_DEVICE void add(int piece, std::byte* room, float (&total)[4]) {
    float part[kSums][4];
    typename Source::Slot slot;
    source_.template open<M>(slot, piece, room);
#pragma unroll
    for (int step = 0; step < Source::kSteps; ++step) {
      if (step % (2 * kQuads) == 0 && there_) {
#pragma unroll
        for (int pair = step / 2; pair < step / 2 + kQuads; ++pair) {
          // (Two statements: of an index behind ?: g++ 12 with -fsanitize=shift computes the index in the first arm
          // alone, and takes what it was before in the other.)
          const uint4* quads = pair % 2 == 0 ? even_ : odd_;
          quads_[pair % kQuads] = quads[4 * pair];
        }
      }
      const uint4& quad = quads_[step / 2 % kQuads];
      const uint32_t b[2] = {step % 2 == 0 ? quad.x : quad.z, step % 2 == 0 ? quad.y : quad.w};
      uint32_t a[4];
      source_.template step<M>(slot, step, a);
      const int within = step % kSectionSteps;
      if (within == 0) begin<M>(part[0], slot, step / kSectionSteps, a, b);
      else if (within < kSums) ptx::mma_f16_zero(part[within], a, b);
      else ptx::mma_f16(part[within % kSums], a, b);
      if (within == kSectionSteps - 1) {
        if constexpr (kSums == 2) {
#pragma unroll
          for (int i = 0; i < 4; ++i) part[0][i] = ptx::add(part[0][i], part[1][i]);
        }
        add_scaled(total, part[0], source_.template scales<M>(slot, step / kSectionSteps));
      }
    }
    if constexpr (Source::kMins > 0) {
      uint32_t a[4];
      const Scales scales = source_.mins(slot, a);
      const uint32_t b[2] = {mins_[0], mins_[1]};
      ptx::mma_f16_zero(part[0], a, b);
      if constexpr (Source::kMins == 16) {
        const uint32_t low[2] = {mins_[2], mins_[3]};
        ptx::mma_f16(part[0], a, low);
      }
      add_scaled(total, part[0], scales);
      mins_ += 4 * m_ * X::kMinWords;
    }
    even_ += m_ * X::kQuads;
    odd_ += m_ * X::kQuads;
    if constexpr (Source::kSums > 0) sums_[0] += 4 * m_, sums_[1] += 4 * m_;
  }

 private:
  // The first product of a section, which what zero points make of sums of x comes to.
  template <Manner M>
  BITFOLD_DEVICE void begin(float (&part)[4], const typename Source::Slot& slot, int section, const uint32_t (&a)[4],
                            const uint32_t (&b)[2]) const {
    if constexpr (Source::kSums == 0 || M == Manner::Any) {
      ptx::mma_f16_zero(part, a, b);
    } else {
      const Scales before = source_.template before<M>(slot, section);
      float from[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) from[i] = before.of[i / 2] * sums_[i % 2][section];
      ptx::mma_f16_from(part, a, b, from);
    }
  }
  BITFOLD_DEVICE static void add_scaled(float (&total)[4], const float (&part)[4], const Scales& scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = ptx::fma(part[i], scales.of[i / 2], total[i]);
  }

  const int m_;
  const bool there_;
  Source source_;
  const uint4 *even_, *odd_;  // of even pairs of steps, of odd ones
  uint4 quads_[kQuads] = {};  // columns of tokens that aren't there stay zero, and cost no load
  const uint32_t* mins_;
  const float* sums_[2];  // of the tokens 2 t and 2 t + 1
};

// A unit's pieces, from `room` on.
template <class Source, Manner M>
BITFOLD_DEVICE void multiply(const Unit& unit, Feed<Source>& feed, Product<Source>& product, Room<Source::kRoom>& room,
                             float (&total)[4]) {
#pragma unroll 1
  for (int piece = unit.first; piece < unit.end; ++piece) {
    feed.wait();
    ptx::sync_warp();  // all lanes' copies are there, and all have read the room that is filled next
    feed.template next<M>();
    product.template add<M>(piece, room.at, total);
    room.next();
  }
}

// The sums of a unit to where a round's or all others' are: row by row, token by token.
template <class Source>
BITFOLD_DEVICE void leave(const Args<Source>& args, const TokenScales& scales, const float (&total)[4], float* sums,
                          int64_t token_stride) {
  const int lane = ptx::lane_id();
  // D: row g + 8 i of token 2 t + j is d[2 i + j] of lane 4 g + t.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int token = lane % 4 * 2 + j;
    if (token >= args.x.m) break;
    const float factor = scales.unit[token];
    float* rows = sums + token * token_stride + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[8 * i] = total[2 * i + j] * Source::kUnit * factor;
  }
}

// Adds up the slices of a round's tiles, from `tile` on, in their order, and writes y.
template <class Source>
BITFOLD_DEVICE void reduce(const Args<Source>& args, int tile, int tiles, const float* sums) {
  const int each = 16 * args.x.m, slices = 1 << args.slices_log2;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * each; i += kThreads) {
    const int token = i / 16 % args.x.m, row = i % 16;
    const int64_t n = int64_t{tile + i / each} * 16 + row;
    if (n >= args.n) continue;
    const float* mine = sums + i / each * slices * each + i % each;
    float sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) sum += mine[slice * each];
    write_sum(args.y, args.bias, args.x.bf16, token, n, args.n, sum);
  }
}

// x in shared memory, for all warps: some slices of all tokens, of which a warp brings a token's slice at a time.
template <class Source>
class Slices {
  using X = Tokens<Source>;

 public:
  BITFOLD_DEVICE Slices(const Args<Source>& args, TokenScales* scales, uint4* x, int warp)
      : args_(args),
        scales_(scales),
        x_(x),
        each_(args.longest * args.x.m * static_cast<int>(X::kPieceBytes / 16)),
        warp_(warp),
        at_once_(X::at_once(args.x)) {}

  using Eights = typename X::Eights;

  // The first slices, of which the warp's own is on its way then.
  BITFOLD_DEVICE void begin(int first, int end, Eights& eights) {
    first_ = first, end_ = end;
    if (at_once_ && warp_ < jobs()) load(warp_, eights);
  }
  // By all threads, who meet after it.
  BITFOLD_DEVICE void finish(Eights& eights) {
    if (at_once_) {
#pragma unroll 1
      for (int i = warp_; i < jobs(); i += kWarps) {
        const Job job(*this, i);
        X::stage(args_.x, eights, job.pieces, job.token, job.x, args_.longest, *job.scales);
        if (i + kWarps < jobs()) load(i + kWarps, eights);
      }
    } else {
      stage();
    }
    ptx::sync_block();
  }
  // Others, by all threads, who meet before it and after it.
  BITFOLD_DEVICE void next(int first, int end) {
    ptx::sync_block();
    first_ = first, end_ = end;
    stage();
    ptx::sync_block();
  }

  BITFOLD_DEVICE int end() const { return end_; }
  BITFOLD_DEVICE int quads() const { return each_; }  // of a slice
  BITFOLD_DEVICE const uint4* x(int slice) const { return x_ + (slice - first_) * each_; }
  BITFOLD_DEVICE const TokenScales& scales(int slice) const { return scales_[slice - first_]; }

 private:
  struct Job {
    int token, first, pieces;
    uint4* x;
    TokenScales* scales;

    BITFOLD_DEVICE Job(const Slices& s, int i) : token(i % s.args_.x.m) {
      const int slice = i / s.args_.x.m;
      first = Unit::first_of(s.args_, s.first_ + slice);
      pieces = Unit::first_of(s.args_, s.first_ + slice + 1) - first;
      x = s.x_ + slice * s.each_;
      scales = s.scales_ + slice;
    }
  };
  BITFOLD_DEVICE int jobs() const { return (end_ - first_) * args_.x.m; }
  BITFOLD_DEVICE void stage() const {
#pragma unroll 1
    for (int i = warp_; i < jobs(); i += kWarps) {
      const Job job(*this, i);
      X::stage(args_.x, job.first, job.pieces, job.token, job.x, args_.longest, *job.scales);
    }
  }
  BITFOLD_DEVICE void load(int i, Eights& eights) const {
    const Job job(*this, i);
    X::load(args_.x, job.first, job.pieces, job.token, eights);
  }

  const Args<Source>& args_;
  TokenScales* const scales_;
  uint4* const x_;
  const int each_;  // quads of a slice
  const int warp_;
  const bool at_once_;
  int first_ = 0, end_ = 0;
};

template <class Source>
__global__ void __launch_bounds__(kThreads, 1) linear_rows_kernel(Args<Source> args) {
  auto& memory = shared<Memory<Source>>();
  const int warp = ptx::shuffle(ptx::warp_id(), 0);  // which tells the compiler that all lanes have the same
  auto* rings = reinterpret_cast<std::byte*>(&memory + 1);
  auto* x = reinterpret_cast<uint4*>(rings + kWarps * args.rooms * kRoomBytes<Source>);
  const bool whole = args.partials == nullptr;
  const Units units(args);
  const int last = whole ? 1 << args.slices_log2 : Unit(args, units.end - 1).slice + 1;
  const int first = whole ? 0 : Unit(args, units.begin).slice;
  std::byte* ring = rings + warp * args.rooms * kRoomBytes<Source>;
  Feed<Source> feed(args, units, warp, ring);
  // x is asked for before all that there is room for of W, which it would have to wait for.
  Slices<Source> slices(args, memory.scales, x, warp);
  typename Slices<Source>::Eights eights;
  slices.begin(first, smaller(first + args.kept, last), eights);
  feed.fill();
  Room<Source::kRoom> room(ring, args.rooms);
  Room<Source::kHead> head(ring + args.rooms * Source::kRoom, args.rooms);
  Source::fill(args.w, memory.tables, static_cast<int>(threadIdx.x), kThreads);
  slices.finish(eights);
  auto* sums = reinterpret_cast<float*>(x + args.kept * slices.quads());
  int round = units.begin;
#pragma unroll 1
  for (int turn = units.begin; turn < units.end; turn += kWarps) {
    if (!whole && Unit(args, smaller(turn + kWarps, units.end) - 1).slice >= slices.end()) {
      const int slice = Unit(args, turn).slice;
      slices.next(slice, smaller(slice + args.kept, last));
    }
    if (turn + warp < units.end) {
      const Unit unit(args, turn + warp);
      const TokenScales& scales = slices.scales(unit.slice);
      Product<Source> product(args, memory.tables, unit.tile, slices.x(unit.slice), args.longest, head.at);
      head.next();
      float total[4] = {};
      const bool finite = Source::kSums == 0 || Tokens<Source>::finite(args.x, scales);
      switch (finite ? Source::manner(args.w) : Manner::Any) {
        case Manner::Plain: multiply<Source, Manner::Plain>(unit, feed, product, room, total); break;
        case Manner::Full: multiply<Source, Manner::Full>(unit, feed, product, room, total); break;
        case Manner::Any: multiply<Source, Manner::Any>(unit, feed, product, room, total); break;
      }
      const int64_t rows = int64_t{args.tiles} * 16;
      float* to = whole ? sums + (turn + warp - round) * args.x.m * 16
                        : args.partials + unit.slice * args.x.m * rows + int64_t{unit.tile} * 16;
      leave<Source>(args, scales, total, to, whole ? 16 : rows);
    }
    const int next = smaller(turn + kWarps, units.end);
    if (whole && (next == units.end || next - round == args.round)) {
      ptx::sync_block();
      reduce<Source>(args, round >> args.slices_log2, (next - round) >> args.slices_log2, sums);
      round = next;
      if (round < units.end) ptx::sync_block();
    }
  }
}

// ---- the launcher ----

// Bytes of shared memory beside x, with so many rooms of each warp.
template <class Source>
constexpr int64_t bytes_beside_x(int64_t rooms) {
  return static_cast<int64_t>(sizeof(Memory<Source>)) + kWarps * rooms * kRoomBytes<Source>;
}
constexpr int64_t kFewestRooms = 2, kFewestKept = 2;  // of a warp; slices of x that a block keeps at least

// What a slice of x, of 8 tokens, may have.
template <class Source>
int64_t bytes_of_slice() {
  constexpr int64_t kSliceBytes = 32 << 10;
  constexpr int64_t kLongest = kSliceBytes / (kTokens * Tokens<Source>::kPieceBytes);
  static_assert(kLongest <= Tokens<Source>::kTogether * Tokens<Source>::kTurn, "a lane has room for a slice's x");
  if constexpr (Source::kHead > 0) static_assert(kLongest <= Source::kHeadPieces, "and for what is copied once");
  return smaller(kSliceBytes, (gpu().shared_bytes - bytes_beside_x<Source>(kFewestRooms)) / kFewestKept);
}
// Whether a slice may be a piece at least; narrower pieces leave more room.
template <class Source>
bool has_room() {
  return bytes_of_slice<Source>() >= kTokens * Tokens<Source>::kPieceBytes;
}

// How k is cut, by n, k and the GPU's shared memory: so that 8 tokens of a slice have room beside the rings, and so
// that there are some thousand units.
template <class Source>
int slices_log2(int64_t n, int64_t pieces) {
  constexpr int64_t kUnits = 8192, kMost = 4;
  const int64_t most = bytes_of_slice<Source>();
  const auto bytes = [&](int log2) {
    return (ceil_div<int64_t>(pieces, int64_t{1} << log2)) * kTokens * Tokens<Source>::kPieceBytes;
  };
  int log2 = 0;
  while (int64_t{2} << log2 <= pieces &&
         (bytes(log2) > most || (log2 < kMost && ceil_div<int64_t>(n, 16) << log2 < kUnits))) {
    ++log2;
  }
  return log2;
}

template <class Source>
void launch_rows(const RowsCall& call) {
  if (!has_room<Source>()) throw std::runtime_error("linear_rows: this GPU has too little shared memory");
  const LinearArgs& a = call.args;
  const Gpu& device = gpu();
  const int64_t pieces = ceil_div<int64_t>(a.w.k, Source::kColumns), tiles = ceil_div<int64_t>(a.w.n, 16);
  const int log2 = slices_log2<Source>(a.w.n, pieces);
  const int64_t slices = int64_t{1} << log2, longest = ceil_div<int64_t>(pieces, slices), m = a.x.rows;
  const int64_t slice_bytes = longest * m * Tokens<Source>::kPieceBytes;
  constexpr int64_t kRoundBytes = 16 << 10;
  const auto fixed = bytes_beside_x<Source>;
  const int64_t turn = larger<int64_t>(slices, kWarps), unit_bytes = 16 * m * 4;
  const int64_t turns = larger<int64_t>(smaller<int64_t>(kRoundBytes / (turn * unit_bytes), 4), 1) * turn;
  const bool whole =
      slices <= kSlices && fixed(kFewestRooms) + slices * slice_bytes + turns * unit_bytes <= device.shared_bytes;
  if (call.wanted != nullptr) {
    *call.wanted = whole ? 0 : slices * m * tiles * 16 * 4;
    return;
  }
  const int64_t kept = whole ? slices : kFewestKept;
  const int64_t round = whole ? turns : 0;
  const int64_t others = kept * slice_bytes + round * unit_bytes;
  int64_t rooms = kFewestRooms;
  for (const int64_t more : kRooms) {
    const bool fits = fixed(more) + others <= device.shared_bytes;
    if (more > rooms && fits && kWarps * (more - 1) * Source::kRoom <= kInFlight) rooms = more;
  }
  const bool aligned = a.x.column_stride == 1 && (a.x.row_stride % 8 == 0 || a.x.rows == 1) &&
                       a.w.k % Source::kColumns == 0 && reinterpret_cast<uintptr_t>(a.x.data) % 16 == 0;
  // Where a turn of 16 units is more than two slices, a block has one.
  const int64_t blocks = whole            ? smaller<int64_t>(tiles, device.multiprocessors)
                         : tiles < kWarps ? slices
                                          : smaller<int64_t>(slices * tiles / kWarps, device.multiprocessors);
  const int64_t shares = whole ? tiles : slices * tiles;
  const Args<Source> args{
      .w = Source::matrix(a.w),
      .x = {static_cast<const uint16_t*>(a.x.data), a.x.row_stride, a.x.column_stride, a.w.k,
            static_cast<int>(a.x.rows), a.x.dtype == DType::BF16, aligned},
      .bias = static_cast<const uint16_t*>(a.bias),
      .y = static_cast<uint16_t*>(a.y),
      .partials = whole ? nullptr : static_cast<float*>(call.workspace),
      .n = a.w.n,
      .tiles = static_cast<int>(tiles),
      .pieces = static_cast<int>(pieces),
      .slices_log2 = log2,
      .longest = static_cast<int>(longest),
      .kept = static_cast<int>(kept),
      .each = static_cast<int>(shares / blocks),
      .more = static_cast<int>(shares % blocks),
      .round = static_cast<int>(round),
      .rooms = static_cast<int>(rooms),
  };
  launch({.grid = static_cast<unsigned>(blocks),
          .block = kThreads,
          .shared_bytes = fixed(rooms) + others,
          .name = "linear_rows",
          .stream = call.stream},
         linear_rows_kernel<Source>, args);
  if (!whole) {
    rows_sums({args.partials, args.bias, args.y, m, a.w.n, tiles * 16, static_cast<int>(slices), args.x.bf16},
              call.stream);
  }
}

// The kernels of a format with planes, the widest pieces first: their columns, and the groups in them.
template <int Columns, int Sections>
struct Pieces {};
template <class... Widest>
struct Choice {};

template <int Row>
struct KernelsOf : Choice<Pieces<128, 1>, Pieces<64, 1>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt4> : Choice<Pieces<256, 2>, Pieces<128, 1>, Pieces<128, 2>, Pieces<128, 4>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt3> : Choice<Pieces<64, 1>> {};
template <>
struct KernelsOf<kInt2> : Choice<Pieces<128, 1>, Pieces<128, 2>> {};
template <>
struct KernelsOf<kNf4> : Choice<Pieces<256, 4>, Pieces<128, 2>, Pieces<32, 1>> {};

template <int Row, int Columns, int Sections>
bool launch_where_it_fits(const RowsCall& call, Pieces<Columns, Sections>) {
  using Source = PlaneFragments<Row, Columns, Sections>;
  if (!Source::fits(call.args.w) || !has_room<Source>()) return false;
  launch_rows<Source>(call);
  return true;
}

template <int Row, class... Widest>
void launch_widest(const RowsCall& call, Choice<Widest...>) {
  const bool launched = (... || launch_where_it_fits<Row>(call, Widest{}));
  if (!launched) linear_rows_of<kRagged>(call);
}

}  // namespace

template <>
void linear_rows_of<BITFOLD_PART>(const RowsCall& call) {
  constexpr int kRow = BITFOLD_PART;
  if constexpr (kRow == kRagged) launch_rows<RaggedFragments>(call);
  else if constexpr (kRow == kQ4K) launch_rows<Q4KFragments>(call);
  else if constexpr (kRow >= kQ4_0) launch_rows<ChunkFragments<kRow>>(call);
  else launch_widest<kRow>(call, KernelsOf<kRow>());
}

}  // namespace bitfold::cuda
