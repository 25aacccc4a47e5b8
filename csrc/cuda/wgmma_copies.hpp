// The way in of the kernel for many tokens (wgmma.hpp), as far ahead as there are stages: of one warpgroup three warps
// copy packed rows of W and their scales, and a thread of the fourth x, which must not wait for them. Barriers tell
// those who multiply.
#pragma once

#include "cuda/wgmma.hpp"

namespace bitfold::cuda {

// A stage that is filled and emptied in turn, and which half of its barriers' phases that is.
struct Turn {
  int slot = 0;
  unsigned parity = 0;
  BITFOLD_DEVICE void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// What a block of threads has, and where it lies.
template <int Row, int Quarters>
class WgmmaBlock {
 protected:
  using C = Chunk<Row>;
  static constexpr int kUnits = C::kColumns / kUnit;
  static constexpr int kSpans = C::kColumns / 32;  // scales of a row of planes
  static constexpr int kRows = wgmma_rows(Quarters), kTokens = Quarters * kQuarter;

  BITFOLD_DEVICE explicit WgmmaBlock(const TileParameter& p)
      : p_(p),
        memory_(shared<Bytes>().bytes),
        at_(wgmma_places(chunk_size<C>(), kRows, kTokens, p.shape.x_stages, p.shape.w_stages)),
        row0_(int64_t{blockIdx.x} * kRows),
        quarter0_(static_cast<int>(blockIdx.z) * Quarters),
        quarters_(smaller(Quarters, p.groups / 8 - quarter0_)),
        first_(static_cast<int>(int64_t{p.chunks} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{p.chunks} * (blockIdx.y + 1) / p.shape.splits)) {}

  BITFOLD_DEVICE WgmmaHead& head() const { return *reinterpret_cast<WgmmaHead*>(memory_); }
  BITFOLD_DEVICE uint8_t* w_stage(int slot) const { return memory_ + at_.w + slot * (kRows * kStride<C>); }
  BITFOLD_DEVICE uint8_t* x_stage(int slot) const { return memory_ + at_.x + slot * (Quarters * kQuarterBytes); }
  BITFOLD_DEVICE uint8_t* sums_stage(int slot) const {
    return memory_ + at_.sums + slot * (kTokens / 8 * kSumBytes<C>);
  }
  // Of a row, kSpans on end, and behind them the row's power of two.
  BITFOLD_DEVICE ScaledZero* scales_of(int slot, int row) const {
    return reinterpret_cast<ScaledZero*>(memory_ + at_.scales + (slot * kRows + row) * kScaleBytes<C>);
  }
  BITFOLD_DEVICE float& power_of(int slot, int row) const {
    return *reinterpret_cast<float*>(scales_of(slot, row) + kSpans);
  }
  // Where in its first piece a row's chunk begins.
  BITFOLD_DEVICE int skew(int64_t row, int chunk) const {
    if (!kSkewed<C> || !p_.in_words) return 0;
    return static_cast<int>(static_cast<uint32_t>(row) * static_cast<uint32_t>(p_.row_bytes) +
                            static_cast<uint32_t>(chunk) * C::kBytes) &
           15;
  }

  const TileParameter& p_;
  uint8_t* const memory_;
  const WgmmaPlaces at_;
  const int64_t row0_;
  const int quarter0_, quarters_;  // of this block
  const int first_, last_;         // chunks
};

// The warpgroup that copies.
template <int Row, int Quarters>
class WgmmaCopies : WgmmaBlock<Row, Quarters> {
  using Block = WgmmaBlock<Row, Quarters>;
  using C = Chunk<Row>;
  using Block::at_;
  using Block::first_;
  using Block::kRows;
  using Block::kSpans;
  using Block::kUnits;
  using Block::last_;
  using Block::memory_;
  using Block::p_;
  using Block::quarter0_;
  using Block::quarters_;
  using Block::row0_;
  static constexpr int kCopiers = 3 * kWarp;  // of W

