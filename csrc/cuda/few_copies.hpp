// The way in of the kernel for few tokens on Hopper (linear_few.hpp): one warpgroup copies packed rows of W, x and its
// sums, as far ahead as there are stages, and barriers tell those who multiply, who load their own scales.
#pragma once

#include "cuda/few.hpp"
#include "cuda/wgmma_copies.hpp"

namespace bitfold::cuda {

// Of the stages: filled, and free again.
struct FewBarriers {
  ptx::Barrier full[kFewStages], empty[kFewStages];
};
static_assert(sizeof(FewBarriers) <= kFewBarrierBytes);

// What a block of threads has, and where it lies.
template <int Row>
class FewBlock {
 protected:
  using C = Chunk<Row>;
  using Stage = FewStage<C>;
  static constexpr int kChunks = Stage::kColumns / C::kColumns;  // of a stage

  BITFOLD_DEVICE FewBlock(const TileParameter& p, const FewSize& size)
      : p_(p),
        at_(few_places(size, p.groups, p.shape.w_stages)),
        memory_(shared<Bytes>().bytes),
        row0_(int64_t{blockIdx.x} * kFewRows),
        stages_(ceil_div(p.chunks, kChunks)),
        first_(static_cast<int>(int64_t{stages_} * blockIdx.y / p.shape.splits)),
        last_(static_cast<int>(int64_t{stages_} * (blockIdx.y + 1) / p.shape.splits)) {}

  BITFOLD_DEVICE FewBarriers& barriers() const { return *reinterpret_cast<FewBarriers*>(memory_); }
  BITFOLD_DEVICE uint8_t* stage(int slot) const { return memory_ + at_.stages + slot * at_.stage; }
  // Units of a stage that there are: the last may have fewer.
  BITFOLD_DEVICE int units(int stage) const {
    return smaller(Stage::kUnits, p_.chunks * (C::kColumns / kUnit) - stage * Stage::kUnits);
  }
  // Where in its first piece a row's stage begins.
  BITFOLD_DEVICE int skew(int64_t row, int stage) const {
    if (!Stage::kSkewed || !p_.in_words) return 0;
    return static_cast<int>(static_cast<uint32_t>(row) * static_cast<uint32_t>(p_.row_bytes) +
                            static_cast<uint32_t>(stage) * Stage::kBytes) &
           15;
  }

  const TileParameter& p_;
  const FewPlaces at_;
  uint8_t* const memory_;
  const int64_t row0_;
  const int stages_, first_, last_;  // of a row; this block's
};

// The warpgroup that copies.
template <int Row>
class FewCopies : FewBlock<Row> {
  using Block = FewBlock<Row>;
  using C = Chunk<Row>;
  using Stage = FewStage<C>;
  using Block::at_;
  using Block::first_;
  using Block::last_;
  using Block::p_;
  using Block::row0_;
  using Block::stages_;

 public:
  // Arrivals that fill a stage: of each thread one for its copies and one for what it stored, and one for x.
  static constexpr int kArrivals = 2 * kFewCopy + 1;

  BITFOLD_DEVICE FewCopies(const TileParameter& p, const FewSize& size, int thread)
      : Block(p, size), thread_(thread), rows_(static_cast<int>(smaller<int64_t>(p.n - row0_, kFewRows))) {}

  // W doesn't wait for the kernel before, whose is x (arrange.cu): until that has ended it comes alone, as far as there
  // are stages.
  BITFOLD_DEVICE void run() {
    FewBarriers& barriers = this->barriers();
    const int with_x = smaller(first_ + p_.shape.w_stages, last_) - 1;  // the stage after which x comes, too
    // A row's last stage may end within it, and the matrix's last row within a piece.
    const bool ends = stages_ * int64_t{Stage::kBytes} > p_.row_bytes || (Stage::kSkewed && row0_ + kFewRows >= p_.n);
    Turn turn;
    const uint8_t* from = p_.codes + (row0_ + thread_ / kLanes) * p_.row_bytes + int64_t{first_} * Stage::kBytes;
    // Counted: a thread that copies has few registers, and would have the last stage on its stack, which is far away.
    int left = last_ - first_;
#pragma unroll 1
    for (int stage = first_; left > 0; ++stage, --left) {
      ptx::Barrier* full = &barriers.full[turn.slot];
      uint8_t* to = this->stage(turn.slot);
      ptx::barrier_wait(&barriers.empty[turn.slot], turn.parity ^ 1);
      if (thread_ == 0 && stage >= with_x) {
        if (stage == with_x) begin_x(with_x);
        copy_x(stage, to, full);
      }
      if (!p_.in_words) copy_bytes(stage, to);
      else if (rows_ < kFewRows || (ends && stage + 1 == stages_)) copy_words<true>(from, stage, to);
      else copy_words<false>(from, stage, to);
      from += Stage::kBytes;
      if constexpr (C::kPlanes) {
        if (!p_.wide_groups) prefetch_scales(stage, left == last_ - first_);
      }
      ptx::cp_async_arrive(full);
      ptx::barrier_arrive(full);
      turn.next(p_.shape.w_stages);
    }
    ptx::wait_for_earlier();
  }

