// Which kernel multiplies: a pure function of what is multiplied.
#pragma once

#include <cstdint>

#include "formats/format.hpp"

namespace bitfold::cuda {

enum class Regime : uint8_t { Rows, Tile, Wgmma, Matmul, Floor };

struct LinearPlan {
  Regime regime;
  const char* reason;
};

// The largest batches of the two kernels that decode in registers; with wgmma the second's is smaller.
inline constexpr int64_t kRows = 8;
inline constexpr int64_t kTile = 128, kTileBesideWgmma = 32;

// Columns that share a scale in the kernels for more than kRows rows: two of its steps, or four where codes are narrow.
constexpr int64_t tile_group_multiple(const Format& format) { return format.bits() < 4 ? 64 : 32; }
constexpr bool tile_supports(const Format& format) {
  return format.group < 1 || format.group % tile_group_multiple(format) == 0 || format.is_block();
}

// Whether more rows than kTileBesideWgmma are better multiplied by wgmma with weights decoded in registers, or decoded
// once and multiplied by torch. Clocks of a multiprocessor, of 1.75 GHz, for 64 columns of 128 rows of W and 64 of x,
// as an H200 took them at 00e05ac with 512 rows of x: torch's product 312 (256 of wgmma, 0.8 of whose rate cuBLAS has),
// bitfold's 380 to 440, and of Q6_K, as far as 192 rows tell, 470. Beside
// them, of the 18 bytes that a multiprocessor gets of memory in a clock: torch's product needs weights of 16 bits
// written, bitfold's x in another order, read and written.
constexpr bool wgmma_wins(const Format& format, int64_t m, int64_t n) {
  constexpr int64_t kTorch = 312, kWgmma = 405, kWgmmaQ6K = 470, kBytesPerClock = 18;
  if (m <= kTile) return true;
  const int64_t more = (format.row == kQ6K ? kWgmmaQ6K : kWgmma) - kTorch;
  const int64_t decoding = 128 * 64 * (16 + format.bits()) / 8 / kBytesPerClock;
  const int64_t arranging = 64 * 64 * 4 * 128 / kBytesPerClock / (n > 0 ? n : 1);
  return (m + 63) / 64 * (more + arranging) <= decoding;
}

// What a block of a GPU may have of shared memory, and what the kernel for few rows takes at least (linear_rows.cu
// holds it to that): no more than every GPU has, but where a piece of a row is largest.
inline constexpr int64_t kLeastShared = 99 << 10, kMostShared = 227 << 10;
constexpr int64_t rows_shared_bytes(int row) {
  return row == kQ6K ? 148 << 10 : row == kQ5_0 || row == kQ5_1 ? 136 << 10 : kLeastShared;
}
constexpr int64_t shared_bytes_of(int capability) {
  const int generation = capability / 10;
  if (capability == 86 || capability == 89 || generation == 12) return kLeastShared;
  return generation == 8 ? 163 << 10 : kMostShared;
}

// x is taken as the numbers that it holds; products of 8-bit whole numbers are the CPU's alone. wgmma: whether the GPU
// has it, and code for it.
constexpr LinearPlan plan_linear(const Format& format, Layout layout, int64_t m, int64_t n, DType activations,
                                 bool wgmma, int64_t shared_bytes = kMostShared) {
  if (activations == DType::F64) return {Regime::Floor, "float64 is computed in float64"};
  if (activations == DType::F32) return {Regime::Floor, "tensor cores would round float32 activations"};
  if (layout == Layout::Flat) return {Regime::Floor, "blocks straddle rows"};
  if (format.info().grid == Grid::Cast) return {Regime::Matmul, "weights of 16 bits are torch's own to multiply"};
  if (m <= kRows && shared_bytes < rows_shared_bytes(format.row))
    return {Regime::Tile, "the kernel for at most 8 rows takes more shared memory than this GPU has"};
  if (m <= kRows) return {Regime::Rows, "a batch of at most 8 rows is bound by reading the weight"};
  if (!tile_supports(format))
    return {Regime::Matmul, "the group is no multiple of 32 columns (of codes below 4 bits: 64)"};
  if (wgmma && m > kTileBesideWgmma && wgmma_wins(format, m, n))
    return {Regime::Wgmma, "a batch of more than 32 rows is multiplied by wgmma, with weights decoded in registers"};
  if (m <= kTile) return {Regime::Tile, "a batch of at most 128 rows shares each weight decoded in registers"};
  return {Regime::Matmul, "a larger batch is bound by multiplying: decoded once, then torch's product"};
}

// dx = dy W. There is no kernel that multiplies by tensor cores here.
constexpr LinearPlan plan_grad_x(const Format& format, Layout layout, int64_t m, DType gradient) {
  const LinearPlan forward = plan_linear(format, layout, m, 0, gradient, false);
  if (forward.regime == Regime::Floor || forward.regime == Regime::Matmul) return forward;
  if (m <= kRows) return {Regime::Floor, "a batch of at most 8 rows is less work than a decoded weight"};
  return {Regime::Matmul, "a larger batch shares the decoded weight: decoded once, then torch's product"};
}

constexpr const char* to_string(Regime regime) {
  constexpr const char* kNames[] = {"rows", "tile", "wgmma", "matmul", "floor"};
  return kNames[static_cast<int>(regime)];
}

}  // namespace bitfold::cuda
