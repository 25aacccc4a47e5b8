// Packed rows in shared memory to operands of mma: what the tile kernel sees of a format.
//
// A chunk is kColumns columns of a row, and a unit 64 of them: four steps of 16. Lane 4 g + t has row g of a tile's 16
// rows, and row g + 8 in the same way: in every step four columns of each, two registers of A. Which columns these are
// is the format's own choice, the order in which they come out of its bytes most cheaply (column()); x is put into it.
//
// Operands are whole numbers (or numbers of a table), exact in halves, and scales go onto the sums of kSpan steps, or
// with wgmma onto the operands themselves (wgmma.hpp). A code may stay where it lies in its halfword, as the bits of a
// subnormal: then its value is a power of two too small, which the scale takes back. Scales are kDown times too small
// themselves, and the epilogue takes that back: sums of x * 2^e, with |x * 2^e| < 2^15, then overflow where the result
// does and not before.
//
//   template <int Row> struct Chunk {
//     static constexpr int kColumns;  // a multiple of 64
//     static constexpr int kBytes;    // of a chunk of one row
//     static constexpr int kAlign;    // what its first byte is aligned to, at least
//     static constexpr int kSpan;     // steps that share a scale: 1, 2 or 4
//     static constexpr int kMins;     // sub-blocks with minima, 0, 8 or 16: a step of its own (mins)
//     static constexpr int kTables;   // bytes that fill(matrix, bytes, thread, threads) makes for all warps
//     static constexpr int column(int unit, int step, int t, int half);  // of half h of b_r, half = 2 r + h
//     struct Head;                    // what all units of a row's chunk share
//     static Head head(const uint8_t* chunk);
//     static void unit(const Lane& lane, const Head& head, int unit, Operands<kSpan>& out);
//     // Registers of A for columns 2t, 2t + 1 and 2t + 8, 2t + 9 (the same again for kMins == 8), and their scale.
//     static float mins(const Lane& lane, const Head& head, uint32_t (&a)[2]);
//
//     // For scales on operands:
//     static constexpr int kUp;       // log2 of what operands are multiplied with first, subnormal as they are
//     static constexpr int kTop;      // log2 of a number that none of them then exceeds
//     static constexpr int kMinsUp;   // the same as kUp, of mins()
//     // Of blocks: the largest magnitude of the chunk's scales, over 2^kUp (of mins() 2^kMinsUp), and of what a row's
//     // minima come to with it; of what the lane sees, while the four lanes of a row see all. Infinities and NaNs
//     // count as zero.
//     static float peak(const Lane& lane, const Head& head);
//   };
#pragma once

#include <cstdint>

#include "cuda/fragments_planes.hpp"

namespace bitfold::cuda {

inline constexpr int kUnit = 64;  // columns
inline constexpr int kUnitSteps = 4;
inline constexpr float kDown = 0x1p-15f;

// A scale of 32 columns of a row, made of the planes' scales (times kDown), and its zero point as the format's own
// unpacking likes it.
struct alignas(8) ScaleZero {
  float scale;
  uint32_t zero;
};

// A scale of a row and 32 columns as it was loaded, to be looked at when it has arrived.
struct LoadedScaleZero {
  uint32_t bits;
  uint32_t more;  // the zero point, or the bits of what multiplies a nested scale
};

// What a lane looks at: one row's chunk.
struct Lane {
  const uint8_t* bytes;     // all zero beyond the row's end
  const ScaleZero* scales;  // one for every 32 columns; formats with planes alone
  const uint8_t* tables;
  int t;
};

// 64 columns of a row: registers b0 and b1 meet, for each step, and the scale of each span.
template <int Span>
struct Operands {
  uint32_t halves[kUnitSteps][2];
  float scales[kUnitSteps / Span];
};

template <int Row>
struct Chunk;

// ---- bits ----

// The magnitude of a finite number, else zero.
BITFOLD_DEVICE float finite_magnitude(float number) {
  const uint32_t bits = ptx::float_as_uint(number) & 0x7fffffffu;
  return bits < 0x7f800000u ? ptx::uint_as_float(bits) : 0.0f;
}

// 2^(10 - p) + number, in both halves.
BITFOLD_HOST_DEVICE constexpr uint32_t magic_and(int p, int number) {
  return magic(p) + 0x00010001u * (static_cast<uint32_t>(number) << p);
}
// The fields of `mask` in both halves, under that exponent: 2^(10 - p) + field. Or together with other fields.
BITFOLD_DEVICE uint32_t under(uint32_t word, uint32_t mask, uint32_t rest) {
  return ptx::lop3<kAndOr>(word, mask, rest);
}

}  // namespace bitfold::cuda
