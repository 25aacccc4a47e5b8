// Columns of a row, from bits to fp32: lanes where the codes start at a byte, one at a time at the ragged ends of
// groups.
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

template <int Row>
void decode_span(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out) {
  constexpr FormatRow kRow = kFormats[Row];
  const int64_t group_size = w.format.group;
  const auto* stream = static_cast<const uint8_t*>(w.codes) + row * ceil_div(w.plane_columns() * kRow.bits, 8);
  Values<Row> values;
  for (int64_t i = begin; i < end;) {
    const int64_t group = group_size > 0 ? i / group_size : 0;
    const int64_t stop = group_size > 0 ? smaller(end, (group + 1) * group_size) : end;
    const float scale = group_scale(w, row, group);
    const int zero = group_zero(w, row, group);
    values.set_zero(zero);
    const auto one = [&](int64_t at) {
      out[at - begin] = code_value<Row>(read_code(stream, at, kRow.bits, kRow.high_first), zero) * scale;
    };
    for (const int64_t aligned = smaller(stop, (i + 7) / 8 * 8); i < aligned; ++i) one(i);
    for (; i + kLanes <= stop; i += kLanes) {
      const F lanes = values(unpack<kRow.bits, kRow.high_first>(stream + i * kRow.bits / 8));
      store(out + (i - begin), mul(lanes, splat(scale)));
    }
    for (; i < stop; ++i) one(i);
  }
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
