// Products of warpgroups: a small pipelined kernel against float64, and with one mistake at a time.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "emulator_tests.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- matrices as the PTX ISA lays them out ----

// Bytes of column c, row k (of 16) in a B whose core matrices of 8 columns by 8 k lie so.
size_t place(int column, int k, int leading, int stride) {
  return static_cast<size_t>(column / 8 * stride + k / 8 * leading + column % 8 * 16 + k % 8 * 2);
}
struct Spot {
  int thread, r, part;
};
Spot spot_a(int row, int k) { return {row / 16 * 32 + row % 8 * 4 + k % 8 / 2, row / 8 % 2 + 2 * (k / 8), k % 2}; }
Spot spot_d(int row, int column) {
  return {row / 16 * 32 + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row / 8 % 2 * 2 + column % 2, 0};
}

// ---- a kernel ----

enum class Mistake {
  None,
  NoWait,           // before the sums are read
  WeakWait,         // before a slot is given back
  NoCommit,         // of the last group
  NoFence,          // between A's registers and wgmma
  NoFirstFence,     // at all
  NoFull,           // no wait for x
  NoRelease,        // no wait for a free slot
  NoProxyFence,     // x by cp_async and not fenced
  EarlyProxyFence,  // before cp_async is waited for
  SwappedOffsets,
  OneWarpLess,  // doesn't wait
  WarpsDiffer,  // in their matrix
  LanesDiffer,
  TouchedA,  // A's registers written while wgmma reads them
  TouchedSums,
  Returns,  // with products in flight
};

constexpr int kSlots = 3, kSteps = 7, kDepth = 32;  // k of a slot

template <int N>
struct Room {
  alignas(128) uint8_t x[kSlots][N * kDepth * 2];
  ptx::Barrier full[kSlots], empty[kSlots];
};

struct Job {
  const uint32_t* a;  // [step][half][thread][4]
  const uint8_t* x;   // [step], as a slot holds it
  float* d;           // [thread][N / 2]
  bool accumulate;    // onto d
  bool bulk;          // how x comes
};

// 128 threads multiply, and those of another warpgroup bring x: one by copy_bulk, or all by cp_async.
template <int N, Mistake M>
__global__ void multiply(Job job) {
  constexpr int kBytes = N * kDepth * 2;
  auto& room = shared<Room<N>>();
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kSlots; ++i) {
      ptx::barrier_init(&room.full[i], job.bulk ? 1 : 128);
      ptx::barrier_init(&room.empty[i], 128);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (thread >= 128) {
    ptx::registers_down<40>();
    if (job.bulk && thread != 128) return;
    for (int step = 0; step < kSteps; ++step) {
      const int slot = step % kSlots;
      if (M != Mistake::NoRelease) ptx::barrier_wait(&room.empty[slot], static_cast<unsigned>(step / kSlots + 1) & 1u);
      if (job.bulk) {
        ptx::barrier_expect(&room.full[slot], kBytes);
        ptx::copy_bulk(room.x[slot], job.x + step * kBytes, kBytes, &room.full[slot]);
      } else {
        for (int i = (thread - 128) * 16; i < kBytes; i += 128 * 16) {
          ptx::cp_async<16>(&room.x[slot][i], job.x + step * kBytes + i);
        }
        ptx::cp_async_commit();
        if (M == Mistake::EarlyProxyFence) ptx::fence_async();
        ptx::cp_async_wait<0>();
        if (M != Mistake::NoProxyFence && M != Mistake::EarlyProxyFence) ptx::fence_async();
        ptx::barrier_arrive(&room.full[slot]);
      }
    }
    return;
  }
  ptx::registers_up<200>();
  float d[N / 2];
  uint32_t a[2][2][4];
  for (int i = 0; i < N / 2; ++i) d[i] = job.d[thread * (N / 2) + i];
  const auto load = [&](int step) {
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) a[step % 2][half][r] = job.a[((step * 2 + half) * 128 + thread) * 4 + r];
    }
  };
  for (int step = 0; step < kSteps; ++step) {
    const int slot = step % kSlots;
    load(step);
    if (M != Mistake::NoFull) ptx::barrier_wait(&room.full[slot], static_cast<unsigned>(step / kSlots) & 1u);
    if (M != Mistake::NoFirstFence && (M != Mistake::NoFence || step < 2)) ptx::wgmma_fence();
    for (int half = 0; half < 2; ++half) {
      int at = half * N * 32;
      if (M == Mistake::WarpsDiffer && ptx::warp_id() == 2) at = 0;
      if (M == Mistake::LanesDiffer && thread % 32 == 7) at = 0;
      const uint64_t b = M == Mistake::SwappedOffsets ? ptx::wgmma_matrix(&room.x[slot][at], 128, N * 16)
                                                      : ptx::wgmma_matrix(&room.x[slot][at], N * 16, 128);
      ptx::wgmma_f16<N>(d, a[step % 2][half], b, job.accumulate || step > 0 || half > 0);
    }
    if (M != Mistake::NoCommit || step + 1 < kSteps) ptx::wgmma_commit();
    if (M == Mistake::TouchedA) a[step % 2][0][0] ^= 1u;
    if (M == Mistake::TouchedSums) d[0] = 0;
    // The step before is done, and with it its slot and its registers.
    if (M == Mistake::WeakWait) {
      ptx::wgmma_wait<2>();
    } else if (M != Mistake::OneWarpLess || ptx::warp_id() != 3) {
      ptx::wgmma_wait<1>();
    }
    if (step > 0) ptx::barrier_arrive(&room.empty[(step - 1) % kSlots]);
  }
  if (M == Mistake::Returns) return;
  if (M != Mistake::NoWait) ptx::wgmma_wait<0>();
  ptx::wgmma_keep(d);
  for (int i = 0; i < N / 2; ++i) job.d[thread * (N / 2) + i] = d[i];
  if (M == Mistake::NoWait) ptx::wgmma_wait<0>();
}

