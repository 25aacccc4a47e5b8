// Which grid a group of weights gets, for the formats with planes: plain functions of a group's range, for every
// machine. docs/formats.md gives the operations one by one; each is rounded to binary32 unless it is said otherwise.
#pragma once

#include <algorithm>

#include "formats/args.hpp"
#include "formats/codebooks.hpp"
#include "formats/numeric.hpp"

namespace bitfold {

// What a group must know to choose its scale.
struct GroupRange {
  float low;   // min(w, 0)
  float high;  // max(w, 0)
  bool finite;
};

struct GroupGrid {
  float scale;   // as stored
  double exact;  // the same before any rounding
  int zero;
};

BITFOLD_INLINE bool is_finite(float value) { return (std::bit_cast<uint32_t>(value) & 0x7fffffffu) < 0x7f800000u; }

// To a whole number, ties to even: of |value| < 2^22.
BITFOLD_INLINE float nearest_whole(float value) {
  constexpr float kWholes = 12582912.0f;  // 1.5 * 2^23 leaves no place for a fraction
  const float biased = value + kWholes;
  return biased - kWholes;
}

BITFOLD_INLINE float round_scale(float scale, Scale dtype) {
  switch (dtype) {
    case Scale::F16: return half_to_float(float_to_half(scale));
    case Scale::BF16: return bf16_to_float(float_to_bf16(scale));
    default: return scale;
  }
}
// A nested scale is stored later: it is an fp32 number here.
BITFOLD_INLINE void store_scale(void* scales, Scale dtype, int64_t i, float scale) {
  switch (dtype) {
    case Scale::F16: static_cast<uint16_t*>(scales)[i] = float_to_half(scale); break;
    case Scale::BF16: static_cast<uint16_t*>(scales)[i] = float_to_bf16(scale); break;
    default: static_cast<float*>(scales)[i] = scale; break;
  }
}

BITFOLD_INLINE GroupGrid choose_grid(const FormatRow& row, Zero zero, Scale dtype, const GroupRange& range) {
  const float absmax = std::max(range.high, -range.low);  // in this order 0 and -0 make 0
  const auto top = static_cast<float>((1 << row.bits) - 1);
  GroupGrid grid{};
  float scale = absmax;
  if (zero == Zero::Integer) {
    grid.exact = (static_cast<double>(range.high) - static_cast<double>(range.low)) / static_cast<double>(top);
    scale = (range.high - range.low) / top;
  } else if (row.grid != Grid::Codebook) {
    grid.exact = static_cast<double>(absmax) / static_cast<double>(row.grid_max);
    scale = absmax / row.grid_max;
  } else {
    grid.exact = static_cast<double>(absmax);
  }
  grid.scale = round_scale(scale, dtype);
  if (zero == Zero::Integer) {
    if (grid.scale > 0.0f) {
      grid.zero = static_cast<int>(nearest_whole(std::clamp(-range.low / grid.scale, 0.0f, top)));
    }
  } else if (row.grid == Grid::Integer) {
    grid.zero = 1 << (row.bits - 1);
  }
  return grid;
}

// docs/formats.md, "scale range".
BITFOLD_INLINE EncodeFault scale_fault(const FormatRow& row, const GroupGrid& grid) {
  if (!is_finite(grid.scale)) return EncodeFault::ScaleOverflow;
  const double largest = row.grid == Grid::Integer ? static_cast<double>(row.grid_max) : 8.0;
  const double moved = static_cast<double>(grid.scale) - grid.exact;
  return (moved < 0 ? -moved : moved) * largest > grid.exact / 2.0 ? EncodeFault::ScaleUnderflow : EncodeFault::None;
}

// ---- fp16 and bf16: a group has no grid, but its numbers may be too large ----

// The smallest magnitude that rounds to infinity lies half a unit in the last place above the largest finite number.
BITFOLD_INLINE float cast_limit(bool half) { return half ? 65520.0f : 3.3961775292304957e38f; }

// ---- dq: scales on a grid of their own ----

// Scales whose sum is one number of the sum of all; the sums are added in order.
inline constexpr int64_t kNestedSum = 1024;

// The code of the dynamic map nearest to t, which is moved to a grid of 65,536 points first (docs/formats.md, "dq").
BITFOLD_INLINE uint8_t nearest_dynamic(float t) {
  constexpr float kPoints = 65535.0f;
  const float clamped = std::clamp(t, -1.0f, 1.0f);
  const float place = (clamped + 1.0f) * 0.5f * kPoints + 0.5f;
  const float whole = nearest_whole(place);
  const float point = whole > place ? whole - 1.0f : whole;
  const float moved = point / kPoints * 2.0f - 1.0f;
  int below = 0;  // midpoints
  for (int open = static_cast<int>(kDynamicMidpoints.size()); open > 0;) {
    const int half = open / 2;
    const bool is_below = kDynamicMidpoints[static_cast<size_t>(below + half)] < moved;
    below = is_below ? below + half + 1 : below;
    open = is_below ? open - half - 1 : half;
  }
  return static_cast<uint8_t>(below);
}

}  // namespace bitfold
