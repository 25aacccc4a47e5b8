// Warps: shuffles, votes, and lanes that don't come.
#include <bit>

#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- values ----

struct Shuffled {
  float from, xored, down, up;
};
__global__ void shuffle_all(Shuffled* out) {
  const auto value = static_cast<float>(threadIdx.x);
  const int lane = ptx::lane_id();
  out[threadIdx.x] = {ptx::shuffle(value, (lane * 7 + 3) % 32), ptx::shuffle_xor(value, 5), ptx::shuffle_down(value, 4),
                      ptx::shuffle_up(value, 9)};
}

CASE(shuffles_take_the_values_of_the_lanes_they_name) {
  under_schedules(4, [] {
    std::vector<Shuffled> out(64);
    launch({dim3(1), dim3(64), 0, "shuffle_all", nullptr}, shuffle_all, out.data());
    for (int i = 0; i < 64; ++i) {
      const int lane = i % 32, first = i - lane;
      const Shuffled& s = out[static_cast<size_t>(i)];
      const auto is = [&](float value, int from) { return value == static_cast<float>(first + from); };
      expect(is(s.from, (lane * 7 + 3) % 32) && is(s.xored, lane ^ 5), "shuffle " + std::to_string(i));
      expect(is(s.down, lane + 4 < 32 ? lane + 4 : lane) && is(s.up, lane >= 9 ? lane - 9 : lane),
             "down, up " + std::to_string(i));
    }
  });
}

__global__ void shuffle_bits(uint32_t* out) {
  out[threadIdx.x] =
      ptx::shuffle(threadIdx.x == 3 ? 0x7fa00001u : 0u, 3) + static_cast<uint32_t>(ptx::shuffle(-1, 0) + 1);
}

CASE(shuffles_keep_every_bit) {
  std::vector<uint32_t> out(32);
  launch({dim3(1), dim3(32), 0, "shuffle_bits", nullptr}, shuffle_bits, out.data());
  for (const uint32_t bits : out) expect(bits == 0x7fa00001u, "bits");
}

struct Votes {
  uint32_t ballot;
  bool any, all;
};
__global__ void vote_all(Votes* out, uint32_t yes) {
  const bool mine = yes >> ptx::lane_id() & 1u;
  out[threadIdx.x] = {ptx::ballot(mine), ptx::any(mine), ptx::all(mine)};
}

CASE(votes_count_all_lanes_that_are_there) {
  for (const uint32_t yes : {0u, 1u, 0x80000000u, 0x12345678u, 0x7fffffffu, 0xffffffffu}) {
    std::vector<Votes> out(48);  // the second warp has 16 lanes
    launch({dim3(1), dim3(48), 0, "vote_all", nullptr}, vote_all, out.data(), yes);
    for (size_t i = 0; i < 48; ++i) {
      const uint32_t lanes = i < 32 ? 0xffffffffu : 0xffffu;
      const bool right = out[i].ballot == (yes & lanes) && out[i].any == ((yes & lanes) != 0) &&
                         out[i].all == ((yes & lanes) == lanes);
      expect(right, "votes of " + std::to_string(i));
    }
  }
}

// ---- lanes apart ----

constexpr int kApart = __LINE__ + 3;  // the line of the first; the second is 2 below
__global__ void lanes_apart(bool other) {
  if (threadIdx.x < 7) {
    ptx::shuffle(1, 0);
  } else {
    other ? static_cast<void>(ptx::any(true)) : static_cast<void>(ptx::shuffle(1, 0));
  }
}

CASE(lanes_of_a_warp_at_two_instructions_are_an_error_that_names_both) {
  under_schedules(6, [] {
    for (const bool other : {false, true}) {
      expect_error([=] { launch({dim3(1), dim3(32), 0, "lanes_apart", nullptr}, lanes_apart, other); },
                   {"shuffle at", other ? "any" : "shuffle", at(kApart), at(kApart + 2)});
    }
  });
}

constexpr int kMissing = __LINE__ + 4;
__global__ void lane_is_missing() {
  if (threadIdx.x == 5) {
    ptx::sync_block();
    ptx::ballot(true);
  } else {
    ptx::shuffle_xor(1, 1);
  }
}

CASE(a_lane_that_waits_elsewhere_is_a_deadlock) {
  under_schedules(4, [] {
    expect_error([] { launch({dim3(1), dim3(32), 0, "lane_is_missing", nullptr}, lane_is_missing); },
                 {"deadlock", "1 threads wait in sync_block at emulator_warps.cpp" + at(kMissing - 1),
                  "31 threads wait in shuffle at emulator_warps.cpp" + at(kMissing + 2)});
  });
}

__global__ void shuffle_without(int missing, int from, int* out) {
  if (ptx::lane_id() == missing) return;
  out[threadIdx.x] = ptx::shuffle(static_cast<int>(threadIdx.x), from);
}

CASE(a_value_of_a_lane_that_returned_is_an_error_and_others_are_not) {
  under_schedules(12, [] {  // also where the lane returns last, and completes what the others wait in
    std::vector<int> out(32, -1);
    launch({dim3(1), dim3(32), 0, "shuffle_without", nullptr}, shuffle_without, 9, 3, out.data());
    for (int i = 0; i < 32; ++i) expect(out[static_cast<size_t>(i)] == (i == 9 ? -1 : 3), "shuffle");
    expect_error([&] { launch({dim3(1), dim3(32), 0, "shuffle_without", nullptr}, shuffle_without, 9, 9, out.data()); },
                 {"shuffles from lane 9, which has returned"});
    expect_error(
        [&] { launch({dim3(1), dim3(20), 0, "shuffle_without", nullptr}, shuffle_without, -1, 25, out.data()); },
        {"shuffles from lane 25"});
  });
}

__global__ void multiply_without(int missing) {
  if (ptx::lane_id() == missing) return;
  float d[4];
  const uint32_t a[4] = {}, b[2] = {};
  ptx::mma_f16_zero(d, a, b);
}

CASE(mma_needs_every_lane) {
  under_schedules(12, [] {
    launch({dim3(1), dim3(64), 0, "multiply_without", nullptr}, multiply_without, -1);
    expect_error([] { launch({dim3(1), dim3(32), 0, "multiply_without", nullptr}, multiply_without, 30); },
                 {"mma_f16 needs all 32 lanes"});
    expect_error([] { launch({dim3(1), dim3(48), 0, "multiply_without", nullptr}, multiply_without, -1); },
                 {"mma_f16 needs all 32 lanes"});
  });
}

}  // namespace
}  // namespace bitfold::cuda::test
