// Which kernel multiplies: a pure function of what is multiplied.
#pragma once

#include <cstdint>

#include "formats/format.hpp"

namespace bitfold::cuda {

enum class Regime : uint8_t { Rows, Tile, Matmul, Floor };

struct LinearPlan {
  Regime regime;
  const char* reason;
};

// The largest batches of the two kernels that decode in registers.
inline constexpr int64_t kRows = 8;
inline constexpr int64_t kTile = 128;

// Columns that share a scale in the kernel for up to kTile rows: two of its steps, or four where codes are narrow.
constexpr int64_t tile_group_multiple(const Format& format) { return format.bits() < 4 ? 64 : 32; }
constexpr bool tile_supports(const Format& format) {
  return format.group < 1 || format.group % tile_group_multiple(format) == 0 || format.is_block();
}

// x is taken as the numbers that it holds; products of 8-bit whole numbers are the CPU's alone.
constexpr LinearPlan plan_linear(const Format& format, Layout layout, int64_t m, DType activations) {
  if (activations == DType::F64) return {Regime::Floor, "float64 is computed in float64"};
  if (activations == DType::F32) return {Regime::Floor, "tensor cores would round float32 activations"};
  if (layout == Layout::Flat) return {Regime::Floor, "blocks straddle rows"};
  if (format.info().grid == Grid::Cast) return {Regime::Matmul, "weights of 16 bits are torch's own to multiply"};
  if (m <= kRows) return {Regime::Rows, "a batch of at most 8 rows is bound by reading the weight"};
  if (!tile_supports(format))
    return {Regime::Matmul, "the group is no multiple of 32 columns (of codes below 4 bits: 64)"};
  if (m <= kTile) return {Regime::Tile, "a batch of at most 128 rows shares each weight decoded in registers"};
  return {Regime::Matmul, "a larger batch is bound by multiplying: decoded once, then torch's product"};
}

// dx = dy W. There is no kernel that multiplies by tensor cores here.
constexpr LinearPlan plan_grad_x(const Format& format, Layout layout, int64_t m, DType gradient) {
  const LinearPlan forward = plan_linear(format, layout, m, gradient);
  if (forward.regime == Regime::Floor || forward.regime == Regime::Matmul) return forward;
  if (m <= kRows) return {Regime::Floor, "a batch of at most 8 rows is less work than a decoded weight"};
  return {Regime::Matmul, "a larger batch shares the decoded weight: decoded once, then torch's product"};
}

constexpr const char* to_string(Regime regime) {
  constexpr const char* kNames[] = {"rows", "tile", "matmul", "floor"};
  return kNames[static_cast<int>(regime)];
}

}  // namespace bitfold::cuda
