// What finds which bug: a tiled product with one mistake at a time, under the schedules of every kernel test. What no
// schedule can find (two threads that add to one place) is ThreadSanitizer's: test_sanitizers.py.
#include <random>

#include "emulator_tests.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::test {
namespace {

enum class Mistake {
  None,
  NoBarrierAfterWait,
  NoBarrierAtLoopEnd,
  WeakWait,
  NoWait,
  SwappedOperand,
  SwappedColumn,
  WrongRow
};

constexpr int kRows = 32, kColumns = 32, kDepth = 32, kPadding = 8;
struct Tiles {
  alignas(16) uint16_t a[2][kRows][kDepth + kPadding];
  alignas(16) uint16_t b[2][kColumns][kDepth + kPadding];
};

struct Product {
  const uint16_t* a;  // rows x depth
  const uint16_t* b;  // columns x depth
  float* c;           // rows x columns
  int columns, depth;
};

// 128 threads: warp w has the 16 x 16 of C at rows 16 (w / 2), columns 16 (w % 2).
template <Mistake M>
__global__ void multiply_tiles(Product p) {
  Tiles& s = shared<Tiles>();
  const int thread = static_cast<int>(threadIdx.x), lane = ptx::lane_id(), warp = ptx::warp_id();
  const int row0 = static_cast<int>(blockIdx.y) * kRows, column0 = static_cast<int>(blockIdx.x) * kColumns;
  const auto fetch = [&](int step, int stage) {
    const int row = thread / 4, k = thread % 4 * 8;
    ptx::cp_async<16>(&s.a[stage][row][k], &p.a[(row0 + row) * p.depth + step * kDepth + k]);
    ptx::cp_async<16>(&s.b[stage][row][k], &p.b[(column0 + row) * p.depth + step * kDepth + k]);
  };
  float sums[2][4] = {};
  const int steps = p.depth / kDepth;
  fetch(0, 0);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1, (step + 1) % 2);
    ptx::cp_async_commit();
    if constexpr (M == Mistake::WeakWait) {
      ptx::cp_async_wait<2>();
    } else if constexpr (M != Mistake::NoWait) {
      ptx::cp_async_wait<1>();
    }
    if constexpr (M != Mistake::NoBarrierAfterWait) ptx::sync_block();
    const auto& tile_a = s.a[step % 2];
    const auto& tile_b = s.b[step % 2];
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4], b[4];
      const int a_row = 16 * (warp / 2) + (M == Mistake::WrongRow ? lane % 8 : lane % 16);
      ptx::ldmatrix_x4(a, &tile_a[a_row][k + lane / 16 * 8]);
      ptx::ldmatrix_x4(b, &tile_b[16 * (warp % 2) + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
      const uint32_t first[2] = {b[0], b[M == Mistake::SwappedOperand ? 2 : 1]};
      const uint32_t second[2] = {b[M == Mistake::SwappedOperand ? 1 : 2], b[3]};
      ptx::mma_f16(sums[0], a, first);
      ptx::mma_f16(sums[1], a, second);
    }
    if constexpr (M != Mistake::NoBarrierAtLoopEnd) ptx::sync_block();
  }
  for (int j = 0; j < 2; ++j) {
    for (int r = 0; r < 4; ++r) {
      const int row = row0 + 16 * (warp / 2) + lane / 4 + 8 * (r / 2);
      const int column =
          column0 + 16 * (warp % 2) + 8 * j + lane % 4 * 2 + (M == Mistake::SwappedColumn ? 1 - r % 2 : r % 2);
      p.c[row * p.columns + column] = sums[j][r];
    }
  }
}

// In how many of the first six schedules the product isn't what it is.
template <Mistake M>
int wrong_schedules() {
  constexpr int kM = 64, kN = 32, kK = 160;
  std::mt19937 random(1);
  std::vector<int> a(kM * kK), b(kN * kK);
  std::vector<uint16_t> half_a, half_b;
  for (int& value : a) half_a.push_back(float_to_half(static_cast<float>(value = static_cast<int>(random() % 17) - 8)));
  for (int& value : b) half_b.push_back(float_to_half(static_cast<float>(value = static_cast<int>(random() % 17) - 8)));
  int wrong = 0;
  under_schedules(6, [&] {
    std::vector<float> c(kM * kN);
    launch({dim3(kN / kColumns, kM / kRows), dim3(128), sizeof(Tiles), "multiply_tiles", nullptr}, multiply_tiles<M>,
           Product{half_a.data(), half_b.data(), c.data(), kN, kK});
    bool right = true;
    for (size_t row = 0; row < kM; ++row) {
      for (size_t column = 0; column < kN; ++column) {
        int sum = 0;
        for (size_t k = 0; k < kK; ++k) sum += a[row * kK + k] * b[column * kK + k];
        right &= c[row * kN + column] == static_cast<float>(sum);
      }
    }
    wrong += !right;
  });
  return wrong;
}

CASE(a_right_product_is_right_in_every_schedule) { expect(wrong_schedules<Mistake::None>() == 0, "wrong"); }
CASE(a_missing_barrier_after_the_wait_is_found) {
  expect(wrong_schedules<Mistake::NoBarrierAfterWait>() >= 2, "not found");
}
CASE(a_missing_barrier_at_the_loop_end_is_found) {
  expect(wrong_schedules<Mistake::NoBarrierAtLoopEnd>() >= 2, "not found");
}
CASE(a_wait_for_one_group_too_few_is_found) { expect(wrong_schedules<Mistake::WeakWait>() >= 2, "not found"); }
CASE(a_missing_wait_is_found) { expect(wrong_schedules<Mistake::NoWait>() >= 2, "not found"); }
CASE(a_swapped_operand_is_found) { expect(wrong_schedules<Mistake::SwappedOperand>() == 6, "not found"); }
CASE(a_swapped_column_is_found) { expect(wrong_schedules<Mistake::SwappedColumn>() == 6, "not found"); }
CASE(a_wrong_row_is_found) { expect(wrong_schedules<Mistake::WrongRow>() == 6, "not found"); }

// ---- small ones ----

struct Slots {
  int value[64];
};
__global__ void pass_on(int* out, bool with_sync) {
  Slots& s = shared<Slots>();
  s.value[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_sync) ptx::sync_warp();
  out[threadIdx.x] = s.value[threadIdx.x ^ 1u];
}

CASE(a_missing_sync_warp_is_found) {
  under_schedules(6, [] {
    std::vector<int> out(64);
    const auto right = [&](bool with_sync) {
      launch({dim3(1), dim3(64), sizeof(Slots), "pass_on", nullptr}, pass_on, out.data(), with_sync);
      for (int i = 0; i < 64; ++i) {
        if (out[static_cast<size_t>(i)] != (i ^ 1)) return false;
      }
      return true;
    };
    expect(right(true) && !right(false), "sync_warp");
  });
}

__global__ void read_from_last_block(int* values) {
  const int i = static_cast<int>(blockIdx.x);
  values[i] = i == 0 ? 1 : values[i - 1] + 1;
}

CASE(a_block_that_reads_what_another_writes_is_found) {
  int right = 0;
  under_schedules(6, [&] {
    std::vector<int> values(16);
    launch({dim3(16), dim3(1), 0, "read_from_last_block", nullptr}, read_from_last_block, values.data());
    right += values[15] == 16;
  });
  expect(right == 2, "only the schedules in order are right");  // 0 and 4
}

}  // namespace
}  // namespace bitfold::cuda::test
