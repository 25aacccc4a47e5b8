// K-quants and IQ4_XS as sources of fragments (fragments.hpp): 16 or 32 columns share a scale, which comes to fp32
// sums.
//
// The scales and minima of a block are a few bits each, here and there: each of a row's four lanes opens a quarter of
// them, and leaves the scales as floats for the others, in the room. What codes are, and where, is codes_k.hpp's.
#pragma once

#include <type_traits>

#include "cuda/codes_k.hpp"
#include "cuda/fragments_chunks.hpp"

namespace bitfold::cuda {

// Blocks that are whole pieces of 16 bytes, 16 rows of them: the lanes copy these in turn, so that what they ask for
// together is few runs of memory.
template <int Bytes, int Stride>
class WholeCopies {
  static constexpr int kQuads = Bytes / 16, kTurns = (16 * kQuads + kWarp - 1) / kWarp;
  static_assert(Bytes % 16 == 0 && kTurns <= 8);

 public:
  WholeCopies() = default;
  BITFOLD_DEVICE WholeCopies(const BlockMatrix& w, int64_t row, int piece)
      : next_(w.blocks + row * w.row_bytes + int64_t{piece} * Bytes),
        last_(static_cast<uint32_t>(smaller<int64_t>(w.n - 1 - row, 15))) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const auto mine = static_cast<uint32_t>(smaller((turn * kWarp + ptx::lane_id()) / kQuads, 15));
      to_ |= mine << 4 * turn;
      from_ |= smaller(mine, last_) << 4 * turn;
    }
  }
  BITFOLD_DEVICE void begin(const BlockMatrix&, int, std::byte*) const {}
  template <Manner>
  BITFOLD_DEVICE void fetch(const BlockMatrix& w, std::byte* room) {
    const auto row_bytes = static_cast<uint32_t>(w.row_bytes);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const auto quad = static_cast<uint32_t>(turn * kWarp + ptx::lane_id());
      const uint32_t to = to_ >> 4 * turn & 15u, from = from_ >> 4 * turn & 15u;
      if ((turn + 1) * kWarp <= 16 * kQuads || quad < 16 * kQuads) {
        ptx::cp_async<16>(room + to * (Stride - Bytes) + 16 * quad,
                          next_ + from * row_bytes + (16 * quad - Bytes * to));
      }
    }
    next_ += Bytes;
  }

 private:
  const uint8_t* next_;  // of the first row
  uint32_t last_;        // row
  // Of each turn the lane's row, 4 bits each: of the room, and of W, which may have ended.
  uint32_t to_ = 0, from_ = 0;
};

template <int Row>
class KFragments {
  using Codes = CodesK<Row>;
  static constexpr int kBytes = sizeof(Block<Row>), kStride = Codes::kStride, kSub = Codes::kScales;
  static constexpr int kHeld = kSub / 8;  // of the places of four scales, those of eight steps

 public:
  static constexpr int kColumns = 256;
  static constexpr int kSteps = 16;
  static constexpr int kSections = kSub;
  static constexpr int kMins = kSub;
  static constexpr int kHead = 0;
  static constexpr int kTogether = 2;
  static constexpr int kSums = 0;
  static constexpr int kRoom = 16 * kStride;
  static constexpr float kUnit = 0x1p24f;

  static constexpr int column(int step, int t, int half) { return Codes::column(step, t, half); }
  BITFOLD_HOST_DEVICE static constexpr int down(int, int) { return 0; }

  using Matrix = BlockMatrix;
  static Matrix matrix(const Weight& w) { return {static_cast<const uint8_t*>(w.codes), w.n, w.k / kColumns * kBytes}; }

  using Tables = typename Codes::Tables;
  BITFOLD_DEVICE static void fill(const Matrix&, Tables& tables, int thread, int) { Codes::fill(tables, thread); }
  BITFOLD_DEVICE static constexpr Manner manner(const Matrix&) { return Manner::Any; }

  using Rows = SkewedRows<kBytes, Codes::kAlign, kStride>;
  using Copies = std::conditional_t<Codes::kAlign == 16, WholeCopies<kBytes, kStride>, SkewedCopies<Rows>>;

  struct Slot {         // of rows g and g + 8
    std::byte* scales;  // of row g; of row g + 8 they lie 8 kStride further on
    const uint8_t* blocks[2];
    float step[2];  // of minima
    uint32_t mins[2][kSub / 8];
    typename Codes::Kept kept[2];
    typename Codes::Words words[2];  // of four steps
    float4 held[2][kHeld];           // scales of eight steps
  };

  KFragments() = default;
  BITFOLD_DEVICE KFragments(const Matrix& w, int64_t, const Tables& tables, const std::byte*)
      : rows_(w), tables_(tables) {}

  template <Manner>
  BITFOLD_DEVICE void open(Slot& slot, int piece, std::byte* room) const {
    const int t = ptx::lane_id() % 4;
    OpenedScales<kSub> opened[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      slot.blocks[i] = rows_.at(room, piece, i);
      opened[i] = Codes::open(slot.blocks[i], t, slot.kept[i]);
      slot.step[i] = opened[i].step;
      for (int j = 0; j < kSub / 8; ++j) slot.mins[i][j] = opened[i].mins[j];
    }
    slot.scales = room + rows_.row();
    ptx::sync_warp();  // all have read what scales are written over
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kSub / 8; ++j) {
        auto* two = reinterpret_cast<float2*>(slot.scales + 8 * i * kStride + Codes::scale_at(8 * j + 2 * t));
        *two = {opened[i].scales[2 * j], opened[i].scales[2 * j + 1]};
      }
    }
    ptx::sync_warp();
  }

  template <Manner>
  BITFOLD_DEVICE void step(Slot& slot, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (step % 8 == 0) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          const int at = Codes::scale_at(4 * (step / 8 * kHeld + j));
          slot.held[i][j] = *reinterpret_cast<const float4*>(slot.scales + 8 * i * kStride + at);
        }
      }
      if (step % 4 == 0) slot.words[i] = Codes::load(tables_, slot.blocks[i], ptx::lane_id() % 4, step);
      const uint2 codes = Codes::codes(slot.words[i], slot.kept[i], step);
      a[kLow0 + i] = codes.x;
      a[kLow1 + i] = codes.y;
    }
  }

  template <Manner>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    // Of eight steps: a step's sub-block, which is its section, but for the order in which steps come.
    const int sub = kSub == 8 ? section % 4 : section % 4 * 2 + section / 4 % 2;
    const auto of = [&](const float4(&held)[kHeld]) {
      const float4& four = held[sub / 4];
      return sub % 4 == 0 ? four.x : sub % 4 == 1 ? four.y : sub % 4 == 2 ? four.z : four.w;
    };
    return {{of(slot.held[0]), of(slot.held[1])}};
  }

  BITFOLD_DEVICE Scales mins(const Slot& slot, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[kLow0 + i] = slot.mins[i][0];
      a[kLow1 + i] = slot.mins[i][kSub / 8 - 1];
    }
    return {{slot.step[0], slot.step[1]}};
  }

 private:
  Rows rows_;
  Tables tables_;
};

}  // namespace bitfold::cuda
