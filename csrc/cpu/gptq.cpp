// GPTQ: the factor of the Hessian, and the loop over columns.
//
// Both cut everything into panels of kPanel columns (of the factor) or rows (of the weight). The factor is made
// kFactorRows rows at a time, panel by panel; rows of the weight know nothing of each other, so a thread takes some
// through all columns, with their errors in its cache. No sum depends on who works it out: the bits are the same for
// any number of threads.
#include "cpu/gptq.hpp"

#include <algorithm>

#include "cpu/buffer.hpp"

namespace bitfold::cpu {
namespace {

// ---- the factor ----

float element(const MatrixIn& matrix, int64_t row, int64_t column, double inverse_unit, double damping) {
  const int64_t at = row * matrix.row_stride + column * matrix.column_stride;
  const double value = matrix.dtype == DType::F64 ? static_cast<const double*>(matrix.data)[at]
                                                  : static_cast<double>(static_cast<const float*>(matrix.data)[at]);
  return static_cast<float>(value * inverse_unit + (row == column ? damping : 0.0));
}

// Panel p of the factor: [rows, kPanel] floats.
class Panels {
 public:
  explicit Panels(int64_t k) : rows_(round_up(k, kPanel)), data_(rows_ * rows_) {}
  float* at(int64_t panel, int64_t row) { return data_.data() + panel * rows_ * kPanel + row * kPanel; }
  int64_t rows() const { return rows_; }

 private:
  int64_t rows_;
  Buffer<float> data_;
};

// Minus the damped Hessian, `count` rows from `first` of one panel; beyond its end 1 on the diagonal.
void read_panel(const GptqFactorArgs& args, int64_t panel, int64_t first, int64_t count, float* rows) {
  const int64_t k = args.hessian.columns;
  const double inverse_unit = 1.0 / args.unit;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t row = first + c, column = panel * kPanel + r;
      const bool inside = row < k && column < k;
      rows[c * kPanel + r] =
          inside ? -element(args.hessian, args.order[row], args.order[column], inverse_unit, args.damping)
                 : (row == column ? -1.0f : 0.0f);
    }
  }
}

// ---- the columns ----

// Columns [begin, end), at most kPanel, and all that lies behind them.
struct Step {
  int64_t begin;
  int64_t end;
  int64_t at;  // of its packed factors: the triangle [kPanel, kPanel], then [k - end, kPanel]
};

// From the last columns to the first.
int64_t plan_steps(const GptqColumnsArgs& args, Buffer<Step>* steps) {
  int64_t at = 0, count = 0;
  for (int64_t end = args.begin + args.weight.columns; end > args.begin; ++count) {
    const int64_t begin = std::max(args.begin, end - kPanel);
    (*steps)[count] = {begin, end, at};
    at += (kPanel + args.k - end) * kPanel;
    end = begin;
  }
  return at;
}

// Rows [begin, end) of the factor with columns in rows: what a product reads in order.
void pack_step(const GptqColumnsArgs& args, const Step& step, float* packed) {
  const int64_t width = step.end - step.begin;
  std::fill(packed, packed + kPanel * kPanel, 0.0f);
  for (int64_t c = 0; c < width; ++c) {
    const float* row = args.factor + (step.begin + c) * args.k + step.begin;
    std::copy(row + c, row + width, packed + c * kPanel + c);
  }
  float* behind = packed + kPanel * kPanel;
  for (int64_t first = step.end; first < args.k; first += kPanel) {
    const int64_t count = std::min(kPanel, args.k - first);
    for (int64_t c = 0; c < kPanel; ++c) {
      const float* row = args.factor + (step.begin + c) * args.k + first;
      for (int64_t j = 0; j < count; ++j) behind[j * kPanel + c] = c < width ? row[j] : 0.0f;
    }
    behind += count * kPanel;
  }
}

// Panels of rows that a thread takes at once: the packed factors are read once for all of them.
constexpr int64_t kRowPanels = 2;

