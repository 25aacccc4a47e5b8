// GPTQ's kernels against plain loops that take each sum in the order that the kernels promise: equal to the bit, with
// products fused where the instruction set fuses them, and rounded before they are added on the scalar one. The search
// for steps fuses nothing, and is hashed as all else.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/gptq.hpp"
#include "cpu/kernels.hpp"
#include "formats/codebooks.hpp"
#include "numbers.hpp"

namespace bitfold::plain {

// a * b + c as the instruction set that runs has it.
inline float fused(float a, float b, float c) {
  static const bool fuses = std::string(cpu::kernels().isa) != "scalar";
  return fuses ? std::fma(a, b, c) : a * b + c;
}

// The upper factor of hessian / unit + damping, [k, k].
inline Numbers factor(const Numbers& hessian, int64_t k, const std::vector<int64_t>& order, double unit,
                      double damping) {
  Numbers upper(static_cast<size_t>(k * k));
  const auto at = [&](int64_t row, int64_t column) -> float& { return upper[static_cast<size_t>(row * k + column)]; };
  for (int64_t c = 0; c < k; ++c) {
    float root = 0;
    for (int64_t r = c; r < k; ++r) {
      const size_t from = static_cast<size_t>(order[static_cast<size_t>(c)] * k + order[static_cast<size_t>(r)]);
      float sum = -static_cast<float>(double{hessian[from]} * (1.0 / unit) + (r == c ? damping : 0.0));
      for (int64_t l = 0; l < c; ++l) sum = fused(at(l, c), at(l, r), sum);
      if (r == c) root = std::sqrt(-sum);
      // A panel beside the diagonal's has the pivot as it is stored.
      at(c, r) = -sum / (r / cpu::kPanel == c / cpu::kPanel ? root : at(c, c));
    }
  }
  return upper;
}

struct Rounded {
  std::vector<uint8_t> codes;
  Numbers errors;
  std::vector<double> loss;
};

// What gptq_columns is to write.
inline Rounded columns(const GptqColumnsArgs& a) {
  const int64_t n = a.weight.rows, width = a.weight.columns, last = a.k - a.begin;
  Rounded out{std::vector<uint8_t>(static_cast<size_t>(n * width)), Numbers(static_cast<size_t>(n * width)),
              std::vector<double>(static_cast<size_t>(n))};
  Numbers errors(static_cast<size_t>(last));
  const auto upper = [&](int64_t c, int64_t l) { return a.factor[(a.begin + c) * a.k + a.begin + l]; };
  const auto error = [&](int64_t c) -> float& { return errors[static_cast<size_t>(c)]; };
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = width; c < last; ++c) error(c) = a.behind[(c - width) * n + r];
    for (int64_t end = width, begin = 0; end > 0; end = begin) {
      begin = std::max<int64_t>(0, end - cpu::kPanel);
      float loss = 0;
      for (int64_t c = end - 1; c >= begin; --c) {
        float sum = 0;
        for (int64_t l = end; l < last; ++l) sum = fused(upper(c, l), error(l), sum);
        for (int64_t l = end - 1; l > c; --l) sum = fused(upper(c, l), error(l), sum);
        const float weight = static_cast<const float*>(a.weight.data)[r * width + a.order[c]];
        const float target = weight + sum / upper(c, c);
        float value = target;
        if (a.grid.round) {
          const float step = a.grid.step[a.group[c] * n + r], offset = a.grid.offset[a.group[c] * n + r];
          const float quotient = step == 0.0f ? 0.0f : (target - offset) / step;
          int64_t place = 0;
          if (a.grid.table == nullptr) {
            const float low = static_cast<float>(a.grid.low), high = static_cast<float>(a.grid.high);
            place = static_cast<int64_t>(std::min(std::max(std::nearbyint(quotient), low), high) - low);
          } else {
            while (place < a.grid.high && quotient > (a.grid.table[place] + a.grid.table[place + 1]) * 0.5f) ++place;
          }
          const float level = a.grid.table == nullptr ? static_cast<float>(a.grid.low + place) : a.grid.table[place];
          value = level * step + offset;
          out.codes[static_cast<size_t>(r * width + a.order[c])] = static_cast<uint8_t>(place);
        }
        error(c) = weight - value;
        out.errors[static_cast<size_t>(c * n + r)] = error(c);
        const float component = fused(upper(c, c), error(c), sum);
        loss = fused(component, component, loss);
      }
      out.loss[static_cast<size_t>(r)] += double{loss};
    }
  }
  return out;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b, const char* what) {
  const bool equal = a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
  if (!equal) std::fprintf(stderr, "%s: %s are not those of the plain loops\n", cpu::kernels().isa, what);
  return equal;
}