// ---- and its data ----

template <int N>
struct Data {
  std::vector<uint32_t> a = std::vector<uint32_t>(kSteps * 2 * 128 * 4);
  std::vector<uint8_t> x;
  std::vector<float> d = std::vector<float>(64 * N);
  std::vector<double> right = std::vector<double>(64 * N), size = right;

  Data(bool accumulate, const std::function<float()>& draw) : x(kSteps * N * kDepth * 2 + 16) {
    const int depth = kSteps * kDepth;
    std::vector<double> w(static_cast<size_t>(64 * depth)), columns(static_cast<size_t>(N * depth));
    for (int k = 0; k < depth; ++k) {
      const int step = k / kDepth, half = k / 16 % 2;
      for (int row = 0; row < 64; ++row) {
        const uint16_t code = float_to_half(draw());
        const Spot s = spot_a(row, k % 16);
        a[static_cast<size_t>(((step * 2 + half) * 128 + s.thread) * 4 + s.r)] |= uint32_t{code} << 16 * s.part;
        w[static_cast<size_t>(row * depth + k)] = half_to_float(code);
      }
      for (int column = 0; column < N; ++column) {
        const uint16_t code = float_to_half(draw());
        const size_t at = static_cast<size_t>(k / 16 * N * 32) + place(column, k % 16, N * 16, 128);
        std::memcpy(start() + at, &code, 2);
        columns[static_cast<size_t>(column * depth + k)] = half_to_float(code);
      }
    }
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < N; ++column) {
        const auto i = static_cast<size_t>(row * N + column);
        const Spot s = spot_d(row, column);
        float& before = d[static_cast<size_t>(s.thread * (N / 2) + s.r)];
        before = accumulate ? draw() : std::numeric_limits<float>::quiet_NaN();
        right[i] = accumulate ? before : 0.0;
        for (int k = 0; k < depth; ++k) {
          const double product =
              w[static_cast<size_t>(row * depth + k)] * columns[static_cast<size_t>(column * depth + k)];
          right[i] += product;
          size[i] += std::fabs(product);
        }
      }
    }
  }
  uint8_t* start() { return x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16; }

  // The largest distance over the sum of absolute products; infinite where a sum isn't a number.
  double distance() const {
    double worst = 0;
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < N; ++column) {
        const Spot s = spot_d(row, column);
        const double found = d[static_cast<size_t>(s.thread * (N / 2) + s.r)];
        if (std::isnan(found)) return INFINITY;
        const auto i = static_cast<size_t>(row * N + column);
        worst = std::max(worst, std::fabs(found - right[i]) / std::max(size[i], 1e-300));
      }
    }
    return worst;
  }
};

