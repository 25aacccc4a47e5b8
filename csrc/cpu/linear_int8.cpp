// y = x W^T + b with x rounded to 8 or 16 bits first, block by block (docs/gguf-blocks.md, "Activations of 8 bits" and
// "Activations of 16 bits").
#include "cpu/linear_int8.hpp"

#include <algorithm>

#include "cpu/buffer.hpp"
#include "cpu/epilogue.hpp"

namespace bitfold::cpu {
namespace {

// Rows of x that are multiplied at a time, and bytes of them: their codes stay in the second cache, and no weight is
// opened more often than that.
constexpr int64_t kBatchRows = 256;
constexpr int64_t kBatchBytes = 5 << 18;
// Rows of the weight whose sums with many rows of x are kept together.
constexpr int64_t kStripRows = 2 * kInt8Rows;

}  // namespace

void linear_int8(const LinearArgs& args, const Int8Kernel& kernel) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t blocks = w.k / w.format.group, row_bytes = blocks * kernel.block_bytes;
  const int64_t batch = std::clamp(kBatchBytes / std::max<int64_t>(row_bytes, 1), int64_t{48}, kBatchRows);
  Buffer<char> x(std::min(args.x.rows, batch) * row_bytes);
  for (int64_t first = 0; first < args.x.rows; first += batch) {
    const int64_t m = std::min(batch, args.x.rows - first);
    cut(args.parallel_for, m, grain_rows(w.k), [&](int64_t begin, int64_t end) {
      Buffer<float> row(w.k);
      for (int64_t j = begin; j < end; ++j) {
        read_row(kernels, args.x, first + j, row.data());
        kernel.quantize(row.data(), w.k, j, m, x.data());
      }
    });
    const int64_t strip =
        m > kFusedRows ? kStripRows : round_up(std::max(grain_rows(w.k), ceil_div(w.n, 16)), kInt8Rows);
    share(args.parallel_for, w.n, strip, [&](const auto& next) {
      Buffer<float> sums(m * strip);
      for (int64_t begin = 0, end = 0; next(&begin, &end);) {
        kernel.multiply({&w, x.data(), m, begin, end, sums.data(), strip});
        Epilogue finish(kernels, args, begin, end);
        for (int64_t j = 0; j < m; ++j) finish(first + j, sums.data() + j * strip);
      }
    });
  }
}

}  // namespace bitfold::cpu
