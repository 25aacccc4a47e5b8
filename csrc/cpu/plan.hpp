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

// What `tiled` multiplies: fp32; decoded weights rounded to bf16; or codes of blocks with x rounded to 16 bits.
enum class Operands : uint8_t { F32, BF16, Int16 };
inline Operands tiled_operands(const Kernels& kernels, const Format& format, DType activations) {
  const bool small = activations == DType::BF16 || activations == DType::F16;
  if (small && kernels.int16[format.row].multiply != nullptr) return Operands::Int16;
  return activations == DType::BF16 && kernels.tile_bf16 != nullptr ? Operands::BF16 : Operands::F32;
}

constexpr const char* to_string(Regime regime) {
  return regime == Regime::Fused ? "fused" : regime == Regime::Tiled ? "tiled" : "floor";
}
constexpr const char* to_string(Operands operands) {
  return operands == Operands::Int16 ? "int16" : operands == Operands::BF16 ? "bfloat16" : "float32";
}

}  // namespace bitfold::cpu
