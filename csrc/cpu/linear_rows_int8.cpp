// y = x W^T + b with x rounded to 8 bits, row by row, but for columns with outliers (formats/int8.hpp).
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/rows_int8.hpp"

namespace bitfold::cpu {
namespace {

// Rows of x that are multiplied at a time: their codes stay in the second cache.
constexpr int64_t kBatchRows = 256;
// Rows of the weight that a thread takes at a time: what is gathered of them after the product is still in the caches.
constexpr int64_t kStripRows = kRowsInt8Block;
// Columns with outliers that are multiplied at a time.
constexpr int64_t kSideColumns = 64;

double small_float(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::F32: return static_cast<const float*>(data)[i];
    case DType::BF16: return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    default: return half_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// ---- which columns have outliers ----

// Columns of x that are multiplied as they are: `loose` with the weight's codes, `exact` with the copy.
struct Sides {
  std::vector<int64_t> loose, exact;
};

Sides find_sides(const Kernels& kernels, const LinearInt8Args& args) {
  Sides sides;
  sides.exact.assign(args.columns, args.columns + args.copies);
  if (args.threshold <= 0.0) return sides;
  const int64_t k = args.w.k, size = dtype_bytes(args.x.dtype);
  const auto threshold = static_cast<float>(args.threshold);
  Buffer<float> largest(round_up(k, kAlign));
  constexpr int64_t kColumns = 1024;
  cut(args.parallel_for, ceil_div(k, kColumns), grain_rows(kColumns * args.x.rows), [&](int64_t begin, int64_t end) {
    Buffer<float> x(kColumns);
    std::fill_n(x.data(), kColumns, 0.0f);
    for (int64_t c = begin * kColumns; c < std::min(k, end * kColumns); c += kColumns) {
      MatrixIn part = args.x;
      part.data = static_cast<const char*>(args.x.data) + c * args.x.column_stride * size;
      part.columns = std::min(kColumns, k - c);
      std::fill_n(largest.data() + c, std::min(kColumns, round_up(k, kAlign) - c), 0.0f);
      for (int64_t j = 0; j < args.x.rows; ++j) {
        read_row(kernels, part, j, x.data());
        kernels.rows_int8->mark(x.data(), part.columns, largest.data() + c);
      }
    }
  });
  for (int64_t c = 0; c < k; ++c) {
    if (largest[c] >= threshold && !std::binary_search(sides.exact.begin(), sides.exact.end(), c))
      sides.loose.push_back(c);
  }
  return sides;
}

// ---- x ----

// Some rows of x: whole numbers times a step, and what is multiplied as it is.
class RoundedRows {
 public:
  RoundedRows(const Kernels& kernels, const LinearInt8Args& args, const Sides& sides, int64_t rows)
      : kernels_(kernels),
        args_(args),
        sides_(sides),
        stride_(round_up(args.w.k, kRowsInt8Block)),
        parts_(std::max<int64_t>(1, ceil_div(args.w.k, kPartColumns))),
        loose_stride_(static_cast<int64_t>(sides.loose.size())),
        exact_stride_(static_cast<int64_t>(sides.exact.size())),
        codes_(padded(rows) * stride_),
        sums_(rows * parts_),
        steps_(rows),
        loose_(rows * loose_stride_),
        exact_(rows * exact_stride_) {}

  // Rows [first, first + m) of x.
  void read(int64_t first, int64_t m) {
    const bool few = m <= kFusedRows;
    const int64_t group = few ? 1 : kernels_.rows_int8->group;
    cut(args_.parallel_for, m, grain_rows(args_.w.k), [&](int64_t begin, int64_t end) {
      Buffer<float> x(args_.w.k);
      Buffer<int8_t> codes(few ? 0 : stride_);
      for (int64_t j = begin; j < end; ++j) {
        read_row(kernels_, args_.x, first + j, x.data());
        int8_t* to = few ? codes_.data() + j * stride_ : codes.data();
        round(x.data(), j, to);
        if (few) continue;
        // Four columns of each row of a group in turn.
        int8_t* interleaved = codes_.data() + j / group * group * stride_ + j % group * 4;
        for (int64_t c = 0; c < stride_; c += 4) std::memcpy(interleaved + c * group, to + c, 4);
      }
    });
    for (int64_t j = m; few && j < fused_rows(static_cast<int>(m)); ++j) {
      std::memset(codes_.data() + j * stride_, 0, static_cast<size_t>(stride_));
    }
  }

  // sums[j * sum_stride + i] of rows [begin, end) of the weight, over the columns of one part.
  void multiply(int64_t m, int64_t part, int64_t begin, int64_t end, int32_t* sums, int64_t sum_stride) const {
    const bool few = m <= kFusedRows;
    const int64_t group = few ? 1 : kernels_.rows_int8->group, column = part * kPartColumns, k = args_.w.k;
    const auto* w = static_cast<const uint8_t*>(args_.w.codes) + begin * k + column;
    (few ? kernels_.rows_int8->few
         : kernels_.rows_int8->many)({w, k, end - begin, codes_.data() + column * group, group * stride_,
                                      std::min(kPartColumns, k - column), m, sums, sum_stride});
  }

  int64_t parts() const { return parts_; }
  int32_t sum(int64_t j, int64_t part) const { return sums_[j * parts_ + part]; }
  float step(int64_t j) const { return steps_[j]; }
  const float* loose() const { return loose_.data(); }
  const float* exact() const { return exact_.data(); }
  int64_t loose_stride() const { return loose_stride_; }
  int64_t exact_stride() const { return exact_stride_; }

 private:
  int64_t padded(int64_t rows) const {
    return round_up(std::max<int64_t>(rows, kFusedRows), kernels_.rows_int8->group);
  }

  void round(float* x, int64_t j, int8_t* codes) {
    const int64_t k = args_.w.k;
    float* loose = loose_.data() + j * loose_stride_;
    float* exact = exact_.data() + j * exact_stride_;
    std::fill_n(loose, loose_stride_, 0.0f);
    std::fill_n(exact, exact_stride_, 0.0f);
    std::fill_n(sums_.data() + j * parts_, parts_, 0);
    std::memset(codes, 0, static_cast<size_t>(stride_));
    steps_[j] = std::numeric_limits<float>::quiet_NaN();
    if (!kernels_.group_range(x, k).finite) return;
    take(x, sides_.exact, 0.0f, exact);
    take(x, sides_.loose, args_.per_row ? static_cast<float>(args_.threshold) : 0.0f, loose);
    float inverse;
    if (args_.x_scale != nullptr) {
      steps_[j] = *args_.x_scale;
      inverse = 1.0f / steps_[j];
    } else {
      const GroupRange range = kernels_.group_range(x, k);
      const float largest = std::max(range.high, -range.low);
      steps_[j] = 0.0f;
      if (largest < kSmallestRow) return;
      steps_[j] = largest / 127.0f;
      inverse = 127.0f / largest;
    }
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t begin = part * kPartColumns;
      sums_[j * parts_ + part] =
          kernels_.rows_int8->round({x + begin, std::min(kPartColumns, k - begin), inverse, codes + begin});
    }
  }
  // Takes those of at least `least` out of x.
  static void take(float* x, const std::vector<int64_t>& columns, float least, float* to) {
    for (size_t i = 0; i < columns.size(); ++i) {
      float& value = x[columns[i]];
      if (std::abs(value) >= least) to[i] = std::exchange(value, 0.0f);
    }
  }

  const Kernels& kernels_;
  const LinearInt8Args& args_;
  const Sides& sides_;
  int64_t stride_, parts_, loose_stride_, exact_stride_;
  mutable Buffer<int8_t> codes_;
  mutable Buffer<int32_t> sums_;
  mutable Buffer<float> steps_, loose_, exact_;
};

// ---- a strip of rows of the weight ----

class Strip {
 public:
  Strip(const Kernels& kernels, const LinearInt8Args& args, int64_t m)
      : kernels_(kernels),
        args_(args),
        sums_(m * kStripRows),
        y_(m * kStripRows),
        side_(m * kStripRows),
        panel_(kSideColumns * kStripRows),
        scales_(kStripRows),
        zeros_(kStripRows) {}