 public:
  // Arrivals that fill a stage of W: of each copier one for its copies and one for what it stored, and one of the
  // thread that copies sums of x.
  static constexpr int kWArrivals = 2 * kCopiers + (kLacks<C> ? 1 : 0);

  BITFOLD_DEVICE WgmmaCopies(const TileParameter& p, int thread)
      : Block(p), thread_(thread), last_row_(static_cast<unsigned>(smaller<int64_t>(kRows, p.n - row0_) - 1)) {
    if constexpr (C::kPlanes) {
      if (p.planes.scale == Scale::Nested) nested_offset_ = *p.planes.nested_offset;
    }
  }

  // W doesn't wait for the kernel before, whose is x (arrange.cu).
  BITFOLD_DEVICE void run() {
    if (thread_ == kCopiers) bring_x();
    else if (thread_ < kCopiers) bring_w();
    ptx::wait_for_earlier();
  }

 private:
  // ---- W ----

  BITFOLD_DEVICE void bring_w() {
    if (!C::kPlanes || p_.wide_groups) bring_w<1>();
    else if (p_.whole_units) bring_w<2>();
    else bring_w<kQuad>();
  }
  // Scales: that four of them may be.
  template <int Scales>
  BITFOLD_DEVICE void bring_w() {
    if constexpr (C::kPlanes) {
      if (C::usual(p_.planes.scale) && (Scales == 1 || p_.scales_together)) {
        if (p_.planes.zeros == nullptr) return bring_w<Scales, Stored::Usual>();
        if constexpr (kLateZeros) return bring_w<Scales, Stored::WithZeros>();
      }
      if constexpr (C::kNested && Scales > 1) {
        if (p_.planes.scale == Scale::Nested && p_.scales_together) return bring_w<Scales, Stored::Nested>();
      }
    }
    bring_w<Scales, Stored::Any>();
  }
  // Those of 128 columns lie together, stored as the format's usually are (chunk_planes.hpp), and there are no zero
  // points, or there are; or they are nested, and several of them; or nothing is known.
  enum class Stored : uint8_t { Usual, WithZeros, Nested, Any };
  template <int Scales, Stored S>
  BITFOLD_DEVICE void bring_w() {
    WgmmaHead& head = this->head();
    // Chunks that no row ends within; where rows are that long that steps would need 64 bits, none goes that way.
    const int whole = !p_.in_words || p_.row_bytes >> 24 != 0  ? 0
                      : !kSkewed<C> && p_.k % C::kColumns == 0 ? p_.chunks
                                                               : p_.chunks - 1;
    const bool all = last_row_ + 1 == kRows;
    if (!all) clear_absent();
    const uint8_t* from = p_.codes + (row0_ + thread_ / kPieces<C>)*p_.row_bytes + int64_t{first_} * C::kBytes;
    // Scales are asked for two batches ahead, or one, as far as registers go: batch after batch, chunk after chunk.
    // (Of three turns those of unusual whole numbers one: what they would have on a stack, the usual loops had there,
    // too.)
    constexpr bool kFew = kTurnsOfScales > 2 && S == Stored::Any;
    constexpr int kAhead = !kFew && kTurnsOfScales * kHeld<S, Scales> <= 6 ? 2 : 1;
    LoadedScaleZero scales[kAhead][kTurnsOfScales][Scales];
    float power[kBatches][kTurnsOfScales];
#pragma unroll
    for (auto& of_batch : power) {
#pragma unroll
      for (float& one : of_batch) one = kFinest;
    }
    int before = -1;  // the slot of the chunk before
    const auto load = [&](int chunk, int batch, LoadedScaleZero(&of)[kTurnsOfScales][Scales]) {
      if constexpr (C::kPlanes) {
#pragma unroll
        for (int turn = 0; turn < kTurnsOfScales; ++turn) load_scales<S>(chunk, batch, turn, of[turn]);
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(first_, i, scales[i]);
    Turn w;
#pragma unroll 1
    for (int chunk = first_; chunk < last_; ++chunk, w.next(p_.shape.w_stages)) {
      ptx::barrier_wait(&head.w_empty[w.slot], w.parity ^ 1);
      if (chunk >= whole) copy_edge(chunk, w.slot);
      else if (all) copy_whole<true>(from, w.slot);
      else copy_whole<false>(from, w.slot);
      ptx::cp_async_arrive(&head.w_full[w.slot]);
      from += C::kBytes;
      const auto store = [&](int batch, const LoadedScaleZero(&of)[kTurnsOfScales][Scales]) {
        if constexpr (C::kPlanes) {
#pragma unroll
          for (int turn = 0; turn < kTurnsOfScales; ++turn) {
            store_scales<S>(chunk, batch, turn, of[turn], w.slot, before, power[batch][turn]);
          }
        }
      };
      store(0, scales[0]);
      load(chunk + kAhead - 1, kAhead % kBatches, scales[0]);
      store(1, scales[kAhead - 1]);
      ptx::barrier_arrive(&head.w_full[w.slot]);
      before = w.slot;
      load(chunk + 1, kAhead - 1, scales[kAhead - 1]);
    }
  }

  // Of a chunk of the rows that are there.
  BITFOLD_DEVICE int pieces() const { return static_cast<int>(last_row_ + 1) * kPieces<C>; }
  // No piece reaches beyond a row: pieces of all rows in turn, kCopiers at a time, or of those that are there. from: of
  // this thread's first row.
  template <bool All>
  BITFOLD_DEVICE void copy_whole(const uint8_t* from, int slot) const {
    constexpr int kAll = kRows * kPieces<C>, kRowStep = kCopiers / kPieces<C>, kPieceStep = kCopiers % kPieces<C>;
    const int there = All ? kAll : pieces();
    // Made anew, so that where each turn's piece lies isn't kept in registers.
    const int64_t step = ptx::anew(static_cast<int>(kRowStep * p_.row_bytes));
    int piece = thread_ % kPieces<C>;
    uint8_t* to = this->w_stage(slot) + thread_ / kPieces<C> * kStride<C> + 16 * piece;
    from += 16 * piece;
#pragma unroll(!All || kSkewed<C> || kPieceStep > 0 ? 2 : C::kBytes < C::kColumns ? 1 + kAll / kCopiers : 6)
    for (int i = 0; i < kAll; i += kCopiers) {
      if ((All && i + kCopiers <= kAll) || i + thread_ < there) {
        const int within = kSkewed<C> ? static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15) : 0;
        ptx::cp_async<16>(to, from - within);
      }
      from += step;
      to += kRowStep * kStride<C>;
      if constexpr (kPieceStep > 0) {
        piece += kPieceStep;
        const bool wraps = piece >= kPieces<C>;
        piece -= wraps ? kPieces<C> : 0;
        from += wraps ? p_.row_bytes + 16 * (kPieceStep - kPieces<C>) : 16 * kPieceStep;
        to += wraps ? kStride<C> + 16 * (kPieceStep - kPieces<C>) : 16 * kPieceStep;
      }
    }
  }
  // Rows that aren't there are zeros in all stages, once and for all: whatever else lay there may take a row's power of
  // two from chunk to chunk.
  BITFOLD_DEVICE void clear_absent() const {
    const auto first = static_cast<int>(last_row_ + 1);
#pragma unroll 1
    for (int slot = 0; slot < p_.shape.w_stages; ++slot) {
      auto* to = reinterpret_cast<uint4*>(this->w_stage(slot) + first * kStride<C>);
#pragma unroll 1
      for (int i = thread_; i < (kRows - first) * kStride<C> / 16; i += kCopiers) to[i] = {};
    }
  }
  // What lies beyond a row's end becomes zero.
  BITFOLD_DEVICE void copy_edge(int chunk, int slot) const {
    const int64_t begin = int64_t{chunk} * C::kBytes;
    const int length = static_cast<int>(smaller<int64_t>(C::kBytes, p_.row_bytes - begin));
#pragma unroll 1
    for (int i = thread_; i < pieces(); i += kCopiers) {
      const int row = i / kPieces<C>, at = 16 * (i % kPieces<C>);
      const uint8_t* from = p_.codes + (row0_ + row) * p_.row_bytes + begin;
      uint8_t* to = this->w_stage(slot) + row * kStride<C> + at;
      if (p_.in_words) {
        const int within = this->skew(row0_ + row, chunk), bytes = smaller(within + length - at, 16);
        if (at >= within + C::kBytes) continue;
        if (bytes > 0) ptx::cp_async<16>(to, from - within + at, bytes);
        else ptx::cp_async<16>(to, p_.codes, 0);
      } else {
#pragma unroll 1
        for (int b = 0; b < 16; ++b) to[b] = at + b < length ? ptx::load1(from + at + b) : uint8_t{0};
      }
    }
  }

  // ---- scales of planes: a thread has four of a row (128 columns) in each turn of a batch, a half of the rows ----

  static constexpr int kQuad = 4, kQuads = kSpans / kQuad, kBatches = 2, kBatchRows = kRows / kBatches;
  static_assert(kSpans % kQuad == 0);
  // Zero points stay in their bytes until they are wanted, so that nothing waits for them before; but those of 3 bits,
  // which may lie in two.
  static constexpr bool kLateZeros = [] {
    if constexpr (C::kPlanes) return C::kInteger && 8 % C::kBits == 0;
    else return false;
  }();
  static constexpr int kTurnsOfScales = (kBatchRows * kQuads + kCopiers - 1) / kCopiers;
  // Scales that lie together come as words, the first in `bits` of the first and so on; in its `more` zero points (the
  // last two of four of 8 bits in the second's), or what multiplies all nested ones there.
  template <Stored S, int Scales>
  static constexpr bool kTogether = S != Stored::Any && Scales > 1;
  template <Stored S>
  static constexpr int kScaleSize = [] {
    if constexpr (S == Stored::Nested) return 1;
    else if constexpr (C::kPlanes) return C::kStored == Scale::F32 ? 4 : 2;
    else return 0;
  }();
  template <Stored S, int Scales>
  static constexpr int kHeld = kTogether<S, Scales> ? (Scales * kScaleSize<S> + 3) / 4 : Scales;  // words of a quad

  template <Stored S, int Scales>
  BITFOLD_DEVICE void load_scales(int chunk, int batch, int turn, LoadedScaleZero (&loaded)[Scales]) const {
    const auto i = static_cast<unsigned>(thread_ + turn * kCopiers);
    if (i >= kBatchRows * kQuads) return;
    const auto of_batch = static_cast<unsigned>(batch * kBatchRows);
    const auto row = C::scale_row(p_.planes, row0_ + smaller(of_batch + i / kQuads, last_row_));
    if constexpr (kTogether<S, Scales>) {
      const uint32_t group = group_of_quad<Scales>(chunk, i);
      uint32_t words[kHeld<S, Scales>];
      load_on_end<Scales * kScaleSize<S>>(row.scales + group * kScaleSize<S>, words);
#pragma unroll
      for (int word = 0; word < kHeld<S, Scales>; ++word) loaded[word].bits = words[word];
      if constexpr (S == Stored::WithZeros) load_zeros(row.zeros + group * C::kBits / 8, loaded);
      // (Quads never lie across what one number multiplies.)
      if constexpr (S == Stored::Nested)
        loaded[0].more = ptx::load4(p_.planes.nested_scales + (row.first + group) / kNestedGroup);
    } else {
#pragma unroll
      for (int s = 0; s < Scales; ++s) {
        const uint32_t group = group_of<Scales>(chunk, i, s);
        loaded[s] = C::load_scale(p_.planes, row, group, stored<S>());
        if constexpr (C::kInteger) {
          if (zeros<S>()) {
            loaded[s].more = kLateZeros ? ptx::load1(row.zeros + group * C::kBits / 8)
                                        : read_code(row.zeros, group, C::kBits, false);
          }
        }
      }
    }
  }
  // A thread's in a turn, whose rows and quads are numbered by i: the first 32 columns of its quad, counted in 32.
  BITFOLD_DEVICE static uint32_t quad_of(int chunk, unsigned i) {
    return static_cast<uint32_t>(chunk) * kSpans + i % kQuads * kQuad;
  }
  // Of its scale s.
  template <int Scales>
  BITFOLD_DEVICE uint32_t group_of(int chunk, unsigned i, int s) const {
    return p_.planes.pieces.divide(smaller(quad_of(chunk, i) + kQuad / Scales * s, p_.last_run));
  }
  // The first, where groups have 32 or 64 columns and k whole quads.
  template <int Scales>
  BITFOLD_DEVICE uint32_t group_of_quad(int chunk, unsigned i) const {
    return smaller(quad_of(chunk, i), p_.last_run + 1 - kQuad) / (kQuad / Scales);
  }
  template <int Scales>
  BITFOLD_DEVICE static void load_zeros(const uint8_t* from, LoadedScaleZero (&loaded)[Scales]) {
    constexpr int kAll = Scales * C::kBits;  // bits
    if constexpr (kAll > 8) loaded[0].more = ptx::load2(from);
    else loaded[0].more = ptx::load1(from);
    if constexpr (kAll > 16) loaded[1].more = ptx::load2(from + 2);
  }
  // What was loaded for scale s.
  template <Stored S, int Scales>
  BITFOLD_DEVICE LoadedScaleZero loaded_scale(const LoadedScaleZero (&loaded)[Scales], int chunk, unsigned i,
                                              int s) const {
    LoadedScaleZero mine = loaded[s];
    if constexpr (kTogether<S, Scales>) {
      if constexpr (kScaleSize<S> == 2) mine.bits = loaded[s / 2].bits >> 16 * (s % 2);
      if constexpr (S == Stored::Nested) mine = {loaded[0].bits >> 8 * s & 255u, loaded[0].more};
      if constexpr (S == Stored::WithZeros) {
        constexpr int kEach = smaller(16 / C::kBits, Scales);  // in a `more`
        const uint32_t first = Scales * C::kBits < 8 ? group_of_quad<Scales>(chunk, i) * C::kBits % 8 : 0;
        mine.more = loaded[s / kEach].more >> (first + static_cast<uint32_t>(s % kEach * C::kBits));
      } else if constexpr (C::kInteger) {
        mine.more = 1u << (C::kBits - 1);
      }
    } else if constexpr (kLateZeros) {
      if (zeros<S>()) mine.more >>= group_of<Scales>(chunk, i, s) * C::kBits % 8;
    }
    if constexpr (kLateZeros) mine.more &= (1u << C::kBits) - 1;
    return mine;
  }
  // Where rows' powers of two stay from chunk to chunk: in registers, or, where zero points of three turns leave none,
  // with the scales of the chunk before, each thread's by itself.
  template <Stored S>
  static constexpr bool kKeepsPowers = kTurnsOfScales < 3 || S == Stored::Usual || S == Stored::Nested;
  // before: the slot of the chunk before, or -1; kept: the row's power so far.
  template <Stored S, int Scales>
  BITFOLD_DEVICE void store_scales(int chunk, int batch, int turn, const LoadedScaleZero (&loaded)[Scales], int slot,
                                   int before, float& kept) const {
    const auto i = static_cast<unsigned>(thread_ + turn * kCopiers);
    if (i >= kBatchRows * kQuads) return;  // whole warps
    const int row = batch * kBatchRows + static_cast<int>(i / kQuads);
    auto* to = reinterpret_cast<uint4*>(this->scales_of(slot, row) + i % kQuads * kQuad);
    ScaleZero made[Scales];
    const float* map = nullptr;
    if constexpr (C::kNested) map = C::nested(memory_ + at_.tables)->map;
    float peak = 0.0f;
#pragma unroll
    for (int s = 0; s < Scales; ++s) {
      made[s] = C::scale_zero(p_.planes, loaded_scale<S>(loaded, chunk, i, s), stored<S>(), map, nested_offset_);
      peak = larger(peak, finite_magnitude(made[s].scale));
    }
    static_assert(kQuads <= 2);
    if constexpr (kQuads == 2) peak = larger(peak, ptx::shuffle_xor(peak, 1));
    float power = kept;
    if constexpr (!kKeepsPowers<S>) power = before < 0 ? kFinest : (&this->power_of(before, row))[i % kQuads];
    const bool changes = ptx::any(peak * power >= kScaleLimit<C>);  // seldom
    if (changes) power = power_for<C>(peak, power);
    if (i % (16 * kQuads) == 0) this->head().changes[slot][row / 16] = changes ? 1 : 0;
    uint32_t scaled[Scales];
#pragma unroll
    for (int s = 0; s < Scales; ++s) {
      const float scale = made[s].scale * power;
      scaled[s] = ptx::floats_to_halves(scale, scale);
    }
#pragma unroll
    for (int s = 0; s < kQuad; s += 2) {
      const int low = s * Scales / kQuad, high = (s + 1) * Scales / kQuad;
      to[s / 2] = {scaled[low], made[low].zero, scaled[high], made[high].zero};
    }
    if constexpr (kKeepsPowers<S>) {
      kept = power;
      if (i % kQuads == 0) this->power_of(slot, row) = power;
    } else {
      (&this->power_of(slot, row))[i % kQuads] = power;
    }
  }
  template <Stored S>
  BITFOLD_DEVICE Scale stored() const {
    if constexpr (S == Stored::Nested) return Scale::Nested;
    else if constexpr (S != Stored::Any) return C::kStored;
    else return p_.planes.scale;
  }
  template <Stored S>
  BITFOLD_DEVICE bool zeros() const {
    if constexpr (S != Stored::Any) return S == Stored::WithZeros;
    else return p_.planes.zeros != nullptr;
  }

  // ---- x, and its sums: whole quarters on end ----

  BITFOLD_DEVICE void bring_x() {
    ptx::wait_for_earlier();
    ptx::let_later_begin();
    WgmmaHead& head = this->head();
    const int64_t step = int64_t{p_.groups / 8} * kQuarterBytes;  // from unit to unit
    const uint8_t* from = p_.x + int64_t{first_} * kUnits * step + quarter0_ * kQuarterBytes;
    Turn w, x;
#pragma unroll 1
    for (int chunk = first_; chunk < last_; ++chunk) {
      if constexpr (kLacks<C>) {
        ptx::barrier_wait(&head.w_empty[w.slot], w.parity ^ 1);
        const uint8_t* sums = p_.sums + (int64_t{chunk} * p_.groups + quarter0_ * 8) * kSumBytes<C>;
        copy(this->sums_stage(w.slot), sums, quarters_ * 8 * kSumBytes<C>, &head.w_full[w.slot]);
        w.next(p_.shape.w_stages);
      }
#pragma unroll 1
      for (int unit = 0; unit < kUnits; ++unit) {
        ptx::barrier_wait(&head.x_empty[x.slot], x.parity ^ 1);
        copy(this->x_stage(x.slot), from, quarters_ * kQuarterBytes, &head.x_full[x.slot]);
        from += step;
        x.next(p_.shape.x_stages);
      }
    }
  }
  BITFOLD_DEVICE static void copy(uint8_t* to, const uint8_t* from, int bytes, ptx::Barrier* barrier) {
    ptx::barrier_expect(barrier, static_cast<unsigned>(bytes));
    ptx::copy_bulk(to, from, static_cast<unsigned>(bytes), barrier);
  }

  const int thread_;
  const unsigned last_row_;  // of the block's that is there
  float nested_offset_ = 0.0f;
};

}  // namespace bitfold::cuda