 private:
  // So many threads copy a row together, of every kRowStep-th one. All rows of a thread begin at the same place of a
  // piece, for they have an even number of bytes.
  static constexpr int kLanes = Stage::kPieces % 8 == 0 ? 8 : 4;
  static constexpr int kRowStep = kFewCopy / kLanes;
  static_assert(kRowStep % 8 == 0);

  // From the thread's first row on. Rows that aren't there are left out. Edge: so they may be, and what lies beyond a
  // row's end becomes zero.
  template <bool Edge>
  BITFOLD_DEVICE void copy_words(const uint8_t* from, int stage, uint8_t* to) const {
    const int first = thread_ / kLanes, piece = thread_ % kLanes;
    int left = static_cast<int>(smaller<int64_t>(p_.row_bytes - int64_t{stage} * Stage::kBytes, Stage::kBytes));
    if (Stage::kSkewed) {
      const auto within = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
      from -= within;
      left += within;
    }
    from += 16 * piece;
    left -= 16 * piece;
    to += first * Stage::kStride + 16 * piece;
    const int64_t step = kRowStep * p_.row_bytes;
#pragma unroll(Edge ? 1 : 4)
    for (int row = Edge ? first : 0; row < (Edge ? rows_ : kFewRows); row += kRowStep) {
#pragma unroll
      for (int more = 0; more < Stage::kPieces; more += kLanes) {
        if (more + kLanes > Stage::kPieces && piece + more >= Stage::kPieces) continue;
        if constexpr (Edge) {
          const int bytes = smaller(larger(left - 16 * more, 0), 16);
          ptx::cp_async<16>(to + 16 * more, bytes > 0 ? from + 16 * more : p_.codes, bytes);
        } else {
          ptx::cp_async<16>(to + 16 * more, from + 16 * more);
        }
      }
      from += step;
      to += kRowStep * Stage::kStride;
    }
  }
  // Rows that begin anywhere.
  BITFOLD_DEVICE void copy_bytes(int stage, uint8_t* to) const {
    const int64_t begin = int64_t{stage} * Stage::kBytes;
    const int length = static_cast<int>(smaller<int64_t>(Stage::kBytes, p_.row_bytes - begin));
#pragma unroll 1
    for (int i = thread_; i < rows_ * Stage::kPieces; i += kFewCopy) {
      const int row = i / Stage::kPieces, at = 16 * (i % Stage::kPieces);
      const uint8_t* from = p_.codes + (row0_ + row) * p_.row_bytes + begin + at;
      uint8_t* place = to + row * Stage::kStride + at;
#pragma unroll 2
      for (int b = 0; b < 16; ++b) place[b] = at + b < length ? ptx::load1(from + b) : uint8_t{0};
    }
  }
  // Those who multiply ask for a stage's scales and zero points one stage before, which is less than memory may take. A
  // row's sectors, of 32 bytes, are asked for as its stages come to them.
  BITFOLD_DEVICE void prefetch_scales(int stage, bool begins) const {
    constexpr int kPieces = Stage::kColumns / 32;
    const PlaneMatrix& w = p_.planes;
    const auto piece = static_cast<uint32_t>(stage * kPieces);
    const uint32_t first = w.pieces.divide(smaller(piece, p_.last_run));
    const uint32_t last = w.pieces.divide(smaller(piece + kPieces - 1, p_.last_run));
    const auto come_to = [&](const uint8_t* begin, const uint8_t* from, const uint8_t* to) {
      const auto sector = [](const uint8_t* byte) { return reinterpret_cast<uintptr_t>(byte) / 32; };
      if (from == begin || begins || sector(from - 1) != sector(to)) ptx::prefetch_sector(to);
    };
#pragma unroll 1
    for (int i = thread_; i < rows_; i += kFewCopy) {
      const int64_t row = row0_ + i;
      const uint8_t* scales = w.scales + scale_row_of<C::kRow>(w, row) * w.row_scales * w.scale_bytes;
      come_to(scales, scales + first * w.scale_bytes, scales + last * w.scale_bytes);
      if constexpr (C::kInteger) {
        if (w.zeros == nullptr) continue;
        const uint8_t* zeros = w.zeros + row * w.row_zeros;
        come_to(zeros, zeros + first * C::kBits / 8, zeros + last * C::kBits / 8);
      }
    }
  }
  // x of all stages before, which are the first.
  BITFOLD_DEVICE void begin_x(int end) const {
    ptx::wait_for_earlier();
    ptx::let_later_begin();
#pragma unroll 1
    for (int stage = first_; stage < end; ++stage) {
      copy_x(stage, this->stage(stage - first_), &this->barriers().full[stage - first_]);
    }
  }
  // x of a stage's units, and its sums, lie together.
  BITFOLD_DEVICE void copy_x(int stage, uint8_t* to, ptx::Barrier* full) const {
    const int64_t each = int64_t{p_.groups} * kUnitBytes;
    const auto bytes = static_cast<unsigned>(this->units(stage) * each);
    const auto sums = static_cast<unsigned>(p_.groups * Stage::kSums);
    static_assert(C::kMins == 0 || Block::kChunks == 1);
    ptx::barrier_expect(full, bytes + sums);
    ptx::copy_bulk(to + at_.x, p_.x + stage * Stage::kUnits * each, bytes, full);
    if constexpr (C::kMins > 0) ptx::copy_bulk(to + at_.sums, p_.sums + int64_t{stage} * sums, sums, full);
  }

