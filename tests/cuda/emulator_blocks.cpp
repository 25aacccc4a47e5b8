// Blocks: where a thread is, barriers, returns, deadlocks, shared memory, what a launch refuses.
#include <algorithm>
#include <numeric>

#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- places ----

__global__ void write_places(unsigned* seen) {
  const unsigned linear = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  seen[linear * blockDim.x + threadIdx.x] += 1000 * linear + threadIdx.x +
                                             100000 * static_cast<unsigned>(ptx::warp_id()) +
                                             static_cast<unsigned>(ptx::lane_id());
}

CASE(every_thread_of_the_grid_runs_once_at_its_place) {
  under_schedules(4, [] {
    std::vector<unsigned> seen(3 * 2 * 4 * 70);
    launch({dim3(3, 2, 4), dim3(70), 0, "write_places", nullptr}, write_places, seen.data());
    for (unsigned i = 0; i < seen.size(); ++i) {
      const unsigned thread = i % 70;
      expect(seen[i] == 1000 * (i / 70) + thread + 100000 * (thread / 32) + thread % 32, "place " + std::to_string(i));
    }
  });
}

__global__ void order_of_blocks(int* next, int* order) { order[(*next)++] = static_cast<int>(blockIdx.x); }

CASE(a_seed_gives_an_order_of_its_own_and_always_the_same) {
  const auto run = [](emulator::Config config) {
    emulator::config() = config;
    std::vector<int> order(64);
    int next = 0;
    launch({dim3(64), dim3(1), 0, "order_of_blocks", nullptr}, order_of_blocks, &next, order.data());
    emulator::config() = {};
    return order;
  };
  std::vector<int> in_order(64);
  std::iota(in_order.begin(), in_order.end(), 0);
  const std::vector<int> first = run({.seed = 1, .order = emulator::Order::Priority});
  expect(run({}) == in_order, "sequential");
  expect(first != in_order && first != run({.seed = 2, .order = emulator::Order::Priority}), "not random");
  expect(first == run({.seed = 1, .order = emulator::Order::Priority}), "not deterministic");
  expect(std::is_permutation(first.begin(), first.end(), in_order.begin()), "not all blocks");
}

// ---- sync_block ----

constexpr int kTwoBarriers = __LINE__ + 3;  // the line of the first; the second is 2 below
__global__ void two_barriers() {
  if (threadIdx.x % 2 == 0) {
    ptx::sync_block();
  } else {
    ptx::sync_block();
  }
}

CASE(barriers_at_two_lines_are_an_error_that_names_both) {
  under_schedules(4, [] {
    expect_error([] { launch({dim3(1), dim3(64), 0, "two_barriers", nullptr}, two_barriers); },
                 {"two_barriers, block (0, 0, 0), thread ", at(kTwoBarriers), at(kTwoBarriers + 2)});
  });
}

struct Numbers {
  int values[1024];
};

__global__ void rotate(int* out, int rounds) {
  Numbers& s = shared<Numbers>();
  const auto threads = blockDim.x;
  s.values[threadIdx.x] = static_cast<int>(threadIdx.x);
  for (int i = 0; i < rounds; ++i) {
    ptx::sync_block();
    const int next = s.values[(threadIdx.x + 1) % threads];
    ptx::sync_block();
    s.values[threadIdx.x] = next;
  }
  out[threadIdx.x] = s.values[threadIdx.x];
}

CASE(barriers_hold_for_blocks_of_any_size) {
  for (const unsigned threads : {1u, 31u, 32u, 33u, 256u, 1000u, 1024u}) {
    under_schedules(4, [=] {
      std::vector<int> out(threads);
      launch({dim3(1), dim3(threads), sizeof(Numbers), "rotate", nullptr}, rotate, out.data(), 5);
      for (unsigned i = 0; i < threads; ++i) expect(out[i] == static_cast<int>((i + 5) % threads), "rotate");
    });
  }
}

__global__ void return_early(int* out) {
  Numbers& s = shared<Numbers>();
  if (threadIdx.x % 3 == 0) return;
  s.values[threadIdx.x] = 1;
  ptx::sync_block();
  if (threadIdx.x % 3 == 1) return;
  ptx::sync_block();
  out[threadIdx.x] = s.values[threadIdx.x - 1];
}

CASE(threads_that_returned_are_not_waited_for) {
  under_schedules(6, [] {
    std::vector<int> out(96);
    launch({dim3(2), dim3(96), sizeof(Numbers), "return_early", nullptr}, return_early, out.data());
    for (int i = 0; i < 96; ++i) expect(out[static_cast<size_t>(i)] == (i % 3 == 2), "return_early");
  });
}

constexpr int kForever = __LINE__ + 3;  // the line of sync_warp; sync_block is 2 below
__global__ void wait_forever() {
  if (threadIdx.x < 10) {
    ptx::sync_warp();
  } else if (threadIdx.x < 40) {
    ptx::sync_block();
  }
}

CASE(a_deadlock_is_reported_with_who_waits_where) {
  under_schedules(4, [] {
    expect_error([] { launch({dim3(1), dim3(64), 0, "wait_forever", nullptr}, wait_forever); },
                 {"wait_forever, block (0, 0, 0): deadlock: ",
                  "10 threads wait in sync_warp at emulator_blocks.cpp" + at(kForever),
                  "30 threads wait in sync_block at emulator_blocks.cpp" + at(kForever + 2), "; 24 have returned"});
  });
}

// ---- named barriers ----

