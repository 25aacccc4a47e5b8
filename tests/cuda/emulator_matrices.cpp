// ldmatrix and mma against matrices that are laid out here from the tables of the PTX ISA, and plain loops.
#include <algorithm>
#include <cmath>
#include <random>

#include "cuda/emulator/tensor_core.hpp"
#include "emulator_tests.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- ldmatrix ----

struct Matrices {
  alignas(16) uint16_t row[32][8];  // four of 8 x 8
};
struct Loaded {
  uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
};

__global__ void load_matrices(const uint16_t* in, Loaded* out) {
  Matrices& s = shared<Matrices>();
  for (int i = 0; i < 8; ++i) s.row[threadIdx.x][i] = in[8 * threadIdx.x + static_cast<unsigned>(i)];
  ptx::sync_warp();
  Loaded& mine = out[threadIdx.x];
  ptx::ldmatrix_x4(mine.x4, s.row[threadIdx.x]);
  ptx::ldmatrix_x4_trans(mine.x4_trans, s.row[threadIdx.x]);
  // The last 16 lanes' addresses don't matter.
  ptx::ldmatrix_x2(mine.x2, threadIdx.x < 16 ? static_cast<const void*>(s.row[threadIdx.x]) : nullptr);
  ptx::ldmatrix_x2_trans(mine.x2_trans, s.row[threadIdx.x % 16]);
}

CASE(ldmatrix_gives_each_lane_its_pairs) {
  std::vector<uint16_t> in(256);
  for (size_t i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(1000 + 77 * i);
  const auto pair = [&](int matrix, int row, int column, int row_step, int column_step) {
    const auto one = [&](int r, int c) { return uint32_t{in[static_cast<size_t>(64 * matrix + 8 * r + c)]}; };
    return one(row, column) | one(row + row_step, column + column_step) << 16;
  };
  under_schedules(4, [&] {
    std::vector<Loaded> out(32);
    launch({dim3(1), dim3(32), sizeof(Matrices), "load_matrices", nullptr}, load_matrices, in.data(), out.data());
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; column += 2) {  // lane 4 row + column / 2
        const Loaded& lane = out[static_cast<size_t>(4 * row + column / 2)];
        for (int m = 0; m < 4; ++m) {
          expect(lane.x4[m] == pair(m, row, column, 0, 1), "x4");
          expect(lane.x4_trans[m] == pair(m, column, row, 1, 0), "x4_trans");
        }
        for (int m = 0; m < 2; ++m) {
          expect(lane.x2[m] == pair(m, row, column, 0, 1), "x2");
          expect(lane.x2_trans[m] == pair(m, column, row, 1, 0), "x2_trans");
        }
      }
    }
  });
}

__global__ void load_wrongly(int offset) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, reinterpret_cast<uint8_t*>(&shared<Matrices>()) + offset);
}

CASE(ldmatrix_checks_its_addresses) {
  const auto load = [](int offset) {
    launch({dim3(1), dim3(32), sizeof(Matrices), "load_wrongly", nullptr}, load_wrongly, offset);
  };
  load(496);
  expect_error([&] { load(8); }, {"an address of 16 bytes is aligned to 8"});
  expect_error([&] { load(512); }, {"ldmatrix at byte 512 of 512 of shared memory"});
}

// ---- mma ----

// Where element (row, k) of A, (k, column) of B and (row, column) of D lie, `each` to a register.
struct Spot {
  int lane, r, part;
};
Spot spot_a(int row, int k, int each) {
  return {row % 8 * 4 + k % (4 * each) / each, row / 8 + 2 * (k / (4 * each)), k % each};
}
Spot spot_b(int k, int column, int each) { return {column * 4 + k % (4 * each) / each, k / (4 * each), k % each}; }
Spot spot_d(int row, int column) { return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0}; }

template <class Sum>
struct Registers {
  uint32_t a[32][4] = {}, b[32][2] = {};
  Sum d[32][4] = {};
};

template <class Sum>
__global__ void multiply(Registers<Sum>* all, int kind, bool zero) {
  auto& d = all->d[threadIdx.x];
  const auto& a = all->a[threadIdx.x];
  const auto& b = all->b[threadIdx.x];
  if constexpr (std::is_same_v<Sum, int>) {
    if (kind == 1) ptx::mma_u8s8(d, a, b);
    else zero ? ptx::mma_s8_zero(d, a, b) : ptx::mma_s8(d, a, b);
  } else if (kind == 0) {
    zero ? ptx::mma_f16_zero(d, a, b) : ptx::mma_f16(d, a, b);
  } else {
    zero ? ptx::mma_bf16_zero(d, a, b) : ptx::mma_bf16(d, a, b);
  }
}

