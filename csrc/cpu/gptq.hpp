// GPTQ's leaf kernels: everything is cut into panels of kPanel columns or rows, which lie side by side in lanes.
#pragma once

#include <cstdint>

#include "formats/gptq.hpp"

namespace bitfold::cpu {

inline constexpr int64_t kPanel = 32;

// sums[c, r] += sum over l < count of a[l, c] * b[l, r]; all of them [., kPanel].
struct PanelProduct {
  const float* a;
  const float* b;
  int64_t count;
  float* sums;
};

// A panel of `count` <= kPanel columns, rounded from the last to the first, of kPanel rows of the weight.
struct PanelRound {
  float* columns;         // [count, kPanel]: weights, which become errors
  float* sums;            // [count, kPanel]: what E Uᵀ has from the columns behind
  const float* triangle;  // [count, kPanel] of U
  int64_t count;
  const int64_t* group;  // of each column
  GptqGrid grid;         // step and offset [groups, kPanel]; a table has kGptqLevels entries, the last repeated
  uint8_t* places;       // [count, kPanel]
  float* loss;           // [kPanel], added to
};

// kFactorRows rows of U: solves UᵀX = -rows for a panel, in place, or factors it where the panel holds the diagonal.
struct PanelFactor {
  float* rows;              // [count, kPanel]
  const float* const* own;  // the panels that hold the diagonal, from these rows on
  int64_t count;            // a multiple of kPanel
  int64_t diagonal;         // which of them `rows` is, or -1
};
inline constexpr int64_t kFactorRows = 64;

// Some columns of kPanel rows against every step that is tried for their group.
struct PanelSearch {
  const float* columns;     // [count, kPanel]: weights over their start
  const float* importance;  // [count], or null: 1
  int64_t count;
  const float* ratios;  // [tried, kPanel]: steps over their start
  int64_t tried;
  const float* zeros;    // [kPanel]
  const float* levels;   // [kGptqLevels], the last repeated, or null
  const float* middles;  // [kGptqLevels - 1]: between a level and the next
  int64_t low, high;
  float* costs;  // [tried, kPanel], added to
};

int64_t gptq_factor(const GptqFactorArgs& args);  // 0, or 1 + the column whose pivot is not positive
void gptq_columns(const GptqColumnsArgs& args);
void search_steps(const StepSearchArgs& args);

}  // namespace bitfold::cpu
