// Packed weights as they lie in memory, to the A operands of mma.m16n8k16 in registers: what the kernels that multiply
// see of a format.
//
// A *source* is 16 rows of W seen by one lane of a warp: lane 4 g + t decodes columns of rows g and g + 8. It goes
// through the rows a *piece* of kColumns columns at a time, which the warp's lanes together copy to a *room* of shared
// memory some pieces ahead, scales and all, and which each looks at when it is there. A piece is kSteps steps of mma;
// an operand holds whole numbers (or numbers of a table), and the scale of the row comes to the sums of all steps of a
// *section*:
//
//   y[row, token] += scale(row) * (sum over the section's steps of A x)
//
// Formats with minima have a step more in each piece: its A holds them, and its columns are sums of x over sub-blocks.
// Which columns a lane's bytes hold is no matter: a dot product has no order. column() says it, and x is brought into
// that order, fp16, four halves for each lane and step (B operands b0, b1). Nothing here knows how many tokens there
// are.
//
//   class Source {
//     static constexpr int kColumns;    // of a piece
//     static constexpr int kSteps;      // of a piece, even: each pair of them is 16 bytes of x for a lane
//     static constexpr int kSections;   // of a piece; each is kSteps / kSections steps
//     static constexpr int kMins;       // sub-blocks with minima in a piece, 0, 8 or 16 (Tokens)
//     static constexpr int kSums;       // sections whose sums of x are wanted (Tokens), kSections or 0
//     static constexpr int kTogether;   // pairs of steps whose x registers have room for at once
//     static constexpr int kRoom;       // bytes of a room, a multiple of 16; 0 where open() loads
//     static constexpr int kHead;       // bytes of what is copied once for a run of pieces, a multiple of 16, or 0
//     static constexpr float kUnit;     // what the sum of everything is to be multiplied with (less codebook_up)
//
//     // The piece's column in half h of b_r, as half = 2 r + h, of the lanes with lane % 4 == t.
//     static constexpr int column(int step, int t, int half);
//     // The columns of b_r are to be multiplied with 2^-down: their codes lie that many bits too high.
//     static constexpr int down(int step, int r);
//     // Whether pieces of kColumns columns are possible: k, groups, scales. A launcher asks the widest first.
//     static bool fits(const Weight& w);
//     // The matrix as the kernel's parameter, divisions done.
//     struct Matrix {};
//     static Matrix matrix(const Weight& w);
//
//     struct Tables {};  // of the block, in shared memory
//     static void fill(const Matrix& w, Tables& tables, int thread, int threads);  // by all threads; a barrier follows
//     static Manner manner(const Matrix& w);
//
//     // What goes ahead. Rows [row, row + 16); past n, the last again.
//     struct Copies {
//       Copies(const Matrix& w, int64_t row, int piece);
//       void begin(const Matrix& w, int pieces, std::byte* head) const;  // what all of so many pieces have at once
//       template <Manner> void fetch(const Matrix& w, std::byte* room);  // the next piece, by all lanes
//     };
//     // What follows.
//     Source(const Matrix& w, int64_t row, const Tables& tables, const std::byte* head);
//     struct Slot {};  // a lane's registers of a piece
//     template <Manner> void open(Slot& slot, int piece, std::byte* room);  // all lanes' copies are there
//     template <Manner> Scales before(const Slot& slot, int section) const;  // times sum(x): where kSums > 0
//     template <Manner> void step(Slot& slot, int step, uint32_t (&a)[4]) const;  // in order, from an unrolled loop
//     template <Manner> Scales scales(const Slot& slot, int section) const;
//     Scales mins(const Slot& slot, uint32_t (&a)[4]) const;  // where kMins > 0
//   };
//
// fragments_planes.hpp has the formats with planes, fragments_ragged.hpp the same for any group and k,
// fragments_k.hpp K-quants and IQ4_XS, and fragments_chunks.hpp the other blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.hpp"
#include "formats/args.hpp"

namespace bitfold::cuda {

// What sums are multiplied with: those of rows g and g + 8.
struct Scales {
  float of[2];
};

// What a loop over pieces may take for granted of a matrix. Plain: the format's usual scales and no zero points. Full:
// the same with zero points, or nested scales in the place of the usual ones. Any: nothing, it asks the matrix at each
// piece; nor that x is finite.
enum class Manner : uint8_t { Plain, Full, Any };

struct NoTables {};

// The A operand's registers: row g and g + 8 of the columns of b0, then of b1.
enum Operand : int { kLow0, kHigh0, kLow1, kHigh1 };

// (a & b) | c
inline constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;

// ---- x as fp16 times a power of two ----

// Of a magnitude in bf16's or fp16's bits: whether it is a number.
BITFOLD_DEVICE bool is_finite(uint32_t magnitude, bool bf16) { return magnitude < (bf16 ? 0x7f80u : 0x7c00u); }
// 14 - floor(log2) of it, within what a float's power of two can undo; 0 for zero, infinity and NaN.
BITFOLD_DEVICE int exponent_to_fp16(uint32_t magnitude, bool bf16) {
  const auto bits = static_cast<uint16_t>(magnitude);
  const uint32_t number = ptx::float_as_uint(bf16 ? ptx::bf16_to_float(bits) : ptx::half_to_float(bits));
  const auto field = static_cast<int>(number >> 23);
  if (number == 0 || field == 255) return 0;
  return smaller(14 - (field - 127), 126);
}
BITFOLD_DEVICE float power_of_two(int exponent) {
  return ptx::uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// n / divisor for n < 2^31 without a division.
struct Divider {
  uint32_t multiplier;
  uint32_t shift;
  // Exact: multiplier = ceil(2^(31 + bits) / divisor) with 2^bits >= divisor.
  static constexpr Divider of(uint32_t divisor) {
    uint32_t bits = 0;
    while (bits < 31 && (uint32_t{1} << bits) < divisor) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {static_cast<uint32_t>((power + divisor - 1) / divisor), bits};
  }
  BITFOLD_HOST_DEVICE constexpr uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t{2 * n} * multiplier) >> 32) >> shift;
  }
};

}  // namespace bitfold::cuda