// Multiplies matrices whose elements `draw` gives as codes that mean `value`; returns the largest relative distance to
// sums in float64, over the sum of absolute products.
template <class Sum>
double multiply_and_compare(int kind, int each, bool zero, const std::function<uint32_t()>& draw,
                            const std::function<double(uint32_t)>& value, const std::function<Sum()>& draw_sum,
                            const std::function<double(uint32_t)>& value_of_a = nullptr) {
  const int depth = 8 * each, bits = 32 / each;
  Registers<Sum> registers;
  double a[16][32], b[32][8], c[16][8];
  for (int k = 0; k < depth; ++k) {
    for (int row = 0; row < 16; ++row) {
      const uint32_t code = draw();
      const Spot s = spot_a(row, k, each);
      registers.a[s.lane][s.r] |= code << bits * s.part;
      a[row][k] = value_of_a ? value_of_a(code) : value(code);
    }
    for (int column = 0; column < 8; ++column) {
      const uint32_t code = draw();
      const Spot s = spot_b(k, column, each);
      registers.b[s.lane][s.r] |= code << bits * s.part;
      b[k][column] = value(code);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const Spot s = spot_d(row, column);
      registers.d[s.lane][s.r] = draw_sum();
      c[row][column] = zero ? 0.0 : static_cast<double>(registers.d[s.lane][s.r]);
    }
  }
  launch({dim3(1), dim3(32), 0, "multiply", nullptr}, multiply<Sum>, &registers, kind, zero);
  double worst = 0;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = c[row][column], size = std::fabs(sum);
      for (int k = 0; k < depth; ++k) {
        sum += a[row][k] * b[k][column];
        size += std::fabs(a[row][k] * b[k][column]);
      }
      const Spot s = spot_d(row, column);
      worst = std::max(worst, std::fabs(static_cast<double>(registers.d[s.lane][s.r]) - sum) / std::max(size, 1e-300));
    }
  }
  return worst;
}

uint32_t small_integer(std::mt19937& random, bool half) {
  const auto number = static_cast<float>(static_cast<int>(random() % 33) - 16);
  return half ? float_to_half(number) : float_to_bf16(number);
}

// Of a number and products next to it, what is below 2^-24 of the largest is cut off, as is what fp32 lacks of the sum.
CASE(sums_of_mma_are_cut_off_as_tensor_cores_do) {
  const float small = std::ldexp(1.0f, -25);
  const auto factors = [](const std::vector<double>& values) {
    std::vector<emulator::Factor> made;
    for (const double value : values) made.push_back(emulator::factor(value, emulator::kSmallestHalf));
    return made;
  };
  const auto products = [&](float before, const std::vector<double>& a, const std::vector<double>& b) {
    return emulator::add_products(before, factors(a).data(), factors(b).data(), static_cast<int>(a.size()));
  };
  const auto sum = [&](float before, const std::vector<double>& few) {
    return products(before, std::vector<double>(few.size(), 1.0), few);
  };
  expect(sum(1.0f, {small, small, small, small}) == 1.0f, "each for itself, below the unit");
  expect(sum(1.0f, {2 * small, 2 * small}) == 1.0f + 4 * small, "units add up");
  expect(sum(1.0f, {2 * small}) == 1.0f, "half a place of fp32");
  expect(sum(1.0f, {-2 * small}) == 1.0f - 2 * small, "which there is below one");
  expect(sum(-1.0f, {-6 * small}) == -1.0f - 4 * small, "towards zero");
  expect(sum(0.0f, {1.0, -1.0, small}) == 0.0f, "what is cut off doesn't come back");
  expect(std::isnan(sum(1.0f, {INFINITY, -INFINITY})) && std::isinf(sum(INFINITY, {1.0})), "what isn't finite");
  expect(sum(0.0f, {}) == 0.0f, "nothing");
  // 2^-24 of 2^14 and of 16 + 2^-6 are 2^-10 and 2^-20 + 2^-30, in sight of each other, if they weren't aligned as
  // 2^-14 of 2^14 and of 16.
  const double tiny = 0x1p-24;
  expect(products(0.0f, {tiny, tiny}, {0x1p14, 16 + 0x1p-6}) == 0x1p-10f + 0x1p-20f, "halves that aren't normal");
  expect(products(0.0f, {1.0, 1.0}, {0x1p-10, 0x1p-20 + 0x1p-30}) == 0x1p-10f + 0x1p-20f + 0x1p-30f, "those that are");
  expect(products(0.0f, {0.0, tiny}, {0x1p14, 16 + 0x1p-6}) == 0x1p-20f + 0x1p-30f, "zero is aligned as nothing is");
}

