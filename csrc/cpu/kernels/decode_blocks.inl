// Columns of a row of GGUF's blocks, to fp32.
#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {
namespace {

template <int Row>
void decode_span(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kValues = kFormats[Row].group;
  const uint8_t* blocks = static_cast<const uint8_t*>(w.codes) + row * (w.k / kValues) * sizeof(Block<Row>);
  for (int64_t i = begin; i < end;) {
    Block<Row> block;
    std::memcpy(&block, blocks + i / kValues * sizeof(block), sizeof(block));
    for (const int64_t stop = smaller(end, (i / kValues + 1) * kValues); i < stop; ++i) {
      out[i - begin] = block_value(block, static_cast<int>(i % kValues));
    }
  }
}

template <int Row = kQ4_0>
void fill(Kernels& kernels) {
  kernels.decode_span[Row] = decode_span<Row>;
  if constexpr (Row + 1 < kRowCount) fill<Row + 1>(kernels);
}

}  // namespace

void BITFOLD_ISA(decode_blocks)(Kernels& kernels) { fill(kernels); }

}  // namespace bitfold::cpu