template <int N, Mistake M = Mistake::None>
double run(bool accumulate, bool bulk, const std::function<float()>& draw) {
  Data<N> data(accumulate, draw);
  launch({dim3(1), dim3(256), sizeof(Room<N>), "multiply", nullptr}, multiply<N, M>,
         Job{data.a.data(), data.start(), data.d.data(), accumulate, bulk});
  return data.distance();
}

CASE(wgmma_is_exact_for_small_integers_and_near_for_others) {
  std::mt19937 random(1);
  const std::function<float()> integers = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };
  const std::function<float()> floats = [&] {
    return std::ldexp(static_cast<float>(random() % 2048) - 1024.0f, static_cast<int>(random() % 16) - 18);
  };
  under_schedules(6, [&] {
    for (const bool accumulate : {false, true}) {
      for (const bool bulk : {false, true}) {
        expect(run<64>(accumulate, bulk, integers) == 0, "integers, 64");
        expect(run<128>(accumulate, bulk, integers) == 0, "integers, 128");
        expect(run<64>(accumulate, bulk, floats) < 14.0 / (1 << 24), "floats, 64");
        expect(run<128>(accumulate, bulk, floats) < 14.0 / (1 << 24), "floats, 128");
      }
    }
  });
}

// ---- mistakes ----

// What a mistake ends in, in each of the first six schedules: "" where the numbers are right, "wrong", or an error.
template <Mistake M>
std::vector<std::string> ends(bool bulk) {
  std::mt19937 random(2);
  std::vector<std::string> found;
  under_schedules(6, [&] {
    try {
      found.push_back(run<64, M>(false, bulk, [&] { return static_cast<float>(random() % 7); }) == 0 ? "" : "wrong");
    } catch (const std::runtime_error& error) {
      found.emplace_back(error.what());
    }
  });
  return found;
}

// At least so many of six ends have this in their text; in the others the numbers tell, or nothing.
template <Mistake M>
void expect_ends(const std::string& part, int least, bool bulk, emulator::Where where = emulator::Where::current()) {
  int count = 0;
  for (const std::string& end : ends<M>(bulk)) {
    count += end.find(part) != std::string::npos;
    expect(end.empty() || end == "wrong" || end.find(part) != std::string::npos, "another end: " + end, where);
  }
  expect(count >= least, "in " + std::to_string(count) + " schedules", where);
}
// At least so many of six ends are wrong or an error.
template <Mistake M>
void expect_found(int least, emulator::Where where = emulator::Where::current()) {
  int count = 0;
  for (const std::string& end : ends<M>(true)) count += !end.empty();
  expect(count >= least, "in " + std::to_string(count) + " schedules", where);
}

CASE(sums_that_were_not_waited_for_are_wrong) { expect_ends<Mistake::NoWait>("wrong", 2, true); }
CASE(a_product_of_no_group_is_found) { expect_ends<Mistake::NoCommit>("returns before the end of wgmma", 2, true); }
CASE(a_slot_given_back_too_early_is_found) { expect_found<Mistake::WeakWait>(2); }
CASE(a_missing_wgmma_fence_is_found) {
  expect_ends<Mistake::NoFirstFence>("wgmma before the first wgmma_fence at emulator_wgmma.cpp", 6, true);
  expect_ends<Mistake::NoFence>("A's registers of wgmma were written after the last wgmma_fence", 6, true);
}
CASE(a_missing_wait_for_b_is_found) { expect_found<Mistake::NoFull>(2); }
CASE(b_that_is_overwritten_is_found) { expect_found<Mistake::NoRelease>(2); }
CASE(a_missing_fence_between_proxies_is_found) {
  expect_ends<Mistake::NoProxyFence>("without a fence_async since they were written, wgmma uses bytes", 6, false);
  expect_ends<Mistake::EarlyProxyFence>("without a fence_async since they were written, wgmma uses bytes", 2, false);
}
CASE(offsets_in_the_wrong_order_are_found) { expect_found<Mistake::SwappedOffsets>(6); }
CASE(a_warpgroup_comes_to_the_same_instructions) {
  expect_ends<Mistake::OneWarpLess>("of the warpgroup", 6, true);
  expect_ends<Mistake::WarpsDiffer>("the warps of the warpgroup give wgmma different arguments", 6, true);
  expect_ends<Mistake::LanesDiffer>("the lanes of the warp give wgmma different arguments", 6, true);
}
CASE(registers_in_flight_are_left_alone) {
  expect_ends<Mistake::TouchedA>("A's registers were written before the end of wgmma", 2, true);
  expect_ends<Mistake::TouchedSums>("sums were written", 2, true);
}
CASE(a_return_before_the_end_of_wgmma_is_found) {
  expect_ends<Mistake::Returns>("returns before the end of wgmma was waited for", 2, true);
}

