// y = x W^T + b and dx = dy W, cut over output elements: a sum is never shared by threads, so its order never changes.
#include <algorithm>
#include <type_traits>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/linear_int8.hpp"
#include "cpu/plan.hpp"

namespace bitfold::cpu {
namespace {

// Rows of x that are arranged at a time: the panel of a larger batch would not stay in cache.
constexpr int64_t kBatchRows = 512;
// Rows of the weight that are decoded at a time, in pieces of kTileColumns: 384 KB, for the second cache.
constexpr int64_t kStripRows = 96;
// So many rows of x come from the second cache faster than decoded tiles go there and come back: a tile is multiplied
// with all of them at once, while it is in the first.
constexpr int64_t kFewRows = 32;
static_assert(kStripRows % kTileRows == 0 && kTileColumns % kAlign == 0);

void linear_fused(const LinearArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const LinearKernel& kernel = kernels.linear[args.w.format.row];
  const int64_t m = args.x.rows, k = args.w.k, rows = fused_rows(static_cast<int>(m));
  const int64_t stride = round_up(k, kernel.chunk);
  Buffer<float> panel(rows * stride), sums(rows * (stride / kernel.word)), row(k);
  for (int64_t j = 0; j < rows; ++j) {
    if (j < m) read_row(kernels, args.x, j, row.data());
    else std::fill_n(row.data(), k, 0.0f);
    kernel.arrange(row.data(), k, static_cast<int>(j), static_cast<int>(rows), panel.data(), sums.data());
  }
  const int64_t block = std::max(grain_rows(k), round_up(args.w.n / 16, kTileRows));
  share(args.parallel_for, args.w.n, block, [&](const auto& next) {
    Buffer<float> out(m * block), scratch(fused_scratch(k));
    for (int64_t begin = 0, end = 0; next(&begin, &end);) {
      kernel.fused({&args.w, panel.data(), sums.data(), static_cast<int>(m), begin, end, out.data(), end - begin,
                    scratch.data()});
      Epilogue finish(kernels, args, begin, end);
      for (int64_t j = 0; j < m; ++j) finish(j, out.data() + j * (end - begin));
    }
  });
}

// Interleaved rows of fp32 as what the tile multiplies.
void place(const Kernels&, const float* from, int64_t columns, int64_t rows, float* to) {
  std::memcpy(to, from, static_cast<size_t>(columns * rows) * sizeof(float));
}
void place(const Kernels& kernels, const float* from, int64_t columns, int64_t rows, uint16_t* to) {
  kernels.round_bf16(from, columns, static_cast<int>(rows), to);
}

// Rows [first, first + m) of x, arranged in blocks of `block` rows.
template <class T>
void arrange_panel(const Kernels& kernels, const LinearArgs& args, int64_t first, int64_t m, int64_t block, T* panel) {
  const int64_t k = args.w.k;
  const LinearKernel& kernel = kernels.linear[args.w.format.row];
  const int64_t stride = round_up(k, kernel.chunk);
  cut(args.parallel_for, ceil_div(m, block), grain_rows(block * k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(k), arranged(block * stride), sums(block * (stride / kernel.word));
    for (int64_t j0 = begin * block; j0 < end * block; j0 += block) {
      for (int64_t j = 0; j < block; ++j) {
        if (j0 + j < m) read_row(kernels, args.x, first + j0 + j, row.data());
        else std::fill_n(row.data(), k, 0.0f);
        kernel.arrange(row.data(), k, static_cast<int>(j), static_cast<int>(block), arranged.data(), sums.data());
      }
      place(kernels, arranged.data(), stride, block, panel + j0 * stride);
    }
  });
}

// Columns [begin, end) of kTileRows rows from `row` on, arranged; rows past n are zero.
void decode_tile(const Kernels& kernels, const Weight& w, int64_t row, int64_t begin, int64_t end, float* tile,
                 float* scratch) {
  const LinearKernel& kernel = kernels.linear[w.format.row];
  const auto rows = static_cast<int>(std::min<int64_t>(kTileRows, w.n - row));
  if (rows < kTileRows) std::fill_n(tile, kTileRows * kTileColumns, 0.0f);
  if (kernel.decode != nullptr && fused_supports(w.format)) {
    kernel.decode(w, row, rows, begin, end, tile, scratch);
  } else {
    for (int i = 0; i < rows; ++i) {
      decode_row(kernels, w, row + i, begin, end, scratch);
      kernel.arrange(scratch, end - begin, i, kTileRows, tile, scratch + kTileColumns);
    }
  }
}

// Asks the second cache for `bytes` bytes.
void ask_for(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// T: the operands' type, fp32 or bf16.
template <class T>
void linear_tiled(const LinearArgs& args, void (*tile)(const TileArgs<T>&)) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t block = kernels.tile_x, stride = round_up(w.k, kernels.linear[w.format.row].chunk);
  const int64_t strip = std::min(kStripRows, std::max<int64_t>(2 * kTileRows, round_up(w.n / 8, kTileRows)));
  Buffer<T> panel(round_up(std::min(args.x.rows, kBatchRows), block) * stride);
  for (int64_t first = 0; first < args.x.rows; first += kBatchRows) {
    const int64_t m = std::min(kBatchRows, args.x.rows - first), padded = round_up(m, block);
    arrange_panel(kernels, args, first, m, block, panel.data());
    const bool few = m <= kFewRows;
    const int64_t at_once = few ? kTileRows : strip;  // rows of the weight
    share(args.parallel_for, w.n, strip, [&](const auto& next) {
      Buffer<T> tiles(strip * kTileColumns);
      Buffer<float> decoded(kTileRows * kTileColumns), sums(padded * strip), scratch(fused_scratch(kTileColumns));
      for (int64_t row = 0, end = 0; next(&row, &end);) {
        const int64_t rows = end - row;
        std::fill_n(sums.data(), padded * strip, 0.0f);
        for (int64_t column = 0; column < w.k; column += kTileColumns) {
          const int64_t end_column = std::min(w.k, column + kTileColumns),
                        depth = std::min(kTileColumns, stride - column);
          for (int64_t top = 0; top < rows; top += at_once) {
            const int64_t bottom = std::min(top + at_once, rows);
            for (int64_t i = top; i < bottom; i += kTileRows) {
              T* to = tiles.data() + (i - top) * kTileColumns;
              if constexpr (std::is_same_v<T, float>) {
                decode_tile(kernels, w, row + i, column, end_column, to, scratch.data());
              } else {
                decode_tile(kernels, w, row + i, column, end_column, decoded.data(), scratch.data());
                place(kernels, decoded.data(), depth, kTileRows, to);
              }
            }
            // All of a large x is too much for the second cache: with each tile a part of the rows that come next is
            // asked for.
            const int64_t part = few ? 0 : ceil_div(depth * block, ceil_div(rows, kTileRows));
            for (int64_t j = 0; j < padded; j += block) {
              const T* ahead = panel.data() +
                               (j + block < padded ? (j + block) * stride + column * block : end_column % w.k * block);
              for (int64_t i = top; i < bottom; i += kTileRows) {
                ask_for(ahead, part * static_cast<int64_t>(sizeof(T)));
                ahead += part;
                tile({tiles.data() + (i - top) * kTileColumns, panel.data() + j * stride + column * block,
                      static_cast<int>(std::min(block, m - j)), depth, sums.data() + j * strip + i, strip});
              }
            }
          }
        }
        Epilogue finish(kernels, args, row, end);
        for (int64_t j = 0; j < m; ++j) finish(first + j, sums.data() + j * strip);
      }
    });
  }
}

// ---- the floor: float64 sums, a decoded row at a time, any layout ----

void read_matrix(const MatrixIn& in, ParallelFor parallel_for, double* to) {
  cut(parallel_for, in.rows, grain_rows(in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) read_row(in, j, to + j * in.columns);
  });
}

void linear_floor(const LinearArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  Buffer<double> x(args.x.rows * w.k);
  read_matrix(args.x, args.parallel_for, x.data());
  const MatrixIn bias_row{args.bias, args.x.dtype, 1, w.n, w.n, 1};
  Buffer<double> bias(args.bias != nullptr ? w.n : 0);
  if (args.bias != nullptr) read_row(bias_row, 0, bias.data());
  cut(args.parallel_for, w.n, grain_rows(w.k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(w.k);
    for (int64_t i = begin; i < end; ++i) {
      decode_row(kernels, w, i, 0, w.k, row.data());
      for (int64_t j = 0; j < args.x.rows; ++j) {
        double sum = 0.0;
        for (int64_t c = 0; c < w.k; ++c) sum += x[j * w.k + c] * static_cast<double>(row[c]);
        if (args.row_scales != nullptr) sum *= static_cast<double>(args.row_scales[j]);
        if (args.bias != nullptr) sum += bias[i];
        store_double(args.x.dtype, args.y, j * w.n + i, sum);
      }
    }
  });
}

// ---- dx = dy W ----

// Columns of dx that one thread sums up, rows of W that are decoded at a time, rows of W in one partial sum, and rows
// of dy at a time (their sums stay in cache).
constexpr int64_t kGradColumns = 256;
constexpr int64_t kGradRows = 32;
constexpr int64_t kGradPartial = 512;
constexpr int64_t kGradBatch = 128;
static_assert(kGradRows % kAxpyRows == 0 && kGradPartial % kGradRows == 0 && kGradColumns % kAlign == 0);

void grad_x_tiled(const LinearGradArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t stride = round_up(w.n, kGradRows);
  Buffer<float> dy(std::min(args.dy.rows, kGradBatch) * stride);
  for (int64_t first = 0; first < args.dy.rows; first += kGradBatch) {
    const int64_t m = std::min(kGradBatch, args.dy.rows - first);
    for (int64_t j = 0; j < m; ++j) {
      read_row(kernels, args.dy, first + j, dy.data() + j * stride);
      std::fill(dy.data() + j * stride + w.n, dy.data() + (j + 1) * stride, 0.0f);
    }
    cut(args.parallel_for, ceil_div(w.k, kGradColumns), 1, [&](int64_t begin, int64_t end) {
      Buffer<float> tile(kGradRows * kGradColumns), partial(m * kGradColumns), total(m * kGradColumns);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t column = chunk * kGradColumns, columns = std::min(kGradColumns, w.k - column);
        std::fill_n(total.data(), m * kGradColumns, 0.0f);
        for (int64_t row = 0; row < w.n; row += kGradPartial) {
          std::fill_n(partial.data(), m * kGradColumns, 0.0f);
          for (int64_t r = row; r < std::min(w.n, row + kGradPartial); r += kGradRows) {
            std::fill_n(tile.data(), kGradRows * kGradColumns, 0.0f);
            for (int64_t i = 0; i < std::min(kGradRows, w.n - r); ++i) {
              decode_row(kernels, w, r + i, column, column + columns, tile.data() + i * kGradColumns);
            }
            kernels.axpy({tile.data(), kGradColumns, kGradRows, kGradColumns, dy.data() + r, stride, m, partial.data(),
                          kGradColumns});
          }
          for (int64_t i = 0; i < m * kGradColumns; ++i) total[i] += partial[i];
        }
        for (int64_t j = 0; j < m; ++j) {
          const int64_t at = ((first + j) * w.k + column) * dtype_bytes(args.dy.dtype);
          kernels.from_float(total.data() + j * kGradColumns, columns, args.dy.dtype, static_cast<char*>(args.dx) + at);
        }
      }
    });
  }
}