struct Channel {
  int value[32];
};
// Warp 0 makes numbers and warp 1 adds them up; barrier 1 means full, barrier 2 empty.
__global__ void produce_and_consume(int* out, int rounds, bool balanced) {
  Channel& s = shared<Channel>();
  const int lane = ptx::lane_id();
  if (ptx::warp_id() == 0) {
    for (int i = 0; i < rounds; ++i) {
      if (i > 0) ptx::bar_sync(2, 64);
      s.value[lane] = i + lane;
      ptx::bar_arrive(1, 64);
    }
  } else {
    int sum = 0;
    for (int i = 0; i < rounds; ++i) {
      ptx::bar_sync(1, 64);
      sum += s.value[31 - lane];
      if (i + 1 < rounds) ptx::bar_arrive(2, 64);
    }
    if (!balanced) ptx::bar_sync(2, 64);  // nobody fills it again
    out[lane] = sum;
  }
}

CASE(named_barriers_carry_a_producer_and_a_consumer) {
  under_schedules(12, [] {
    std::vector<int> out(32);
    launch({dim3(1), dim3(64), sizeof(Channel), "channel", nullptr}, produce_and_consume, out.data(), 10, true);
    for (int lane = 0; lane < 32; ++lane) expect(out[static_cast<size_t>(lane)] == 45 + 10 * (31 - lane), "sum");
    expect_error(
        [&] {
          launch({dim3(1), dim3(64), sizeof(Channel), "channel", nullptr}, produce_and_consume, out.data(), 3, false);
        },
        {"deadlock: 32 threads wait in bar_sync at emulator_blocks.cpp", "32 have returned"});
  });
}

__global__ void use_barrier(int number, int first, int second) {
  ptx::bar_sync(number, threadIdx.x < 32 ? first : second);
}

CASE(named_barriers_refuse_what_the_hardware_does_not_define) {
  const auto use = [](int number, int first, int second) {
    launch({dim3(1), dim3(64), 0, "use_barrier", nullptr}, use_barrier, number, first, second);
  };
  use(15, 64, 64);
  expect_error([&] { use(0, 64, 64); }, {"barriers are 1 to 15, got 0"});
  expect_error([&] { use(16, 64, 64); }, {"barriers are 1 to 15, got 16"});
  expect_error([&] { use(1, 40, 40); }, {"whole warps, got 40 threads"});
  expect_error([&] { use(1, 64, 96); }, {"barrier 1 is for 64 threads", "and for 96"});
  expect_error([&] { use(1, 128, 128); }, {"deadlock: 64 threads wait in bar_sync"});
}

// ---- shared memory ----

__global__ void read_uninitialised(int* out) { out[blockIdx.x] = shared<Numbers>().values[7]++; }

CASE(shared_memory_starts_as_poison_in_every_block) {
  int out[2];
  for (const int poison : {0xff, 0x00, 0x5a}) {
    emulator::config().poison = static_cast<uint8_t>(poison);
    launch({dim3(2), dim3(1), sizeof(Numbers), "read_uninitialised", nullptr}, read_uninitialised, &out[0]);
    const int expected = static_cast<int>(0x01010101u * static_cast<unsigned>(poison));
    expect(out[0] == expected && out[1] == expected, "poison " + std::to_string(poison));
  }
  emulator::config() = {};
}

CASE(shared_memory_is_as_large_as_the_launch_said) {
  int out;
  expect_error([&] { launch({dim3(1), dim3(1), 4000, "small", nullptr}, read_uninitialised, &out); },
               {"small, block (0, 0, 0), thread 0: shared() of 4096 bytes, launched with 4000"});
}

// ---- launches ----

__global__ void nothing() {}
struct Large {
  char bytes[4097];
};
__global__ void take(Large) {}

CASE(a_launch_refuses_what_cuda_would) {
  const auto refused = [](dim3 grid, dim3 block, int64_t bytes, const std::string& why) {
    expect_error([&] { launch({grid, block, bytes, "nothing", nullptr}, nothing); }, {"nothing: ", why});
  };
  launch({dim3(1, 65535, 1), dim3(1), 0, "nothing", nullptr}, nothing);
  launch({dim3(1), dim3(1024), emulator::kSharedBytes, "nothing", nullptr}, nothing);
  refused(dim3(0), dim3(1), 0, "at least one block");
  refused(dim3(1, 65536), dim3(1), 0, "at most (2^31 - 1, 65535, 65535), got (1, 65536, 1)");
  refused(dim3(1), dim3(1025), 0, "1 to 1024 threads of one dimension, got (1025, 1, 1)");
  refused(dim3(1), dim3(0), 0, "1 to 1024");
  refused(dim3(1), dim3(8, 8), 0, "one dimension");
  refused(dim3(1), dim3(1), emulator::kSharedBytes + 1, "at most 232448 bytes of shared memory, asked for 232449");
  expect_error([] { launch({dim3(1), dim3(1), 0, "take", nullptr}, take, Large{}); },
               {"4096 bytes of parameters, got 4097"});
}

constexpr int kTrap = __LINE__ + 2;
__global__ void fall_into_trap(int* out) {
  if (threadIdx.x == 33) ptx::trap();
  ptx::sync_block();
  *out = 1;
}

CASE(a_trap_ends_the_launch_and_the_next_one_starts_afresh) {
  int out = 0;
  under_schedules(4, [&] {
    expect_error([&] { launch({dim3(1), dim3(64), 0, "trapped", nullptr}, fall_into_trap, &out); },
                 {"trapped, block (0, 0, 0), thread 33: trap at emulator_blocks.cpp" + at(kTrap)});
    expect(out == 0, "went on");
    std::vector<int> rotated(64);
    launch({dim3(1), dim3(64), sizeof(Numbers), "rotate", nullptr}, rotate, rotated.data(), 3);
    expect(rotated[0] == 3, "rotate");
  });
}

}  // namespace
}  // namespace bitfold::cuda::test
