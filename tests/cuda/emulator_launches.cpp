// Launches that wait for the next one, and kernels that begin before the one ahead of them has ended.
#include <algorithm>
#include <numeric>

#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

// body once for each of the first schedules and for some numbers of blocks that begin early.
void under_early_schedules(const std::function<void()>& body) {
  for (int i = 0; i < 4; ++i) {
    for (const int ahead : {1, 2, 7}) {
      emulator::config() = emulator::schedule(i);
      emulator::config().ahead = ahead;
      body();
      emulator::synchronize();
    }
  }
  emulator::config() = {};
}

Launch launch_of(unsigned blocks, const char* name, bool early = false) {
  return {
      .grid = blocks, .block = 64, .shared_bytes = 64 * sizeof(int), .name = name, .stream = nullptr, .early = early};
}

// ---- when a launch happens ----

__global__ void write(int* to, int value) {
  if (threadIdx.x == 0) to[blockIdx.x] = value;
}

CASE(a_launch_has_happened_when_it_returns) {
  int seen[2] = {};
  launch(launch_of(2, "write"), write, &seen[0], 5);
  expect(seen[0] == 5 && seen[1] == 5, "not written");
}

CASE(a_launch_waits_for_the_next_or_for_the_host_where_a_test_wants_it) {
  under_early_schedules([] {
    int seen[2] = {}, copy[2] = {};
    launch(launch_of(2, "write"), write, &seen[0], 5);
    expect(seen[0] == 0 && seen[1] == 0, "written at once");
    launch(launch_of(2, "write"), write, &copy[0], 6);
    expect(seen[0] == 5 && seen[1] == 5 && copy[0] == 0, "the next launch");
    emulator::synchronize();
    expect(copy[1] == 6, "synchronize");
    launch(launch_of(2, "write"), write, &seen[0], 7);
    read_back(copy, seen, sizeof(copy), nullptr);
    expect(copy[0] == 7 && copy[1] == 7, "read_back");
    launch(launch_of(2, "write"), write, &seen[0], 8);
    clear(seen, sizeof(seen), nullptr);
    emulator::synchronize();
    expect(seen[0] == 0 && seen[1] == 0, "clear is behind the launch");
  });
}

// ---- what a kernel sees before its wait, and after ----

// out[block]: what `in` was before the wait, and after, a hundredfold. Shared memory and barriers live through it.
__global__ void look(const int* in, int* out) {
  auto& s = shared<int[64]>();
  s[threadIdx.x] = in[0];
  if (threadIdx.x < 32) ptx::wait_for_earlier();
  ptx::sync_block();  // half of the threads come here first, and wait for those that wait
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  if (threadIdx.x == 0) out[blockIdx.x] = s[(blockIdx.x * 7 + 1) % 64] + 100 * in[0];
}

CASE(some_blocks_of_an_early_kernel_see_what_was_there_before_the_last) {
  under_early_schedules([] {
    int in = 1, out[5] = {};
    launch(launch_of(1, "write"), write, &in, 2);
    launch(launch_of(5, "look", true), look, static_cast<const int*>(&in), &out[0]);
    emulator::synchronize();
    const auto early = std::count(std::begin(out), std::end(out), 201),
               late = std::count(std::begin(out), std::end(out), 202);
    expect(early == std::min(emulator::config().ahead, 5) && early + late == 5, "before");
  });
}

CASE(a_kernel_that_is_not_early_sees_all_of_the_last) {
  under_early_schedules([] {
    int in = 1, out[5] = {};
    launch(launch_of(1, "write"), write, &in, 2);
    launch(launch_of(5, "look"), look, static_cast<const int*>(&in), &out[0]);
    emulator::synchronize();
    expect(std::all_of(std::begin(out), std::end(out), [](int seen) { return seen == 202; }), "before");
  });
}