  const int thread_, rows_;  // rows that are there
};

// What a loop may take for granted of a matrix's scales and zero points.
template <class C>
BITFOLD_DEVICE Manner few_manner(const PlaneMatrix& w) {
  if (C::usual(w.scale) && w.zeros == nullptr) return Manner::Plain;
  if (C::usual(w.scale) && C::kInteger) return Manner::Full;
  return C::kNested && w.scale == Scale::Nested ? Manner::Full : Manner::Any;
}

// Scales of planes: a warp's own, of its 32 rows and its half of a stage's columns, Entries of them for a row, each of
// Span steps (or one for all). Those of the next stage are on their way while one is multiplied: nothing looks at what
// is loaded before open(). Keeps: where its row's lie, for which many tokens leave no registers.
template <class C, int Span, bool One, Manner M, bool Keeps>
class FewScales {
  using Stage = FewStage<C>;
  static constexpr int kHalf = Stage::kColumns / 2;  // columns
  static constexpr int kEntries = One ? 1 : kHalf / (16 * Span);
  static constexpr int kPieces = Span / 2;  // of 32 columns, to an entry
  static constexpr int kBits = C::kBits;
  static constexpr uint32_t kMask = (1u << kBits) - 1;
  static constexpr bool kNested = C::kNested && M != Manner::Plain;

 public:
  static constexpr bool kOne = One, kZeros = C::kInteger && M != Manner::Plain;

  // row0: the block's first row; nested: what nested scales take.
  BITFOLD_DEVICE FewScales(const TileParameter& p, int64_t row0, int column_warp, const NestedScales* nested)
      : p_(p),
        row0_(row0),
        column_warp_(column_warp),
        piece_(static_cast<uint32_t>(column_warp * kHalf / 32)),
        nested_(nested) {
    if constexpr (Keeps) places_ = find_places();
  }

