// What the parts of the kernel for many tokens share where there is wgmma: how it is cut, and where it has what.
//
// y^T = W x^T, as in the tile kernel (tile.hpp): a block has 256 rows of W and 64 tokens, or 192 rows and 128 tokens,
// and a range of chunks of k. Four or three warpgroups of it multiply, 64 rows each, as many as there are registers for
// their sums: what hides what one waits for is others. One more brings what they multiply to shared memory. Tokens
// go by quarters of 64: one is the B of a product, and x lies in memory as quarters of a unit (64 columns), which are
// that operand: [step of 16 columns][b0 or b1][8 tokens][token][4 pairs of columns in a format's order], 16 bytes a
// token.
#pragma once

#include "cuda/tile_copies.hpp"

namespace bitfold::cuda {

inline constexpr int kStepBytes = kQuarterBytes / kUnitSteps;

inline constexpr int kWarpgroup = 4 * kWarp;

// By a block's quarters, 1 or 2: its rows, and the threads that multiply.
constexpr int wgmma_rows(int quarters) { return quarters == 1 ? 256 : 192; }
template <int Quarters>
inline constexpr int kWgmmaMultiply = wgmma_rows(Quarters) / 64 * kWarpgroup;
template <int Quarters>
inline constexpr int kWgmmaThreads = kWgmmaMultiply<Quarters> + kWarpgroup;  // the last of them copy
inline constexpr int kWgmmaStages = 8;                                       // at most

// Registers of a thread: as a block begins, as they are for those who multiply, and for those who copy, who have more
// to do where scales lie in a plane. A block's are as many as it began with: those who go up would wait for more for
// ever. (Where nothing moves ptxas is told so all the same: it then shares them out better.)
template <int Quarters>
inline constexpr int kAtStart = 65536 / kWgmmaThreads<Quarters> / 8 * 8;
template <class C, int Quarters>
inline constexpr int kUp = Quarters == 2 ? 144
                           : C::kPlanes  ? kAtStart<1>
                                         : 104;
template <class C, int Quarters>
inline constexpr int kDownTo =
    (kAtStart<Quarters> * kWgmmaThreads<Quarters> - kUp<C, Quarters> * kWgmmaMultiply<Quarters>) / kWarpgroup;

// Of the stages of x and W: filled, and free again; whether a stage of W changes a row's power of two, for each tile of
// 16 rows.
struct WgmmaHead {
  ptx::Barrier x_full[kWgmmaStages], x_empty[kWgmmaStages], w_full[kWgmmaStages], w_empty[kWgmmaStages];
  alignas(16) uint32_t changes[kWgmmaStages][wgmma_rows(1) / 16];
};

// ---- scales on operands ----
//
// A = fp16(operand * fp16(scale * 2^P)), with a power of two for each row of W, so that halves neither overflow nor,
// as far as it goes, become subnormal: P is the row's first scales' choice, in the range of k that a block has, and is
// kept as long as scales fit. Where one doesn't, the row's sums so far are multiplied with what the new power of two is
// of the old. So nobody has to look through all scales first. At the end sums are divided by 2^P.
//
// A weight is rounded to 11 bits once, once more where a scale has more of them. Where there are minima, it is rounded
// when its own has been added, as a half; what this half lacks of an integer times the block's own number meets sums of
// x. (A half times a power of two lacks nothing.) What is lost below the smallest
// subnormal is at most 2^-20 of the largest number that a code and a scale of the row could make
// (tests/wgmma_rounding.py).

// A scale of 32 columns of a row times the row's power of two, in both halves, and the zero point as the format's own
// unpacking likes it.
struct alignas(8) ScaledZero {
  uint32_t scale;
  uint32_t zero;
};
static_assert(sizeof(ScaledZero) == sizeof(ScaleZero));

template <class C>
inline constexpr bool kLacks = C::kMins > 0 && C::kMinsUp > 0;

// The power of two of a row, before its first scale that isn't tiny.
inline constexpr float kFinest = 0x1p126f;
// A power of two of a row will do as long as all its scales times it are below this: neither they nor their products
// with operands overflow then.
template <class C>
inline constexpr int kScaleLimitLog2 = 15 - larger(C::kTop, 0);
template <class C>
inline constexpr float kScaleLimit = kScaleLimitLog2<C> < 0 ? 1.0f / static_cast<float>(1 << -kScaleLimitLog2<C>)
                                                            : static_cast<float>(1 << kScaleLimitLog2<C>);

BITFOLD_DEVICE int exponent_of(float power) { return static_cast<int>(ptx::float_as_uint(power) >> 23 & 255u) - 127; }
BITFOLD_DEVICE float inverse(float power) { return ptx::uint_as_float((254u << 23) - ptx::float_as_uint(power)); }
// The row's power of two from here on, whose largest scale is `peak`: the same while it will do, else one that leaves
// room for scales eight times as large.
template <class C>
BITFOLD_DEVICE float power_for(float peak, float power) {
  if (!(peak * power >= kScaleLimit<C>)) return power;
  return power_of_two(smaller(kScaleLimitLog2<C> - 4 - exponent_of(peak), 126));
}

// Where a block's shared memory has what; bytes. The sums on their way out lie where everything but the head was.
struct WgmmaPlaces {
  int out, tables, scales, sums, x, w, end;
};
BITFOLD_HOST_DEVICE constexpr WgmmaPlaces wgmma_places(ChunkSize size, int rows, int tokens, int x_stages,
                                                       int w_stages) {
  WgmmaPlaces at{};
  at.out = at.tables = 1024;
  static_assert(sizeof(WgmmaHead) <= 1024);
  at.scales = at.tables + size.tables;
  at.sums = at.scales + w_stages * rows * size.row_scales;
  at.x = at.sums + w_stages * (tokens / 8) * size.sums;
  at.w = at.x + x_stages * (tokens / kQuarter) * kQuarterBytes;
  at.end = at.w + w_stages * rows * size.stride;
  return at;
}

}  // namespace bitfold::cuda
