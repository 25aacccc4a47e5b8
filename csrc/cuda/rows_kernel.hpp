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
#pragma once

#include "cuda/rows_copies.hpp"
#include "cuda/rows_sums.hpp"

namespace bitfold::cuda::rows {

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
    product.template add<M>(piece, room.at(), total);
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
    for (int i = 0; i < 2; ++i) rows[8 * i] = total[2 * i + j] * args.unit * factor;
  }
}

// Adds up the slices of a round's tiles, from `tile` on, in their order, and writes y.
template <class Source>
BITFOLD_DEVICE void reduce(const Args<Source>& args, int tile, int tiles, const float* sums) {
  const int each = 16 * args.x.m, slices = 1 << args.slices_log2;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * each; i += kThreads) {
    const int of_round = i / 16 / args.x.m, token = i / 16 - of_round * args.x.m, row = i % 16;
    const int64_t n = int64_t{tile + of_round} * 16 + row;
    if (n >= args.n) continue;
    const float* mine = sums + of_round * slices * each + token * 16 + row;
    float sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) sum += mine[slice * each];
    write_sum(args.y, args.bias, args.x.bf16, token, n, args.n, sum);
  }
}

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
  ptx::wait_for_earlier();  // for whom W, x and the bias may be to write, and y and the partial sums to read
  ptx::let_later_begin();
  feed.begin();
  Slices<Source> slices(args, memory.scales, x, warp);
  typename Slices<Source>::Eights eights;
  slices.begin(first, smaller(first + args.kept, last), eights);
#pragma unroll 1
  for (int i = 1; i < args.rooms; ++i) feed.template next<Manner::Any>();
  Room<Source::kRoom> room(ring, args.rooms);
  Room<Source::kHead> head(ring + args.rooms * Source::kRoom, args.rooms);
  Source::fill(args.w, memory.tables, static_cast<int>(threadIdx.x), kThreads);
  slices.finish(eights);
  auto* sums = reinterpret_cast<float*>(x + args.kept * slices.quads());
  const Manner manner = Source::manner(args.w);
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
      Product<Source> product(args, memory.tables, unit.tile, slices.x(unit.slice), args.longest, head.at());
      head.next();
      float total[4] = {};
      const bool finite = Source::kSums == 0 || Tokens<Source>::finite(args.x, scales);
      switch (finite ? manner : Manner::Any) {
        case Manner::Plain: multiply<Source, Manner::Plain>(unit, feed, product, room, total); break;
        case Manner::Full: multiply<Source, Manner::Full>(unit, feed, product, room, total); break;
        case Manner::Any: multiply<Source, Manner::Any>(unit, feed, product, room, total); break;
      }
      const int64_t rows = int64_t{args.tiles} * 16;
      if (whole) {
        leave<Source>(args, scales, total, sums + (turn + warp - round) * args.x.m * 16, 16);
      } else {
        leave<Source>(args, scales, total, args.partials + unit.slice * args.x.m * rows + int64_t{unit.tile} * 16,
                      rows);
      }
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

}  // namespace bitfold::cuda::rows