  BITFOLD_DEVICE void load(int stage) {
    const auto row = Keeps ? places_ : find_places();
    if (together()) {
      const uint32_t group = group_of(stage, 0);
      if (stored() == Scale::F32) load_bits<4 * kEntries>(row.scales + 4 * group);
      else if (kNested && stored() == Scale::Nested) load_bits<kEntries>(row.scales + group);
      else load_bits<2 * kEntries>(row.scales + 2 * group);
      if (kNested && stored() == Scale::Nested) more_[0] = load_nested(row, group);
      if (has_zeros()) load_zeros(row.zeros, group);
      return;
    }
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const uint32_t group = group_of(stage, i);
      if (stored() == Scale::F32) bits_[i] = ptx::load4(row.scales + 4 * group);
      else if (kNested && stored() == Scale::Nested) bits_[i] = ptx::load1(row.scales + group);
      else bits_[i] = ptx::load2(row.scales + 2 * group);
      if (kNested && stored() == Scale::Nested) more_[i] = load_nested(row, group);
      if (has_zeros()) C::load_zero(row.zeros, group, more_[i], behind_[kBits == 3 ? i : 0]);
    }
  }
  // Those that have come, of this lane's rows.
  BITFOLD_DEVICE void open(int stage) {
    const bool together = this->together();
    const float* map = kNested ? nested_->map : nullptr;
    const float offset = kNested ? nested_->mine() : 0.0f;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      LoadedScaleZero loaded{.bits = bits_[i], .more = 0};
      if (together) {
        if (kNested && stored() == Scale::Nested) loaded.bits = bits_[0] >> 8 * i & 255u;
        else if (stored() != Scale::F32) loaded.bits = bits_[i / 2] >> 16 * (i % 2);
      }
      if constexpr (kNested) loaded.more = together ? more_[0] : more_[i];
      if constexpr (kZeros) loaded.more = has_zeros() ? zero_of(stage, i, together) : 1u << (kBits - 1);
      mine_[i] = C::scale_zero(p_.planes, loaded, stored(), map, offset);
    }
    if constexpr (One) {
#pragma unroll
      for (int row = 0; row < 2 * kTiles; ++row) all_[row] = ptx::shuffle_of_four(mine_[0].scale, row);
    }
  }
  // Of row 8 i + g of tile r.
  BITFOLD_DEVICE float scale(int entry, int r, int i) const {
    return One ? all_[2 * r + i] : ptx::shuffle_of_four(mine_[entry].scale, 2 * r + i);
  }
  BITFOLD_DEVICE uint32_t zero(int entry, int r, int i) const {
    return ptx::shuffle_of_four(mine_[entry].zero, 2 * r + i);
  }

 private:
  // A lane has row 8 t + g of its warp's, which is row 8 i + g of tile r where t = 2 r + i.
  BITFOLD_DEVICE typename C::ScaleRow find_places() const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int row = thread / kWarp % kFewRowWarps * (kTiles * 16) + lane % 4 * 8 + lane / 4;
    const int last = static_cast<int>(smaller<int64_t>(p_.n - row0_, kFewRows)) - 1;
    return C::scale_row(p_.planes, row0_, static_cast<uint32_t>(smaller(row, last)), stored());
  }
  BITFOLD_DEVICE Scale stored() const {
    if (M == Manner::Plain) return C::kStored;
    if (M == Manner::Full) return C::kNested ? Scale::Nested : C::kStored;
    return p_.planes.scale;
  }
  BITFOLD_DEVICE bool has_zeros() const { return kZeros && (M == Manner::Full || p_.planes.zeros != nullptr); }
  // Whether one load brings all entries.
  BITFOLD_DEVICE bool together() const { return kEntries > 1 && p_.scales_together; }

  // Of entry i; of the last one of the row where that ends before. Together: entries that are there are all there.
  BITFOLD_DEVICE uint32_t group_of(int stage, int i) const {
    // Made anew where it would lie on a stack.
    const uint32_t piece = Keeps ? piece_ : static_cast<uint32_t>(ptx::anew(column_warp_) * (kHalf / 32));
    const uint32_t first = piece + static_cast<uint32_t>(stage * (Stage::kColumns / 32));
    if (together()) return smaller(first, p_.last_run + 1 - kHalf / 32) / kPieces + static_cast<uint32_t>(i);
    return p_.planes.pieces.divide(smaller(first + static_cast<uint32_t>(i * kPieces), p_.last_run));
  }
  template <int Bytes>
  BITFOLD_DEVICE void load_bits(const uint8_t* from) {
    constexpr int kWords = (Bytes + 3) / 4;
    uint32_t words[kWords];
    load_on_end<Bytes>(from, words);
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits_[i] = words[i];
  }
  BITFOLD_DEVICE uint32_t load_nested(const typename C::ScaleRow& row, uint32_t group) const {
    return ptx::load4(p_.planes.nested_scales + (row.first + group) / kNestedGroup);
  }
  BITFOLD_DEVICE void load_zeros(const uint8_t* zeros, uint32_t group) {
    if constexpr (kBits == 3) {
#pragma unroll
      for (int i = 0; i < kEntries; ++i) C::load_zero(zeros, group + static_cast<uint32_t>(i), more_[i], behind_[i]);
    } else if constexpr (kEntries * kBits > 8) {
      more_[0] = ptx::load2(zeros + group * kBits / 8);
    } else {
      more_[0] = ptx::load1(zeros + group * kBits / 8);
    }
  }
  BITFOLD_DEVICE uint32_t zero_of(int stage, int i, bool together) const {
    if (kBits != 3 && together)
      return more_[0] >> (group_of(stage, 0) * kBits % 8 + static_cast<uint32_t>(i * kBits)) & kMask;
    return C::zero_of(more_[i], behind_[kBits == 3 ? i : 0], group_of(stage, i));
  }

  const TileParameter& p_;
  const int64_t row0_;
  const int column_warp_;
  const uint32_t piece_;  // of 32 columns
  const NestedScales* const nested_;
  typename C::ScaleRow places_;
  // As they were loaded: a scale's bits, or those of all; a zero point with its neighbours, or what multiplies a nested
  // scale; of zero points of three bits the byte behind, too.
  uint32_t bits_[kEntries], more_[kEntries], behind_[kBits == 3 ? kEntries : 1];
  ScaleZero mine_[kEntries];
  float all_[One ? 2 * kTiles : 1];
};

}  // namespace bitfold::cuda