// What a thread needs for kRowPanels panels of rows.
struct Scratch {
  explicit Scratch(const GptqColumnsArgs& args)
      : errors(kRowPanels * (args.k - args.begin) * kPanel),
        step(kRowPanels * args.grid.groups * kPanel),
        offset(kRowPanels * args.grid.groups * kPanel) {}
  Buffer<float> errors;  // of each panel [k - begin, kPanel]; of columns whose turn has yet to come the weights
  Buffer<float> step, offset;
  float sums[kPanel * kPanel];
  float loss[kPanel];
  uint8_t places[kPanel * kPanel];
};

// to[i, :] = rows [first, first + kPanel) of column i, 0 beyond the last row.
void read_rows(const float* from, int64_t count, int64_t n, int64_t first, float* to) {
  const int64_t rows = std::min(kPanel, n - first);
  for (int64_t i = 0; i < count; ++i) {
    std::copy(from + i * n + first, from + i * n + first + rows, to + i * kPanel);
    std::fill(to + i * kPanel + rows, to + (i + 1) * kPanel, 0.0f);
  }
}

class Columns {
 public:
  Columns(const GptqColumnsArgs& args, const Step* steps, int64_t step_count, const float* packed)
      : args_(args), kernels_(cpu::kernels()), steps_(steps), step_count_(step_count), packed_(packed) {
    std::fill(table_, table_ + kGptqLevels, 0.0f);
    if (args.grid.table != nullptr) {
      for (int64_t i = 0; i < kGptqLevels; ++i) table_[i] = args.grid.table[std::min(i, args.grid.high)];
    }
  }

  // Panels of rows from `panel` on.
  void run(int64_t panel, Scratch* scratch) const {
    const int64_t n = args_.weight.rows;
    const int64_t panels = std::min(kRowPanels, ceil_div(n, kPanel) - panel);
    for (int64_t i = 0; i < panels; ++i) read(panel + i, i, scratch);
    for (int64_t s = 0; s < step_count_; ++s) {
      for (int64_t i = 0; i < panels; ++i) round(steps_[s], panel + i, i, scratch);
    }
    if (args_.errors == nullptr) return;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = (panel + i) * kPanel, rows = std::min(kPanel, n - first);
      for (int64_t c = 0; c < args_.weight.columns; ++c) {
        const float* from = errors(i, scratch) + c * kPanel;
        std::copy(from, from + rows, args_.errors + c * n + first);
      }
    }
  }

 private:
  float* errors(int64_t i, Scratch* scratch) const {
    return scratch->errors.data() + i * (args_.k - args_.begin) * kPanel;
  }
  int64_t scales(int64_t i) const { return i * args_.grid.groups * kPanel; }

  // Weights, errors behind them and scales of panel number i of the scratch.
  void read(int64_t panel, int64_t i, Scratch* scratch) const {
    const int64_t n = args_.weight.rows, columns = args_.weight.columns, first = panel * kPanel;
    const int64_t rows = std::min(kPanel, n - first);
    const float* weight = static_cast<const float*>(args_.weight.data) + first * columns;
    float* to = errors(i, scratch);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < kPanel; ++r) to[c * kPanel + r] = r < rows ? weight[r * columns + args_.order[c]] : 0.0f;
    }
    read_rows(args_.behind, args_.k - args_.begin - columns, n, first, to + columns * kPanel);
    if (args_.grid.round) {
      read_rows(args_.grid.step, args_.grid.groups, n, first, scratch->step.data() + scales(i));
      read_rows(args_.grid.offset, args_.grid.groups, n, first, scratch->offset.data() + scales(i));
    }
    for (int64_t r = 0; r < rows; ++r) args_.loss[first + r] = 0.0;
  }

  void round(const Step& step, int64_t panel, int64_t i, Scratch* scratch) const {
    const int64_t n = args_.weight.rows, columns = args_.weight.columns, first = panel * kPanel;
    const int64_t rows = std::min(kPanel, n - first), width = step.end - step.begin;
    const float* triangle = packed_ + step.at;
    float* here = errors(i, scratch) + (step.begin - args_.begin) * kPanel;
    std::fill(scratch->sums, scratch->sums + kPanel * kPanel, 0.0f);
    kernels_.panel_product({triangle + kPanel * kPanel, here + width * kPanel, args_.k - step.end, scratch->sums});
    std::fill(scratch->loss, scratch->loss + kPanel, 0.0f);
    GptqGrid grid = args_.grid;
    grid.step = scratch->step.data() + scales(i);
    grid.offset = scratch->offset.data() + scales(i);
    if (grid.table != nullptr) grid.table = table_;
    kernels_.panel_round({here, scratch->sums, triangle, width, args_.group + (step.begin - args_.begin), grid,
                          scratch->places, scratch->loss});
    for (int64_t r = 0; r < rows; ++r) args_.loss[first + r] += static_cast<double>(scratch->loss[r]);
    if (!grid.round) return;
    const int64_t* order = args_.order + (step.begin - args_.begin);
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* codes = args_.codes + (first + r) * columns;
      for (int64_t c = 0; c < width; ++c) codes[order[c]] = scratch->places[c * kPanel + r];
    }
  }

  const GptqColumnsArgs& args_;
  const Kernels& kernels_;
  const Step* steps_;
  int64_t step_count_;
  const float* packed_;
  float table_[kGptqLevels];
};

}  // namespace

