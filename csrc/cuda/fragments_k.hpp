// Q4_K as a source of fragments (fragments.hpp): 32 columns share a scale, which comes to fp32 sums.
//
// A block of 256 columns is 16 bytes of scales and 128 of codes, nine pieces of 16 bytes, which lie in the room with a
// tenth behind them. The eight scales and minima of a row are six bits each, here and there in three words: each of the
// row's four lanes opens two of either, and leaves the scales as floats for the others, in the room.
#pragma once

#include "cuda/chunk.hpp"
#include "cuda/fragments_chunks.hpp"

namespace bitfold::cuda {

class Q4KFragments {
  static constexpr int kBytes = 144, kCodes = 16;
  // 32 bytes beyond a multiple of 128: what half of a warp reads at once, 32 bytes of four rows, lies in all banks.
  static constexpr int kStride = 160;
  static constexpr int kSecond = 144;  // where a row's scales 4 to 7 lie; the first are where the head was

 public:
  static constexpr int kColumns = 256;
  static constexpr int kSteps = 16;
  static constexpr int kSections = 8;
  static constexpr int kMins = 8;
  static constexpr int kHead = 0;
  static constexpr int kTogether = 2;
  static constexpr int kSums = 0;
  static constexpr int kRoom = 16 * kStride;
  static constexpr float kUnit = 0x1p24f;

  // Lane t has bytes 8 t to 8 t + 7 of 32, whose low nibbles are 32 columns and the high ones the next.
  static constexpr int column(int step, int t, int half) {
    return 64 * (step / 4) + 32 * (step / 2 % 2) + 8 * t + 4 * (step % 2) + half / 2 + 2 * (half % 2);
  }
  BITFOLD_HOST_DEVICE static constexpr int down(int, int) { return 0; }

  using Matrix = BlockMatrix;
  static Matrix matrix(const Weight& w) { return {static_cast<const uint8_t*>(w.codes), w.n, w.k / 256 * kBytes}; }

  using Tables = NoTables;
  BITFOLD_DEVICE static void fill(const Matrix&, Tables&, int, int) {}
  BITFOLD_DEVICE static constexpr Manner manner(const Matrix&) { return Manner::Any; }

  // The lanes copy the 16 rows' nine times 16 bytes each in turn, so that what they ask for together is few runs of
  // memory.
  class Copies {
    static constexpr int kQuads = kBytes / 16, kTurns = (16 * kQuads + kWarp - 1) / kWarp;