  // Rows [begin, end) times m rows of x: the sums of row j, without bias, are row(j) then.
  void multiply(const RoundedRows& x, const Sides& sides, int64_t m, int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    read_scales(begin, rows);
    for (int64_t part = 0; part < x.parts(); ++part) {
      x.multiply(m, part, begin, end, sums_.data(), kStripRows);
      for (int64_t j = 0; j < m; ++j) {
        kernels_.rows_int8->scale({sums_.data() + j * kStripRows, scales_.data(), zeros_.data(), rows, x.sum(j, part),
                                   x.step(j), part == 0, row(j)});
      }
    }
    const auto* codes = static_cast<const uint8_t*>(args_.w.codes);
    if (!sides.loose.empty()) {
      multiply_side(
          x.loose(), x.loose_stride(), static_cast<int64_t>(sides.loose.size()), m, rows, [&](int64_t i, int64_t c) {
            return static_cast<float>(codes[(begin + i) * args_.w.k + sides.loose[static_cast<size_t>(c)]] - zeros_[i]);
          });
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t i = 0; i < rows; ++i) row(j)[i] += scales_[i] * side_[j * kStripRows + i];
      }
    }
    if (!sides.exact.empty()) {
      multiply_side(x.exact(), x.exact_stride(), args_.copies, m, rows, [&](int64_t i, int64_t c) {
        return static_cast<float>(small_float(args_.copy_dtype, args_.copy, (begin + i) * args_.copies + c));
      });
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t i = 0; i < rows; ++i) row(j)[i] += side_[j * kStripRows + i];
      }
    }
  }

  float* row(int64_t j) { return y_.data() + j * kStripRows; }

 private:
  void read_scales(int64_t begin, int64_t rows) {
    const Weight& w = args_.w;
    const bool one = w.format.group == kPerTensor;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = one ? 0 : begin + i;
      scales_[i] = static_cast<float>(small_float(scale_dtype(w.format.scale), w.scales, at));
      zeros_[i] = w.zeros != nullptr ? w.zeros[at] : 128;
    }
  }

  // side[j][i] = sum over c of x[j][c] weight(i, c), in order.
  template <class WeightAt>
  void multiply_side(const float* x, int64_t x_stride, int64_t columns, int64_t m, int64_t rows,
                     const WeightAt& weight) {
    std::fill_n(side_.data(), m * kStripRows, 0.0f);
    for (int64_t first = 0; first < columns; first += kSideColumns) {
      const int64_t count = std::min(kSideColumns, columns - first);
      std::fill_n(panel_.data(), count * kStripRows, 0.0f);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < count; ++c) panel_[c * kStripRows + i] = weight(i, first + c);
      }
      kernels_.rows_int8->add_products({panel_.data(), count, x + first, x_stride, m, side_.data()});
    }
  }

  const Kernels& kernels_;
  const LinearInt8Args& args_;
  Buffer<int32_t> sums_;
  Buffer<float> y_, side_, panel_, scales_;
  Buffer<int32_t> zeros_;
};

