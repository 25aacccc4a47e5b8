// The search for the step of a group: rows in lanes, every step against the same few columns, which stay in the first
// cache.
#include "cpu/gptq.hpp"
#include "cpu/isa.hpp"
#include "search/step_search.inl"

namespace bitfold::cpu {
namespace {

constexpr int kVectors = kPanel / kLanes;

template <bool Weighted, class Levels>
BITFOLD_SIMD void try_step(const PanelSearch& p, int64_t i, const Levels& levels) {
  for (int v = 0; v < kVectors; v += 2) {
    const int64_t at = i * kPanel + v * kLanes;
    const search::Tried first(load(p.ratios + at), load(p.zeros + v * kLanes));
    const search::Tried second(load(p.ratios + at + kLanes), load(p.zeros + (v + 1) * kLanes));
    F sums[2] = {load(p.costs + at), load(p.costs + at + kLanes)};
    const float* column = p.columns + v * kLanes;
    for (int64_t c = 0; c < p.count; ++c, column += kPanel) {
      F costs[2] = {search::cost(load(column), first, levels), search::cost(load(column + kLanes), second, levels)};
      if constexpr (Weighted) {
        const F importance = splat(p.importance[c]);
        for (F& cost : costs) cost = mul(cost, importance);
      }
      for (int j = 0; j < 2; ++j) sums[j] = add(sums[j], costs[j]);
    }
    store(p.costs + at, sums[0]);
    store(p.costs + at + kLanes, sums[1]);
  }
}

template <bool Weighted>
void try_steps(const PanelSearch& p) {
  if (p.levels != nullptr) {
    const search::Entries levels{p.levels, p.middles};
    for (int64_t i = 0; i < p.tried; ++i) try_step<Weighted>(p, i, levels);
  } else {
    const search::Wholes levels{splat(static_cast<float>(p.low)), splat(static_cast<float>(p.high))};
    for (int64_t i = 0; i < p.tried; ++i) try_step<Weighted>(p, i, levels);
  }
}

void search_panel(const PanelSearch& p) {
  if (p.importance != nullptr) try_steps<true>(p);
  else try_steps<false>(p);
}

}  // namespace

void BITFOLD_ISA(step_search)(Kernels& kernels) { kernels.panel_search = search_panel; }

}  // namespace bitfold::cpu