void grad_x_floor(const LinearGradArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  Buffer<double> dy(args.dy.rows * w.n);
  read_matrix(args.dy, args.parallel_for, dy.data());
  cut(args.parallel_for, ceil_div(w.k, kGradColumns), 1, [&](int64_t begin, int64_t end) {
    Buffer<float> row(kGradColumns);
    Buffer<double> sums(args.dy.rows * kGradColumns);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t column = chunk * kGradColumns, columns = std::min(kGradColumns, w.k - column);
      std::fill_n(sums.data(), args.dy.rows * kGradColumns, 0.0);
      for (int64_t i = 0; i < w.n; ++i) {
        decode_row(kernels, w, i, column, column + columns, row.data());
        for (int64_t j = 0; j < args.dy.rows; ++j) {
          for (int64_t c = 0; c < columns; ++c)
            sums[j * kGradColumns + c] += dy[j * w.n + i] * static_cast<double>(row[c]);
        }
      }
      for (int64_t j = 0; j < args.dy.rows; ++j) {
        for (int64_t c = 0; c < columns; ++c)
          store_double(args.dy.dtype, args.dx, j * w.k + column + c, sums[j * kGradColumns + c]);
      }
    }
  });
}

}  // namespace

void linear(const LinearArgs& args) {
  if (args.x.rows == 0) return;  // the kernels have one row or more
  const Kernels& kernels = cpu::kernels();
  if (args.activations == Activations::Int8) return linear_int8(args, kernels.int8[args.w.format.row]);
  const LinearPlan plan = plan_linear(args.w.format, args.w.layout, args.x.rows, args.x.dtype);
  switch (plan.regime) {
    case Regime::Fused: return linear_fused(args);
    case Regime::Tiled:
      switch (tiled_operands(kernels, args.w.format, args.x.dtype)) {
        case Operands::Int16: return linear_int8(args, kernels.int16[args.w.format.row]);
        case Operands::BF16: return linear_tiled(args, kernels.tile_bf16);
        case Operands::F32: return linear_tiled(args, kernels.tile);
      }
      break;
    case Regime::Floor: return linear_floor(args);
  }
}

void linear_grad_x(const LinearGradArgs& args) {
  const bool floor = args.dy.dtype == DType::F64 || args.w.layout == Layout::Flat;
  return floor ? grad_x_floor(args) : grad_x_tiled(args);
}

}  // namespace bitfold::cpu