// The last but one has ended before anything of a kernel begins: nobody lets others begin before his own wait.
CASE(an_early_kernel_meets_the_last_alone) {
  under_early_schedules([] {
    int in = 1, between[5] = {}, out[5] = {};
    launch(launch_of(1, "write"), write, &in, 2);
    launch(launch_of(5, "first", true), look, static_cast<const int*>(&in), &between[0]);
    launch(launch_of(5, "second", true), look, static_cast<const int*>(&in), &out[0]);
    expect(between[0] != 0 && out[0] == 0, "the second waits");
    emulator::synchronize();
    expect(std::all_of(std::begin(out), std::end(out), [](int seen) { return seen == 202; }), "the second");
    launch(launch_of(5, "third", true), look, static_cast<const int*>(&between[0]), &out[0]);
    emulator::synchronize();
    expect(std::all_of(std::begin(out), std::end(out), [&](int seen) { return seen == 101 * between[0]; }), "third");
  });
}

// What is written before the wait, the kernel ahead may still read, or write over.
__global__ void write_early(int* to) {
  if (threadIdx.x == 0) to[blockIdx.x] = 9;
  ptx::wait_for_earlier();
}
__global__ void copy(const int* in, int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = in[blockIdx.x];
}

CASE(a_kernel_that_writes_before_its_wait_disturbs_the_last) {
  under_early_schedules([] {
    int in[3] = {1, 1, 1}, out[3] = {};
    launch(launch_of(3, "copy"), copy, static_cast<const int*>(&in[0]), &out[0]);
    launch(launch_of(3, "write_early", true), write_early, &in[0]);
    emulator::synchronize();
    expect(std::count(std::begin(out), std::end(out), 9) == std::min(emulator::config().ahead, 3), "not disturbed");
  });
}

__global__ void count_blocks(int* seen) {
  ptx::wait_for_earlier();
  if (threadIdx.x == 0) seen[blockIdx.x] += 1;
}

CASE(every_block_of_an_early_kernel_runs_once) {
  under_early_schedules([] {
    std::vector<int> seen(9);
    for (int i = 0; i < 3; ++i) launch(launch_of(9, "count", true), count_blocks, seen.data());
    emulator::synchronize();
    expect(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 3; }), "not once");
  });
}

// ---- mistakes ----

__global__ void wait_in_one_warp() {
  if (threadIdx.x < 32) ptx::wait_for_earlier();
}

CASE(a_thread_that_returns_without_its_wait_is_an_error) {
  const auto run = [](bool early) { launch(launch_of(2, "careless", early), wait_in_one_warp); };
  under_schedules(3, [&] {
    run(false);
    expect_error([&] { run(true); }, {"careless, block (", "thread ", "returns without a wait_for_earlier"});
  });
  under_early_schedules([&] {
    expect_error(
        [&] {
          run(true);
          emulator::synchronize();
        },
        {"careless, block (", "returns without a wait_for_earlier"});
  });
}

constexpr int kHasty = __LINE__ + 2;
__global__ void let_others_begin_first() {
  ptx::let_later_begin();
  ptx::wait_for_earlier();
}

CASE(who_lets_others_begin_has_waited_itself) {
  under_schedules(3, [] {
    launch(launch_of(1, "hasty"), let_others_begin_first);
    expect_error([] { launch(launch_of(1, "hasty", true), let_others_begin_first); },
                 {"hasty, block (0, 0, 0), thread ", "let_later_begin before wait_for_earlier", at(kHasty)});
  });
}

__global__ void never_meet() {
  ptx::wait_for_earlier();
  if (threadIdx.x == 0) ptx::bar_sync(1, 64);
}

CASE(a_deadlock_behind_the_wait_is_one) {
  under_early_schedules([] {
    expect_error(
        [] {
          int seen = 0;
          launch(launch_of(1, "write"), write, &seen, 1);
          launch(launch_of(1, "never", true), never_meet);
          emulator::synchronize();
        },
        {"never, block (0, 0, 0): deadlock: 1 threads wait in bar_sync", "63 have returned"});
  });
}

__global__ void fall() { ptx::trap(); }

CASE(an_error_comes_with_the_launch_that_runs_the_kernel_and_leaves_nothing_behind) {
  under_early_schedules([] {
    int seen = 0;
    launch(launch_of(1, "fall"), fall);
    expect_error([&] { launch(launch_of(1, "write", true), count_blocks, &seen); }, {"fall, block (0, 0, 0)", "trap"});
    emulator::synchronize();
    expect(seen == 0, "the other was launched");
    launch(launch_of(1, "write"), write, &seen, 1);
    emulator::synchronize();
    expect(seen == 1, "the next one");
  });
}

}  // namespace
}  // namespace bitfold::cuda::test