// ---- one instruction ----

struct Bytes {
  alignas(128) uint8_t bytes[4096];
};
__global__ void multiply_at(int start, int leading, int stride, uint64_t bits) {
  auto& room = shared<Bytes>();
  float d[32] = {};
  const uint32_t a[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_f16<64>(d, a, ptx::wgmma_matrix(&room.bytes[start], leading, stride) | bits, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

CASE(wgmma_checks_its_matrix) {
  const auto run_at = [](int threads, int start, int leading, int stride, uint64_t bits) {
    launch({dim3(1), dim3(static_cast<unsigned>(threads)), sizeof(Bytes), "multiply_at", nullptr}, multiply_at, start,
           leading, stride, bits);
  };
  run_at(128, 0, 1024, 128, 0);
  run_at(128, 2048, 128, 256, 0);
  run_at(256, 0, 1024, 128, 0);
  expect_error([&] { run_at(128, 8, 1024, 128, 0); }, {"an address of 16 bytes is aligned to 8"});
  expect_error([&] { run_at(128, 0, 1032, 128, 0); },
               {"leading_bytes of a matrix of wgmma is a multiple of 16", "1032"});
  expect_error([&] { run_at(128, 0, 128, -16, 0); }, {"stride_bytes of a matrix of wgmma is a multiple of 16", "-16"});
  expect_error([&] { run_at(128, 2048 + 16, 128, 256, 0); }, {"wgmma at bytes 3984 ... 4111 of 4096 of shared memory"});
  expect_error([&] { run_at(128, 4096, 128, 256, 0); }, {"wgmma_matrix at byte 4096 of 4096"});
  expect_error([&] { run_at(128, 0, 1024, 128, uint64_t{1} << 62); }, {"bits that mean swizzling"});
  expect_error([&] { run_at(96, 0, 1024, 128, 0); }, {"wgmma_fence needs a whole warpgroup of 128 threads"});
}

__global__ void ask_for_registers(int threads) {
  if (static_cast<int>(threadIdx.x) < threads) ptx::registers_up<64>();
}

CASE(registers_are_a_whole_warpgroup_s) {
  const auto ask = [](int threads) {
    launch({dim3(1), dim3(128), 0, "ask_for_registers", nullptr}, ask_for_registers, threads);
  };
  under_schedules(4, [&] {
    ask(128);
    ask(0);
    expect_error([&] { ask(96); }, {"registers_up"});
    expect_error([&] { ask(112); }, {"registers_up"});
  });
}

// A store by the thread itself, fenced by it or not.
__global__ void multiply_stored(float* out, bool fenced) {
  auto& room = shared<Bytes>();
  for (unsigned i = threadIdx.x; i < 1024; i += 128) reinterpret_cast<uint16_t*>(room.bytes)[i] = 0x3c00;  // 1
  if (fenced) ptx::fence_async();
  ptx::sync_block();
  float d[32];
  const uint32_t a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  ptx::wgmma_fence();
  ptx::wgmma_f16<64>(d, a, ptx::wgmma_matrix(room.bytes, 1024, 128), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = d[31];
}

CASE(wgmma_sees_stores_behind_a_fence) {
  std::vector<float> out(128);
  under_schedules(4, [&] {
    const auto go = [&](bool fenced) {
      launch({dim3(1), dim3(128), sizeof(Bytes), "stored", nullptr}, multiply_stored, out.data(), fenced);
    };
    go(true);
    for (const float sum : out) expect(sum == 16, "sum");
    expect_error([&] { go(false); }, {"stored, block (0, 0, 0)", "without a fence_async since they were written"});
  });
}

}  // namespace
}  // namespace bitfold::cuda::test
