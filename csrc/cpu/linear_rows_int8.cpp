// y = x W^T + b with x rounded to 8 bits, row by row, but for columns with outliers (formats/int8.hpp).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"

namespace bitfold::cpu {
namespace {

// ---- the floor: all of it in Real, one output after the other ----

double small_float(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::F32: return static_cast<const float*>(data)[i];
    case DType::BF16: return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    default: return half_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// A row of x in whole numbers, and its outliers: 0 in all other columns.
template <class Real>
struct RoundedRow {
  std::vector<int8_t> codes;
  std::vector<Real> outliers;
  Real step = 0;
};

// is_outlier: of each column.
template <class Real>
RoundedRow<Real> round_row(const LinearInt8Args& args, const Real* x, const uint8_t* is_outlier) {
  const int64_t k = args.w.k;
  RoundedRow<Real> row{std::vector<int8_t>(static_cast<size_t>(k)), std::vector<Real>(static_cast<size_t>(k)), 0};
  if (!std::all_of(x, x + k, [](Real value) { return std::isfinite(value); })) {
    row.step = std::numeric_limits<Real>::quiet_NaN();
    return row;
  }
  Real largest = 0;
  for (int64_t c = 0; c < k; ++c) {
    if (is_outlier[c]) row.outliers[static_cast<size_t>(c)] = x[c];
    else largest = std::max(largest, std::abs(x[c]));
  }
  const bool fixed = args.x_scale != nullptr;
  if (!fixed && largest < static_cast<Real>(kSmallestRow)) return row;
  row.step = fixed ? static_cast<Real>(*args.x_scale) : largest / 127;
  const Real inverse = fixed ? 1 / row.step : 127 / largest;
  for (int64_t c = 0; c < k; ++c) {
    if (is_outlier[c]) continue;
    const Real code = std::nearbyint(x[c] * inverse);
    row.codes[static_cast<size_t>(c)] = static_cast<int8_t>(std::clamp(code, Real{-127}, Real{127}));
  }
  return row;
}

template <class Real>
void mark_outliers(const LinearInt8Args& args, const Real* x, uint8_t* is_outlier) {
  for (int64_t c = 0; c < args.w.k && args.threshold > 0; ++c) {
    if (std::isfinite(x[c]) && std::abs(x[c]) >= static_cast<Real>(args.threshold)) is_outlier[c] = 1;
  }
}

template <class Real>
void linear_floor(const LinearInt8Args& args) {
  const Weight& w = args.w;
  const int64_t m = args.x.rows, k = w.k;
  Buffer<double> x(k);
  Buffer<Real> rows(m * k);
  for (int64_t j = 0; j < m; ++j) {
    read_row(args.x, j, x.data());
    std::transform(x.data(), x.data() + k, rows.data() + j * k, [](double value) { return static_cast<Real>(value); });
  }
  std::vector<uint8_t> copied(static_cast<size_t>(k)), shared;
  for (int64_t i = 0; i < args.copies; ++i) copied[static_cast<size_t>(args.columns[i])] = 1;
  shared = copied;
  for (int64_t j = 0; j < m && !args.per_row; ++j) mark_outliers(args, rows.data() + j * k, shared.data());
  std::vector<RoundedRow<Real>> rounded;
  for (int64_t j = 0; j < m; ++j) {
    std::vector<uint8_t> own = shared;
    if (args.per_row) mark_outliers(args, rows.data() + j * k, own.data());
    rounded.push_back(round_row(args, rows.data() + j * k, own.data()));
  }
  const MatrixIn bias_row{args.bias, args.x.dtype, 1, w.n, w.n, 1};
  Buffer<double> bias(args.bias != nullptr ? w.n : 0);
  if (args.bias != nullptr) read_row(bias_row, 0, bias.data());
  const bool one = w.format.group == kPerTensor;
  cut(args.parallel_for, w.n, grain_rows(k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto* codes = static_cast<const uint8_t*>(w.codes) + i * k;
      const auto scale = static_cast<Real>(small_float(scale_dtype(w.format.scale), w.scales, one ? 0 : i));
      const int zero = w.zeros != nullptr ? w.zeros[one ? 0 : i] : 128;
      for (int64_t j = 0; j < m; ++j) {
        const RoundedRow<Real>& row = rounded[static_cast<size_t>(j)];
        const Real factor = row.step * scale;
        Real y = 0, loose = 0, exact = 0;
        for (int64_t part = 0; part < k; part += kPartColumns) {
          int64_t sum = 0;
          for (int64_t c = part; c < std::min(k, part + kPartColumns); ++c)
            sum += row.codes[static_cast<size_t>(c)] * (codes[c] - zero);
          y += static_cast<Real>(sum) * factor;
        }
        for (int64_t c = 0; c < k; ++c) {
          const Real value = row.outliers[static_cast<size_t>(c)];
          if (value != 0 && !copied[static_cast<size_t>(c)])
            loose = std::fma(value, static_cast<Real>(codes[c] - zero), loose);
        }
        for (int64_t c = 0; c < args.copies; ++c) {
          const auto weight = static_cast<Real>(small_float(args.copy_dtype, args.copy, i * args.copies + c));
          exact = std::fma(row.outliers[static_cast<size_t>(args.columns[c])], weight, exact);
        }
        y += scale * loose;
        y += exact;
        if (args.bias != nullptr) y += static_cast<Real>(bias[i]);
        store_double(args.x.dtype, args.y, j * w.n + i, y);
      }
    }
  });
}

}  // namespace

void linear_int8(const LinearInt8Args& args) {
  return args.x.dtype == DType::F64 ? linear_floor<double>(args) : linear_floor<float>(args);
}

}  // namespace bitfold::cpu