void linear_rows(const LinearInt8Args& args) {
  const Kernels& kernels = cpu::kernels();
  const Sides sides = find_sides(kernels, args);
  const LinearArgs ends{args.w, args.x, args.bias, args.y, args.parallel_for};
  const int64_t batch = std::min(args.x.rows, kBatchRows);
  RoundedRows x(kernels, args, sides, batch);
  for (int64_t first = 0; first < args.x.rows; first += batch) {
    const int64_t m = std::min(batch, args.x.rows - first);
    x.read(first, m);
    share(args.parallel_for, args.w.n, kStripRows, [&](const auto& next) {
      Strip strip(kernels, args, m);
      for (int64_t begin = 0, end = 0; next(&begin, &end);) {
        strip.multiply(x, sides, m, begin, end);
        Epilogue finish(kernels, ends, begin, end);
        for (int64_t j = 0; j < m; ++j) finish(first + j, strip.row(j));
      }
    });
  }
}

// ---- the floor: float64, one output after the other ----

// A row of x in whole numbers, and its outliers: 0 in all other columns.
struct RoundedRow {
  std::vector<int8_t> codes;
  std::vector<double> outliers;
  double step = 0;
};

// is_outlier: of each column.
RoundedRow round_row(const LinearInt8Args& args, const double* x, const uint8_t* is_outlier) {
  const int64_t k = args.w.k;
  RoundedRow row{std::vector<int8_t>(static_cast<size_t>(k)), std::vector<double>(static_cast<size_t>(k)), 0};
  if (!std::all_of(x, x + k, [](double value) { return std::isfinite(value); })) {
    row.step = std::numeric_limits<double>::quiet_NaN();
    return row;
  }
  double largest = 0;
  for (int64_t c = 0; c < k; ++c) {
    if (is_outlier[c]) row.outliers[static_cast<size_t>(c)] = x[c];
    else largest = std::max(largest, std::abs(x[c]));
  }
  const bool fixed = args.x_scale != nullptr;
  if (!fixed && largest < double(kSmallestRow)) return row;
  row.step = fixed ? double(*args.x_scale) : largest / 127;
  const double inverse = fixed ? 1 / row.step : 127 / largest;
  for (int64_t c = 0; c < k; ++c) {
    if (is_outlier[c]) continue;
    const double code = std::nearbyint(x[c] * inverse);
    row.codes[static_cast<size_t>(c)] = static_cast<int8_t>(std::clamp(code, -127.0, 127.0));
  }
  return row;
}