// What two products of the first eight lose to a third, when they take each other away.
CASE(mma_of_halves_adds_as_many_products_at_a_time_as_the_gpu) {
  for (const int capability : {80, 89, 90}) {
    Registers<float> registers;
    const auto put = [&](int k, float of_a, float of_b) {
      const Spot a = spot_a(0, k, 2), b = spot_b(k, 0, 2);
      registers.a[a.lane][a.r] |= uint32_t{float_to_half(of_a)} << 16 * a.part;
      registers.b[b.lane][b.r] |= uint32_t{float_to_half(of_b)} << 16 * b.part;
    };
    put(0, 1, 0x1p14f), put(1, -1, 0x1p14f), put(8, 1, 0x1p-11f);
    emulator::config().capability = capability;
    launch({dim3(1), dim3(32), 0, "multiply", nullptr}, multiply<float>, &registers, 0, true);
    emulator::config() = {};
    expect(registers.d[0][0] == (capability < 90 ? 0x1p-11f : 0.0f), "eight or sixteen products at a time");
  }
}

CASE(mma_of_floats_is_exact_for_small_integers_and_near_for_others) {
  std::mt19937 random(1);
  const std::function<float()> sums = [&] { return static_cast<float>(static_cast<int>(random() % 2001) - 1000); };
  under_schedules(3, [&] {
    for (const bool zero : {false, true}) {
      for (const bool half : {true, false}) {
        const auto value = [&](uint32_t code) -> double {
          return half ? half_to_float(static_cast<uint16_t>(code)) : bf16_to_float(static_cast<uint16_t>(code));
        };
        const auto integers = [&] { return small_integer(random, half); };
        expect(multiply_and_compare<float>(half ? 0 : 1, 2, zero, integers, value, sums) == 0, "integers");
        const auto any = [&]() -> uint32_t {  // finite, over many binades
          const float x =
              std::ldexp(static_cast<float>(random() % 2048) - 1024.0f, static_cast<int>(random() % 24) - 20);
          return half ? float_to_half(x) : float_to_bf16(x);
        };
        // 17 numbers lose less than a unit each, of 2^-24 of the largest, and fp32 two of the sum.
        expect(multiply_and_compare<float>(half ? 0 : 1, 2, zero, any, value, sums) < 19.0 / (1 << 24), "floats");
      }
    }
  });
}

CASE(mma_of_bytes_is_exact) {
  std::mt19937 random(2);
  const std::function<int()> sums = [&] { return static_cast<int>(random() % 200001) - 100000; };
  const auto value = [](uint32_t code) -> double { return static_cast<int8_t>(code); };
  under_schedules(3, [&] {
    for (const bool zero : {false, true}) {
      expect(multiply_and_compare<int>(0, 4, zero, [&] { return random() & 255u; }, value, sums) == 0, "bytes");
      expect(multiply_and_compare<int>(0, 4, zero, [&] { return 128u; }, value, sums) == 0, "smallest");
    }
    const auto whole = [](uint32_t code) -> double { return code; };
    expect(multiply_and_compare<int>(1, 4, false, [&] { return random() & 255u; }, value, sums, whole) == 0, "u8 s8");
  });
}

CASE(mma_knows_subnormals_infinities_and_nan) {
  Registers<float> registers;
  const auto put = [&](int k, uint32_t a, uint32_t b, int row) {
    const Spot s = spot_a(row, k, 2), t = spot_b(k, 0, 2);
    registers.a[s.lane][s.r] |= a << 16 * s.part;
    registers.b[t.lane][t.r] |= b << 16 * t.part;
  };
  put(0, 0x0001, 0x3c00, 0);  // 2^-24
  put(0, 0x7c00, 0, 1);       // infinity
  put(1, 0x7c00, 0, 2);       // infinity times zero
  launch({dim3(1), dim3(32), 0, "multiply", nullptr}, multiply<float>, &registers, 0, true);
  const auto d = [&](int row) { return registers.d[spot_d(row, 0).lane][spot_d(row, 0).r]; };
  expect(d(0) == std::ldexp(1.0f, -24) && d(1) == INFINITY && std::isnan(d(2)) && d(3) == 0, "special values");
}

}  // namespace
}  // namespace bitfold::cuda::test
