// Products of warpgroups: a small pipelined kernel against float64, and with one mistake at a time.
#include <cmath>
#include <random>

#include "emulator_tests.hpp"
#include "wgmma_kernel.hpp"

namespace bitfold::cuda::test {
namespace {

template <int N, Mistake M = Mistake::None>
double run(bool accumulate, Way way, const std::function<float()>& draw) {
  Data<N> data(accumulate, draw);
  launch({dim3(1), dim3(256), sizeof(Room<N>), "multiply", nullptr}, multiply<N, M>,
         Job{data.a.data(), data.start(), data.d.data(), accumulate, way});
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
      for (const Way way : kWays) {
        expect(run<64>(accumulate, way, integers) == 0, "integers, 64");
        expect(run<128>(accumulate, way, integers) == 0, "integers, 128");
        expect(run<64>(accumulate, way, floats) < 2.0 * kSteps * 19 / (1 << 24), "floats, 64");
        expect(run<128>(accumulate, way, floats) < 2.0 * kSteps * 19 / (1 << 24), "floats, 128");
      }
    }
  });
}

CASE(wgmma_cuts_off_beside_small_halves_as_if_they_were_normal) {
  const double distance = run<64>(false, Way::Bulk, small_halves_of_a(64));
  expect(distance > 2e-6 && distance < 1e-4, "a distance of " + std::to_string(distance * 1e6) + " millionths");
}

// ---- mistakes ----

// What a mistake ends in, in each of the first six schedules: "" where the numbers are right, "wrong", or an error.
template <Mistake M>
std::vector<std::string> ends(Way way) {
  std::mt19937 random(2);
  std::vector<std::string> found;
  under_schedules(6, [&] {
    try {
      found.push_back(run<64, M>(false, way, [&] { return static_cast<float>(random() % 7); }) == 0 ? "" : "wrong");
    } catch (const std::runtime_error& error) {
      found.emplace_back(error.what());
    }
  });
  return found;
}

// At least so many of six ends have this in their text; in the others the numbers tell, or nothing.
template <Mistake M>
void expect_ends(const std::string& part, int least, Way way, emulator::Where where = emulator::Where::current()) {
  int count = 0;
  for (const std::string& end : ends<M>(way)) {
    count += end.find(part) != std::string::npos;
    expect(end.empty() || end == "wrong" || end.find(part) != std::string::npos, "another end: " + end, where);
  }
  expect(count >= least, "in " + std::to_string(count) + " schedules", where);
}
// At least so many of six ends are wrong or an error.
template <Mistake M>
void expect_found(int least, emulator::Where where = emulator::Where::current()) {
  int count = 0;
  for (const std::string& end : ends<M>(Way::Bulk)) count += !end.empty();
  expect(count >= least, "in " + std::to_string(count) + " schedules", where);
}

CASE(sums_that_were_not_waited_for_are_wrong) { expect_ends<Mistake::NoWait>("wrong", 2, Way::Bulk); }
CASE(a_product_of_no_group_is_found) {
  expect_ends<Mistake::NoCommit>("returns before the end of wgmma", 2, Way::Bulk);
}
CASE(a_slot_given_back_too_early_is_found) { expect_found<Mistake::WeakWait>(2); }
CASE(a_missing_wgmma_fence_is_found) {
  expect_ends<Mistake::NoFirstFence>("wgmma before the first wgmma_fence at wgmma_kernel.hpp", 6, Way::Bulk);
  expect_ends<Mistake::NoFence>("A's registers of wgmma were written after the last wgmma_fence", 6, Way::Bulk);
}
CASE(a_missing_wait_for_b_is_found) { expect_found<Mistake::NoFull>(2); }
CASE(b_that_is_overwritten_is_found) { expect_found<Mistake::NoRelease>(2); }
CASE(a_missing_fence_between_proxies_is_found) {
  expect_ends<Mistake::NoProxyFence>("without a fence_async since they were written, wgmma uses bytes", 6, Way::Copies);
  expect_ends<Mistake::NoProxyFence>("without a fence_async since they were written, wgmma uses bytes", 6,
                                     Way::Arrivals);
  expect_ends<Mistake::EarlyProxyFence>("without a fence_async since they were written, wgmma uses bytes", 2,
                                        Way::Copies);
}
CASE(offsets_in_the_wrong_order_are_found) { expect_found<Mistake::SwappedOffsets>(6); }
CASE(a_warpgroup_comes_to_the_same_instructions) {
  expect_ends<Mistake::OneWarpLess>("of the warpgroup", 6, Way::Bulk);
  expect_ends<Mistake::WarpsDiffer>("the warps of the warpgroup give wgmma different arguments", 6, Way::Bulk);
  expect_ends<Mistake::LanesDiffer>("the lanes of the warp give wgmma different arguments", 6, Way::Bulk);
}
CASE(registers_in_flight_are_left_alone) {
  expect_ends<Mistake::TouchedA>("A's registers were written before the end of wgmma", 2, Way::Bulk);
  expect_ends<Mistake::TouchedSums>("sums were written", 2, Way::Bulk);
}
CASE(a_return_before_the_end_of_wgmma_is_found) {
  expect_ends<Mistake::Returns>("returns before the end of wgmma was waited for", 2, Way::Bulk);
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
  expect_error([&] { run_at(128, 0, 1024, 128, uint64_t{1} << 63); }, {"bits that mean other swizzles"});
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