// Columns of a matrix in any order, some behind that were rounded before, and some in front.
struct Problem {
  int64_t n = 37, k = 203, begin = 9, width = 131, group = 29;
  Numbers weight, hessian, behind, step, offset;
  std::vector<int64_t> order, columns, groups;

  explicit Problem(Engine& engine)
      : weight(gaussian(engine, n * width)),
        hessian(static_cast<size_t>(k * k)),
        behind(gaussian(engine, (k - begin - width) * n)),
        order(permutation(engine, k)),
        columns(permutation(engine, width)) {
    const Numbers x = gaussian(engine, 2 * k * k);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < 2 * k; ++t) {
          sum += double{x[static_cast<size_t>(t * k + i)]} * double{x[static_cast<size_t>(t * k + j)]};
        }
        hessian[static_cast<size_t>(i * k + j)] = hessian[static_cast<size_t>(j * k + i)] = static_cast<float>(sum);
      }
    }
    for (const int64_t column : columns) groups.push_back(column / group);
    for (int64_t i = 0; i < group_count() * n; ++i) {
      step.push_back(i % 50 == 0 ? 0.0f : 0.1f + 0.05f * std::abs(gaussian(engine)));
      offset.push_back(i % 3 == 0 ? 0.0f : gaussian(engine));
    }
  }
  int64_t group_count() const { return ceil_div(width, group); }
  static std::vector<int64_t> permutation(Engine& engine, int64_t count) {
    std::vector<int64_t> out(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const auto j = static_cast<int64_t>(engine() % static_cast<uint32_t>(i + 1));
      out[static_cast<size_t>(i)] = out[static_cast<size_t>(j)];
      out[static_cast<size_t>(j)] = i;
    }
    return out;
  }
};

inline bool factor_agrees(const Problem& p, ParallelFor parallel_for, Numbers* upper) {
  constexpr double kUnit = 417.0, kDamping = 0.01;
  upper->resize(static_cast<size_t>(p.k * p.k));
  const int64_t failed = cpu::gptq_factor(
      {{p.hessian.data(), DType::F32, p.k, p.k, p.k, 1}, p.order.data(), kUnit, kDamping, upper->data(), parallel_for});
  return failed == 0 && same(*upper, factor(p.hessian, p.k, p.order, kUnit, kDamping), "the factor's numbers");
}

inline bool columns_agree(const Problem& p, const Numbers& upper, const GptqGrid& grid, ParallelFor parallel_for) {
  Rounded found{std::vector<uint8_t>(static_cast<size_t>(p.n * p.width)), Numbers(static_cast<size_t>(p.n * p.width)),
                std::vector<double>(static_cast<size_t>(p.n))};
  const GptqColumnsArgs args{{p.weight.data(), DType::F32, p.n, p.width, p.width, 1},
                             p.columns.data(),
                             p.groups.data(),
                             upper.data(),
                             p.k,
                             p.begin,
                             p.behind.data(),
                             grid,
                             found.codes.data(),
                             found.errors.data(),
                             found.loss.data(),
                             parallel_for};
  cpu::gptq_columns(args);
  const Rounded wanted = columns(args);
  return same(found.codes, wanted.codes, "codes") && same(found.errors, wanted.errors, "errors") &&
         same(found.loss, wanted.loss, "losses");
}

}  // namespace bitfold::plain