   public:
    Copies() = default;
    BITFOLD_DEVICE Copies(const Matrix& w, int64_t row, int piece)
        : next_(w.blocks + row * w.row_bytes + int64_t{piece} * kBytes),
          last_(static_cast<uint32_t>(smaller<int64_t>(w.n - 1 - row, 15))) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const auto mine = static_cast<uint32_t>(smaller((turn * kWarp + ptx::lane_id()) / kQuads, 15));
        to_ |= mine << 4 * turn;
        from_ |= smaller(mine, last_) << 4 * turn;
      }
    }
    BITFOLD_DEVICE void begin(const Matrix&, int, std::byte*) const {}
    template <Manner>
    BITFOLD_DEVICE void fetch(const Matrix& w, std::byte* room) {
      const auto row_bytes = static_cast<uint32_t>(w.row_bytes);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const auto quad = static_cast<uint32_t>(turn * kWarp + ptx::lane_id());
        const uint32_t to = to_ >> 4 * turn & 15u, from = from_ >> 4 * turn & 15u;
        if ((turn + 1) * kWarp <= 16 * kQuads || quad < 16 * kQuads) {
          ptx::cp_async<16>(room + to * (kStride - kBytes) + 16 * quad,
                            next_ + from * row_bytes + (16 * quad - kBytes * to));
        }
      }
      next_ += kBytes;
    }

   private:
    const uint8_t* next_;  // of the first row
    uint32_t last_;        // row
    // Of each turn the lane's row, 4 bits each: of the room, and of W, which may have ended.
    uint32_t to_ = 0, from_ = 0;
  };

  struct Slot {
    std::byte* rows;   // row g; row g + 8 lies 8 kStride further on
    float step[2];     // dmin
    uint32_t mins[2];  // those of sub-blocks 2 t and 2 t + 1, as the bits of halves
    uint2 codes[2];    // of the unit
    float4 scales[2];  // of half of the block
  };

  Q4KFragments() = default;
  BITFOLD_DEVICE Q4KFragments(const Matrix&, int64_t, const Tables&, const std::byte*) {}

  template <Manner>
  BITFOLD_DEVICE void open(Slot& slot, int, std::byte* room) const {
    const int t = ptx::lane_id() % 4;
    slot.rows = room + ptx::lane_id() / 4 * kStride;
    float2 scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 head = *reinterpret_cast<const uint4*>(slot.rows + 8 * i * kStride);
      const float2 steps = ptx::halves_to_floats(head.x);
      const bool second = t >= 2;
      // Four scales and four minima, of which this lane has bytes 2 t and 2 t + 1.
      const uint32_t four = second ? under(head.y >> 2, 0x30303030, head.w & 0x0f0f0f0f) : head.y & 0x3f3f3f3f;
      const uint32_t mins = second ? under(head.z >> 2, 0x30303030, head.w >> 4 & 0x0f0f0f0f) : head.z & 0x3f3f3f3f;
      const auto at = static_cast<uint32_t>(2 * (t % 2));
      // 2^23 + scale, times the step, less 2^23 times it: exact. Odd sub-blocks have their codes 4 bits higher.
      const float bias = -0x1p23f * steps.x;
      scales[i].x = ptx::fma(ptx::uint_as_float(ptx::prmt(four, 0x4b000000, 0x7440 | at)), steps.x, bias);
      scales[i].y =
          ptx::fma(ptx::uint_as_float(ptx::prmt(four, 0x4b000000, 0x7440 | (at + 1))), steps.x, bias) * 0x1p-4f;
      slot.mins[i] = ptx::prmt(mins, 0, 0x4040 | at | (at + 1) << 8);
      slot.step[i] = steps.y * -32.0f;
    }
    ptx::sync_warp();  // all have read the head
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float2*>(slot.rows + 8 * i * kStride + (t < 2 ? 8 * t : kSecond - 16 + 8 * t)) = scales[i];
    }
    ptx::sync_warp();
  }

  template <Manner>
  BITFOLD_DEVICE void step(Slot& slot, int step, uint32_t (&a)[4]) const {
    const int unit = step / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::byte* row = slot.rows + 8 * i * kStride;
      if (step % 8 == 0) slot.scales[i] = *reinterpret_cast<const float4*>(row + (step == 0 ? 0 : kSecond));
      if (step % 4 == 0) {
        slot.codes[i] = *reinterpret_cast<const uint2*>(row + kCodes + 32 * unit + ptx::lane_id() % 4 * 8);
      }
      const uint32_t even = step % 2 == 0 ? slot.codes[i].x : slot.codes[i].y, odd = even >> 8;
      const uint32_t mask = step % 4 < 2 ? 0x000f000f : 0x00f000f0;
      a[kLow0 + i] = even & mask;
      a[kLow1 + i] = odd & mask;
    }
  }

  template <Manner>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    const auto of = [&](const float4& four) {
      return section % 4 == 0 ? four.x : section % 4 == 1 ? four.y : section % 4 == 2 ? four.z : four.w;
    };
    return {{of(slot.scales[0]), of(slot.scales[1])}};
  }

  BITFOLD_DEVICE Scales mins(const Slot& slot, uint32_t (&a)[4]) const {
    a[kLow0] = a[kLow1] = slot.mins[0];
    a[kHigh0] = a[kHigh1] = slot.mins[1];
    return {{slot.step[0], slot.step[1]}};
  }
};

}  // namespace bitfold::cuda
