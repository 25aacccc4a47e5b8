// What the stored bits of a weight mean, one element at a time: the floor that every faster path must agree with.
#pragma once

#include "formats/args.hpp"
#include "formats/codebooks.hpp"
#include "formats/numeric.hpp"

namespace bitfold {

// Element i of a bit stream of `bits`-bit codes, least significant bit first; two codes to a byte may be high first.
BITFOLD_INLINE uint32_t read_code(const uint8_t* stream, int64_t i, int bits, bool high_first) {
  if (bits == 8) return stream[i];
  if (bits == 4) return (stream[i >> 1] >> (((i & 1) != 0) != high_first ? 4 : 0)) & 15u;
  const int64_t bit = i * bits;
  const int offset = static_cast<int>(bit & 7);
  uint32_t window = stream[bit >> 3];
  if (offset + bits > 8) window |= static_cast<uint32_t>(stream[(bit >> 3) + 1]) << 8;
  return (window >> offset) & ((1u << bits) - 1u);
}

BITFOLD_INLINE float read_scale(const void* scales, Scale dtype, int64_t i) {
  if (dtype == Scale::F32) return static_cast<const float*>(scales)[i];
  const uint16_t bits = static_cast<const uint16_t*>(scales)[i];
  return dtype == Scale::F16 ? half_to_float(bits) : bf16_to_float(bits);
}

// Scale of group `group` in plane row `row`.
BITFOLD_INLINE float group_scale(const Weight& w, int64_t row, int64_t group) {
  const int64_t i = scale_row(w.format, row) * groups_in_row(w.format, w.plane_columns()) + group;
  if (w.format.scale != Scale::Nested) return read_scale(w.scales, w.format.scale, i);
  const float unit = kDynamicMap[static_cast<const uint8_t*>(w.scales)[i]];
  const float product = unit * w.nested_scales[i / kNestedGroup];
  return product + *w.nested_offset;
}

// Zero point of a group; symmetric integers have theirs in the middle of the codes.
template <int Row>
BITFOLD_INLINE int group_zero(const Weight& w, int64_t row, int64_t group) {
  constexpr int bits = kFormats[Row].bits;
  if (w.format.zero == Zero::None) return 1 << (bits - 1);
  const int64_t groups = groups_in_row(w.format, w.plane_columns());
  const int64_t row_bytes = ceil_div(groups * bits, 8);
  const uint8_t* zeros = w.zeros + (w.format.group == kPerTensor ? 0 : row * row_bytes);
  return static_cast<int>(read_code(zeros, group, bits, false));
}

// The value of a code before its scale.
template <int Row>
BITFOLD_INLINE float code_value(uint32_t code, int zero) {
  constexpr FormatRow kRow = kFormats[Row];
  if constexpr (Row == kE4m3) return minifloat_to_float<kFp8E4m3>(code);
  else if constexpr (Row == kE5m2) return minifloat_to_float<kFp8E5m2>(code);
  else if constexpr (Row == kNf4) return kNf4Values[code];
  else if constexpr (Row == kFp4) return kFp4Values[code];
  else {
    static_assert(kRow.grid == Grid::Integer);
    return static_cast<float>(static_cast<int>(code) - zero);
  }
}

}  // namespace bitfold