int64_t gptq_factor(const GptqFactorArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const int64_t k = args.hessian.columns;
  Panels panels(k);
  int64_t failed = -1;
  const int64_t last = panels.rows() / kPanel;
  for (int64_t first = 0; first < panels.rows() && failed < 0; first += kFactorRows) {
    const int64_t count = std::min(kFactorRows, panels.rows() - first);
    const int64_t begin = first / kPanel, end = begin + count / kPanel;
    const float* own[kFactorRows / kPanel];
    for (int64_t p = begin; p < end; ++p) own[p - begin] = panels.at(p, first);
    const auto work = [&](int64_t panel) {
      float* rows = panels.at(panel, first);
      read_panel(args, panel, first, count, rows);
      for (int64_t p = begin; p < end; ++p)
        kernels.panel_product({panels.at(p, 0), panels.at(panel, 0), first, rows + (p - begin) * kPanel * kPanel});
      return kernels.panel_factor({rows, own, count, panel < end ? panel - begin : -1});
    };
    for (int64_t p = begin; p < end && failed < 0; ++p) {
      const int64_t column = work(p);
      if (column >= 0) failed = first + column;
    }
    if (failed >= 0) break;
    share(args.parallel_for, last - end, 1, [&](const auto& next) {
      for (int64_t from = 0, to = 0; next(&from, &to);) work(end + from);
    });
  }
  if (failed >= 0) return failed + 1;
  cut(args.parallel_for, k, grain_rows(k), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* row = args.factor + c * k;
      const int64_t panel = c / kPanel;
      std::fill(row, row + panel * kPanel, 0.0f);
      for (int64_t p = panel; p < last; ++p) {
        const float* from = panels.at(p, c);
        std::copy(from, from + std::min(kPanel, k - p * kPanel), row + p * kPanel);
      }
    }
  });
  return 0;
}

void gptq_columns(const GptqColumnsArgs& args) {
  Buffer<Step> steps(ceil_div(args.weight.columns, kPanel));
  const int64_t floats = plan_steps(args, &steps), count = ceil_div(args.weight.columns, kPanel);
  Buffer<float> packed(floats);
  share(args.parallel_for, count, 1, [&](const auto& next) {
    for (int64_t from = 0, to = 0; next(&from, &to);) pack_step(args, steps[from], packed.data() + steps[from].at);
  });
  const Columns columns(args, steps.data(), count, packed.data());
  share(args.parallel_for, ceil_div(args.weight.rows, kPanel), kRowPanels, [&](const auto& next) {
    Scratch scratch(args);
    for (int64_t from = 0, to = 0; next(&from, &to);) columns.run(from, &scratch);
  });
}

}  // namespace bitfold::cpu
