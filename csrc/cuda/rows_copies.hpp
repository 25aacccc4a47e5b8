// The kernel for few rows (rows_kernel.hpp): which part of W is whose, and the ways of its packed bytes and of x into
// shared memory.
#pragma once

#include <type_traits>

#include "cuda/tokens.hpp"

namespace bitfold::cuda::rows {

inline constexpr int kWarps = 16;
inline constexpr int kThreads = kWarp * kWarps;
// Slices of x that a block may have at once.
inline constexpr int kSlices = 32;

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
  int rooms;       // of a warp's ring, 2, 3 or 4
  float unit;      // what sums are to be multiplied with
};

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
class Room {
 public:
  BITFOLD_DEVICE Room(std::byte* ring, int rooms) : ring_(ring), bytes_(rooms * Bytes) {}
  BITFOLD_DEVICE std::byte* at() const { return ring_ + at_; }
  BITFOLD_DEVICE void next() {
    at_ += Bytes;
    if (at_ == bytes_) at_ = 0;
  }

 private:
  std::byte* const ring_;
  const int bytes_;  // of all of them
  int at_ = 0;
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
    if (unit_ < units_) aim();
  }
  // What a unit has at once; next() does it for all but the first.
  BITFOLD_DEVICE void begin() {
    if (left_ > 0) begin_unit();
  }

  // The next piece into the next room of the ring, if there is one; a group of copies in either case.
  template <Manner M>
  BITFOLD_DEVICE void next() {
    if (left_ == 0) {
      if (unit_ < units_) aim(), begin_unit();
    }
    if (left_ > 0) {
      copies_.template fetch<M>(args_.w, room_.at());
      --left_;
    }
    ptx::cp_async_commit();
    room_.next();
  }

  // Until the oldest piece has come: all but the newest rooms - 2.
  BITFOLD_DEVICE void wait() const {
    if (args_.rooms == 3) ptx::cp_async_wait<1>();
    else if (args_.rooms == 4) ptx::cp_async_wait<2>();
    else ptx::cp_async_wait<0>();
  }

 private:
  BITFOLD_DEVICE void aim() {
    const Unit unit(args_, unit_);
    unit_ += kWarps;
    left_ = unit.end - unit.first;
    copies_ = typename Source::Copies(args_.w, int64_t{unit.tile} * 16, unit.first);
  }
  BITFOLD_DEVICE void begin_unit() {
    copies_.begin(args_.w, left_, head_.at());
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

// x in shared memory: some slices of all tokens, of which a warp brings a token's slice at a time. Where all slices are
// there and are as many as warps, or twice as many, a warp brings the slices that it multiplies, and waits for no
// other.
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
  // By all threads; they meet in it, after what they have done before, or after it.
  BITFOLD_DEVICE void finish(Eights& eights) {
    const bool own = args_.partials == nullptr && 1 << args_.slices_log2 >= kWarps;
    if (own && !std::is_empty_v<typename Source::Tables>) ptx::sync_block();
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
    if (own) ptx::sync_warp();
    else ptx::sync_block();
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

    BITFOLD_DEVICE Job(const Slices& s, int i) : token(i >> s.count_log2()) {
      const int slice = i & ((1 << s.count_log2()) - 1);
      first = Unit::first_of(s.args_, s.first_ + slice);
      pieces = Unit::first_of(s.args_, s.first_ + slice + 1) - first;
      x = s.x_ + slice * s.each_;
      scales = s.scales_ + slice;
    }
  };
  // Of the slices that are there: all, or one or two.
  BITFOLD_DEVICE int count_log2() const { return args_.partials == nullptr ? args_.slices_log2 : end_ - first_ - 1; }
  BITFOLD_DEVICE int jobs() const { return args_.x.m << count_log2(); }
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

}  // namespace bitfold::cuda::rows
