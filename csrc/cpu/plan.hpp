// Which kernel multiplies: a pure function of what is multiplied.
#pragma once

#include <cstdint>

#include "cpu/kernels.hpp"
#include "formats/format.hpp"

namespace bitfold::cpu {

enum class Regime : uint8_t { Fused, Tiled, Floor };

struct LinearPlan {
  Regime regime;
  const char* reason;
};

// Columns that share a scale in every lane of the fused kernels (words of at most 16 codes) and in two vectors of the
// minifloats.
constexpr int64_t fused_group_multiple(const Format& format) {
  return format.info().grid == Grid::Minifloat ? kAlign : 16;
}
constexpr bool fused_supports(const Format& format) {
  return format.group < 1 || format.group % fused_group_multiple(format) == 0;
}

constexpr LinearPlan plan_linear(const Format& format, Layout layout, int64_t m, DType activations,
                                 Activations kind = Activations::Float) {
  if (kind == Activations::Int8) return {Regime::Tiled, "each tile of blocks is opened once for all rows"};
  if (activations == DType::F64) return {Regime::Floor, "float64 is computed in float64"};
  if (layout == Layout::Flat) return {Regime::Floor, "blocks straddle rows"};
  if (m > kFusedRows) return {Regime::Tiled, "a batch of more than 8 rows shares each decoded tile"};
  if (!fused_supports(format)) return {Regime::Tiled, "the group is no multiple of 16 columns (fp8: 32)"};
  return {Regime::Fused, "a batch of at most 8 rows is multiplied in registers"};
}

// Whether decoded weights are rounded to bf16 on their way to instructions that multiply bf16.
inline bool rounds_to_bf16(const Kernels& kernels, const LinearPlan& plan, DType activations) {
  return plan.regime == Regime::Tiled && activations == DType::BF16 && kernels.tile_bf16 != nullptr;
}

constexpr const char* to_string(Regime regime) {
  return regime == Regime::Fused ? "fused" : regime == Regime::Tiled ? "tiled" : "floor";
}

}  // namespace bitfold::cpu
