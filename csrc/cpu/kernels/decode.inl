// Columns of a row, from bits to fp32: lanes where the codes start at a byte, one at a time at the ragged ends of
// groups.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

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

template <int Row, Stores To>
BITFOLD_SIMD void decode_groups(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out) {
  constexpr FormatRow kRow = kFormats[Row];
  const int64_t group_size = w.format.group;
  const auto* stream = static_cast<const uint8_t*>(w.codes) + row * ceil_div(w.plane_columns() * kRow.bits, 8);
  Values<Row> values;
  for (int64_t i = begin; i < end;) {
    const int64_t group = group_size > 0 ? i / group_size : 0;
    const int64_t stop = group_size > 0 ? smaller(end, (group + 1) * group_size) : end;
    const float scale = group_scale(w, row, group);
    const int zero = group_zero<Row>(w, row, group);
    values.set_zero(zero);
    const auto one = [&](int64_t at) {
      out[at - begin] = code_value<Row>(read_code(stream, at, kRow.bits, kRow.high_first), zero) * scale;
    };
    for (const int64_t aligned = smaller(stop, (i + 7) / 8 * 8); i < aligned; ++i) one(i);
    for (; i + kLanes <= stop; i += kLanes) {
      const F lanes = values(unpack<kRow.bits, kRow.high_first>(stream + i * kRow.bits / 8));
      put<To>(out + (i - begin), mul(lanes, splat(scale)));
    }
    for (; i < stop; ++i) one(i);
  }
}

template <int Row>
void decode_span(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out, Stores stores) {
  if (stores == Stores::Cached) decode_groups<Row, Stores::Cached>(w, row, begin, end, out);
  else decode_groups<Row, Stores::PastCaches>(w, row, begin, end, out);
}

}  // namespace

void BITFOLD_ISA(decode)(Kernels& kernels) {
  kernels.decode_span[kE4m3] = decode_span<kE4m3>;
  kernels.decode_span[kE5m2] = decode_span<kE5m2>;
  kernels.decode_span[kInt8] = decode_span<kInt8>;
  kernels.decode_span[kInt4] = decode_span<kInt4>;
  kernels.decode_span[kInt3] = decode_span<kInt3>;
  kernels.decode_span[kInt2] = decode_span<kInt2>;
  kernels.decode_span[kNf4] = decode_span<kNf4>;
  kernels.decode_span[kFp4] = decode_span<kFp4>;
}

}  // namespace bitfold::cpu
