// Included by every kernel body: what the simd header, included before it, does not give. The build compiles each body
// once for each instruction set, with BITFOLD_ISA_NAME set to its name.
#pragma once

#include "cpu/kernels.hpp"
#include "formats/codec.hpp"

// fill_<kernel>_<isa>: puts the kernels of one body into the table.
#define BITFOLD_JOIN_(a, b, c) a##b##_##c
#define BITFOLD_JOIN(a, b, c) BITFOLD_JOIN_(a, b, c)
#define BITFOLD_ISA(kernel) BITFOLD_JOIN(fill_, kernel, BITFOLD_ISA_NAME)

namespace bitfold::cpu {
namespace {

BITFOLD_SIMD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The values of codes before their scale, kLanes at a time.
template <int Row>
struct Values {
  static constexpr FormatRow kRow = kFormats[Row];
  I zero = splat(0);
  BITFOLD_SIMD void set_zero(int value) { zero = splat(static_cast<int32_t>(value)); }
  BITFOLD_SIMD F operator()(I codes) const {
    static_assert(kRow.grid == Grid::Integer);
    return to_float(sub(codes, zero));
  }
};

template <const std::array<float, 16>& Codebook>
struct CodebookValues {
  Table16 table = load_table(&Codebook[0]);
  BITFOLD_SIMD void set_zero(int) {}
  BITFOLD_SIMD F operator()(I codes) const { return lookup(table, codes); }
};
template <>
struct Values<kNf4> : CodebookValues<kNf4Values> {};
template <>
struct Values<kFp4> : CodebookValues<kFp4Values> {};

template <Minifloat M>
struct MinifloatValues {
  BITFOLD_SIMD void set_zero(int) {}
  BITFOLD_SIMD F operator()(I codes) const {
    constexpr int kUp = 23 - M.mantissa_bits;
    const I magnitude = bit_and(codes, splat(int32_t{0x7f}));
    const I sign = shift_left<24>(bit_and(codes, splat(int32_t{0x80})));
    const F normal = as_float(add(shift_left<kUp>(magnitude), splat(int32_t{(127 - M.bias) << 23})));
    const F step = splat(std::bit_cast<float>(uint32_t{127 + 1 - M.bias - M.mantissa_bits} << 23));
    const F subnormal = mul(to_float(magnitude), step);
    F value = select(greater(splat(int32_t{1 << M.mantissa_bits}), magnitude), subnormal, normal);
    const auto last = static_cast<int32_t>(M.max_finite);
    const F nan = splat(std::bit_cast<float>(0x7fc00000u));
    if constexpr (M.has_infinity) {
      value = select(greater(magnitude, splat(last)), splat(std::bit_cast<float>(0x7f800000u)), value);
      value = select(greater(magnitude, splat(last + 1)), nan, value);
      const Mask is_nan = greater(magnitude, splat(last + 1));
      return as_float(select(is_nan, as_int(value), bit_or(as_int(value), sign)));
    } else {
      const Mask is_nan = greater(magnitude, splat(last));
      return as_float(select(is_nan, as_int(nan), bit_or(as_int(value), sign)));
    }
  }
};
template <>
struct Values<kE4m3> : MinifloatValues<kFp8E4m3> {};
template <>
struct Values<kE5m2> : MinifloatValues<kFp8E5m2> {};

}  // namespace
}  // namespace bitfold::cpu
