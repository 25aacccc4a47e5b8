// GPTQ on panels. Sums are taken product by product in one order, so that all instruction sets that fuse them give the
// same bits.
#include "cpu/gptq.hpp"
#include "cpu/isa.hpp"

namespace bitfold::cpu {
namespace {

constexpr int kVectors = kPanel / kLanes;  // of a row of a panel
// Sums that are held in registers: kSumColumns columns of a by two vectors of b.
constexpr int kSumColumns = kLanes == 16 ? 8 : 4;
// Rows of a and b that stay in the first cache, 16 KB of each, while all sums take them up.
constexpr int64_t kDepth = 128;

template <bool Ahead>  // whether it asks for the rows of a that come next
BITFOLD_SIMD void product_tile(const float* a, const float* b, int64_t count, float* to) {
  F sums[kSumColumns][2];
  for (int i = 0; i < kSumColumns; ++i) {
    for (int v = 0; v < 2; ++v) sums[i][v] = load(to + i * kPanel + v * kLanes);
  }
  for (int64_t l = 0; l < count; ++l) {
    if constexpr (Ahead) {
      prefetch(a + kDepth * kPanel);
      prefetch(a + kDepth * kPanel + kPanel / 2);
    }
    const F first = load(b), second = load(b + kLanes);
    for (int i = 0; i < kSumColumns; ++i) {
      const F factor = splat(a[i]);
      sums[i][0] = fma(factor, first, sums[i][0]);
      sums[i][1] = fma(factor, second, sums[i][1]);
    }
    a += kPanel;
    b += kPanel;
  }
  for (int i = 0; i < kSumColumns; ++i) {
    for (int v = 0; v < 2; ++v) store(to + i * kPanel + v * kLanes, sums[i][v]);
  }
}

void product(const PanelProduct& p) {
  for (int64_t l = 0; l < p.count; l += kDepth) {
    const int64_t count = smaller(kDepth, p.count - l);
    for (int64_t r = 0; r < kPanel; r += 2 * kLanes) {
      const float* a = p.a + l * kPanel;
      const float* b = p.b + l * kPanel + r;
      if (r == 0) product_tile<true>(a, b, count, p.sums);
      for (int64_t c = r == 0 ? kSumColumns : 0; c < kPanel; c += kSumColumns) {
        product_tile<false>(a + c, b, count, p.sums + c * kPanel + r);
      }
    }
  }
}

// rows[c] += factors[c] * lanes for c < count.
BITFOLD_SIMD void spread_on(float* rows, const float* factors, int64_t stride, int64_t count,
                            const F (&lanes)[kVectors]) {
  for (int64_t c = 0; c < count; ++c) {
    const F factor = splat(factors[c * stride]);
    for (int v = 0; v < kVectors; ++v) {
      float* to = rows + c * kPanel + v * kLanes;
      store(to, fma(factor, lanes[v], load(to)));
    }
  }
}

// The nearest level of each lane, and its value.
struct Levels {
  I place;
  F value;
};

BITFOLD_SIMD F quotient(F target, F step, F offset) {
  const F zero = splat(0.0f);
  return select(equal(step, zero), zero, div(sub(target, offset), step));
}

BITFOLD_SIMD Levels nearest(const GptqGrid& grid, F target, F step, F offset) {
  const F q = quotient(target, step, offset);
  if (grid.table == nullptr) {
    const F low = splat(static_cast<float>(grid.low)), high = splat(static_cast<float>(grid.high));
    const F level = min(max(round_even(q), low), high);
    return {to_int(sub(level, low)), add(mul(level, step), offset)};
  }
  I place = splat(0);
  for (int i = 0; i + 1 < kGptqLevels; ++i) {  // what repeats the last level is never above its own middle
    const float middle = (grid.table[i] + grid.table[i + 1]) * 0.5f;
    place = grid.table[i] < grid.table[i + 1] ? count_if(greater(q, splat(middle)), place) : place;
  }
  return {place, add(mul(lookup(load_table(grid.table), place), step), offset)};
}

void round_panel(const PanelRound& p) {
  F loss[kVectors];
  for (int v = 0; v < kVectors; ++v) loss[v] = load(p.loss + v * kLanes);
  for (int64_t c = p.count - 1; c >= 0; --c) {
    const F diagonal = splat(p.triangle[c * kPanel + c]);
    F errors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c * kPanel + v * kLanes;
      const F weight = load(p.columns + at), sum = load(p.sums + at);
      const F target = add(weight, div(sum, diagonal));
      F value = target;
      if (p.grid.round) {
        const int64_t scale = p.group[c] * kPanel + v * kLanes;
        const Levels levels = nearest(p.grid, target, load(p.grid.step + scale), load(p.grid.offset + scale));
        value = levels.value;
        store_bytes(p.places + at, levels.place);
      }
      errors[v] = sub(weight, value);
      store(p.columns + at, errors[v]);
      const F component = fma(diagonal, errors[v], sum);
      loss[v] = fma(component, component, loss[v]);
    }
    spread_on(p.sums, p.triangle + c, kPanel, c, errors);
  }
  for (int v = 0; v < kVectors; ++v) store(p.loss + v * kLanes, loss[v]);
}

// The column whose pivot is not positive, or -1.
int64_t factor_panel(const PanelFactor& p) {
  const int64_t count = p.diagonal < 0 ? p.count : (p.diagonal + 1) * kPanel;  // below the diagonal is nothing
  for (int64_t c = 0; c < count; ++c) {
    const int64_t panel = c / kPanel, lane = c % kPanel;
    const float* own = p.own[panel];
    float* row = p.rows + c * kPanel;
    float pivot = own[c * kPanel + lane];  // of a panel beside the diagonal: the root already
    if (panel == p.diagonal) {
      if (!(pivot < 0.0f)) return c;
      float lanes[kLanes];
      store(lanes, sqrt(splat(-pivot)));
      pivot = lanes[0];
      for (int64_t i = 0; i < lane; ++i) row[i] = 0.0f;
    }
    F lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      lanes[v] = div(sub(splat(0.0f), load(row + v * kLanes)), splat(pivot));
      store(row + v * kLanes, lanes[v]);
    }
    for (int64_t next = c + 1; next < count;) {  // the columns of one panel after the other
      const int64_t end = (next / kPanel + 1) * kPanel;
      spread_on(p.rows + next * kPanel, p.own[next / kPanel] + c * kPanel + next % kPanel, 1, end - next, lanes);
      next = end;
    }
  }
  return -1;
}

}  // namespace

void BITFOLD_ISA(gptq)(Kernels& kernels) {
  kernels.panel_product = product;
  kernels.panel_round = round_panel;
  kernels.panel_factor = factor_panel;
}

}  // namespace bitfold::cpu
