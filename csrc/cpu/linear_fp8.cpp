// y = x W^T + b with each row of x rounded to e4m3 times a scale first (docs/activations-fp8.md).
//
// A number of e4m3 is one of every dtype that x may have, so the rounded rows are multiplied by the kernels for any x,
// and the scale of a row meets its sums at the end: exact but for those sums. Rows are rounded some at a time, to a
// buffer that stays in cache; W is opened as often as linear opens it.
#include "cpu/linear_fp8.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"

namespace bitfold::cpu {
namespace {

// As many as linear arranges at a time.
constexpr int64_t kBatchRows = 512;

// The scale of a row of numbers; with `given`, its infinities become what saturates, and they are numbers too.
float scale_of_row(const Kernels& kernels, float* row, int64_t k, const float* given) {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  const GroupRange range = kernels.group_range(row, k);
  if (given == nullptr) return range.finite ? std::max(range.high, -range.low) / kFp8Largest : kNone;
  if (range.finite) return *given;
  for (int64_t i = 0; i < k; ++i) {
    if (std::isnan(row[i])) return kNone;
    row[i] = std::clamp(row[i], std::numeric_limits<float>::lowest(), std::numeric_limits<float>::max());
  }
  return *given;
}

void round_row(const Kernels& kernels, float* row, int64_t k, const float* given, uint8_t* codes, float* scale) {
  *scale = scale_of_row(kernels, row, k, given);
  if (std::isnan(*scale)) std::fill_n(codes, k, kFp8Nan);
  else kernels.quantize[kE4m3]({row, k, *scale == 0.0f ? 1.0f : *scale, 0, codes});
}

}  // namespace

void round_fp8(const RoundFp8Args& args) {
  const Kernels& kernels = cpu::kernels();
  const int64_t k = args.x.columns;
  cut(args.parallel_for, args.x.rows, grain_rows(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(k);
    for (int64_t j = begin; j < end; ++j) {
      read_row(kernels, args.x, j, row.data());
      round_row(kernels, row.data(), k, args.x_scale, args.codes + j * k, args.scales + j);
    }
  });
}

void linear_fp8(const LinearFp8Args& args) {
  const Kernels& kernels = cpu::kernels();
  const MatrixIn& x = args.linear.x;
  const int64_t k = x.columns, n = args.linear.w.n, size = dtype_bytes(x.dtype);
  const int64_t most = std::min(x.rows, kBatchRows);
  Buffer<char> rounded(most * k * size);
  Buffer<float> scales(most);
  const float one = 1.0f;
  for (int64_t first = 0; first < x.rows; first += kBatchRows) {
    const int64_t m = std::min(kBatchRows, x.rows - first);
    cut(args.linear.parallel_for, m, grain_rows(k), [&](int64_t begin, int64_t end) {
      Buffer<float> row(k);
      Buffer<uint8_t> codes(k);
      const Weight plain{{kE4m3, kPerTensor, Zero::None, Scale::F32},
                         Layout::Rows,
                         1,
                         k,
                         codes.data(),
                         &one,
                         nullptr,
                         nullptr,
                         nullptr};
      for (int64_t j = begin; j < end; ++j) {
        read_row(kernels, x, first + j, row.data());
        round_row(kernels, row.data(), k, args.x_scale, codes.data(), &scales[j]);
        decode_row(kernels, plain, 0, 0, k, row.data());
        kernels.from_float(row.data(), k, x.dtype, rounded.data() + j * k * size);
      }
    });
    LinearArgs batch = args.linear;
    batch.x = {rounded.data(), x.dtype, m, k, k, 1};
    batch.y = static_cast<char*>(args.linear.y) + first * n * size;
    batch.row_scales = scales.data();
    linear(batch);
  }
}

}  // namespace bitfold::cpu