void mark_outliers(const LinearInt8Args& args, const double* x, uint8_t* is_outlier) {
  for (int64_t c = 0; c < args.w.k && args.threshold > 0; ++c) {
    if (std::isfinite(x[c]) && std::abs(x[c]) >= double(args.threshold)) is_outlier[c] = 1;
  }
}

void linear_floor(const LinearInt8Args& args) {
  const Weight& w = args.w;
  const int64_t m = args.x.rows, k = w.k;
  Buffer<double> rows(m * k);
  for (int64_t j = 0; j < m; ++j) read_row(args.x, j, rows.data() + j * k);
  std::vector<uint8_t> copied(static_cast<size_t>(k)), shared;
  for (int64_t i = 0; i < args.copies; ++i) copied[static_cast<size_t>(args.columns[i])] = 1;
  shared = copied;
  for (int64_t j = 0; j < m && !args.per_row; ++j) mark_outliers(args, rows.data() + j * k, shared.data());
  std::vector<RoundedRow> rounded;
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
      const auto scale = double(small_float(scale_dtype(w.format.scale), w.scales, one ? 0 : i));
      const int zero = w.zeros != nullptr ? w.zeros[one ? 0 : i] : 128;
      for (int64_t j = 0; j < m; ++j) {
        const RoundedRow& row = rounded[static_cast<size_t>(j)];
        const double factor = row.step * scale;
        double y = 0, loose = 0, exact = 0;
        for (int64_t part = 0; part < k; part += kPartColumns) {
          int64_t sum = 0;
          for (int64_t c = part; c < std::min(k, part + kPartColumns); ++c)
            sum += row.codes[static_cast<size_t>(c)] * (codes[c] - zero);
          y += double(sum) * factor;
        }
        for (int64_t c = 0; c < k; ++c) {
          const double value = row.outliers[static_cast<size_t>(c)];
          if (value != 0 && !copied[static_cast<size_t>(c)]) loose += value * double(codes[c] - zero);
        }
        for (int64_t c = 0; c < args.copies; ++c) {
          const auto weight = double(small_float(args.copy_dtype, args.copy, i * args.copies + c));
          exact += row.outliers[static_cast<size_t>(args.columns[c])] * weight;
        }
        y += scale * loose;
        y += exact;
        if (args.bias != nullptr) y += double(bias[i]);
        store_double(args.x.dtype, args.y, j * w.n + i, y);
      }
    }
  });
}

}  // namespace

void linear_int8(const LinearInt8Args& args) {
  return args.x.dtype == DType::F64 ? linear_floor(args) : linear_rows(args);
}

}  // namespace bitfold::cpu
