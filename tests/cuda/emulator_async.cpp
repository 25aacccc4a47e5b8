// Barriers in shared memory, copies that arrive at them by themselves, and what the async proxy sees.
#include <numeric>

#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

constexpr int kSlots = 3, kBytes = 512, kWords = kBytes / 4;
struct Pipe {
  alignas(128) uint32_t words[kSlots][kWords];
  ptx::Barrier full[kSlots], empty[kSlots];
};

BITFOLD_DEVICE void open_pipe(Pipe& pipe, unsigned producers, unsigned consumers) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      ptx::barrier_init(&pipe.full[i], producers);
      ptx::barrier_init(&pipe.empty[i], consumers);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
}

// ---- phases ----

// Warp 0 fills slots, warps 1 and 2 add them up.
__global__ void pass_through_barriers(int* out, int rounds) {
  Pipe& pipe = shared<Pipe>();
  open_pipe(pipe, 32, 64);
  const auto lane = static_cast<unsigned>(ptx::lane_id());
  unsigned sum = 0;
  for (int i = 0; i < rounds; ++i) {
    const int slot = i % kSlots;
    const unsigned parity = static_cast<unsigned>(i / kSlots & 1);
    if (ptx::warp_id() == 0) {
      ptx::barrier_wait(&pipe.empty[slot], parity ^ 1u);  // the first time at once
      pipe.words[slot][lane] = static_cast<unsigned>(i) * 100 + lane;
      ptx::barrier_arrive(&pipe.full[slot]);
    } else {
      ptx::barrier_wait(&pipe.full[slot], parity);
      sum += pipe.words[slot][31 - lane];
      ptx::barrier_arrive(&pipe.empty[slot]);
    }
  }
  if (ptx::warp_id() > 0) out[threadIdx.x - 32] = static_cast<int>(sum);
}

CASE(phases_carry_a_producer_and_consumers) {
  under_schedules(12, [] {
    std::vector<int> out(64);
    launch({dim3(1), dim3(96), sizeof(Pipe), "pass", nullptr}, pass_through_barriers, out.data(), 20);
    for (int i = 0; i < 64; ++i) expect(out[static_cast<size_t>(i)] == 19000 + 20 * (31 - i % 32), "sum");
  });
}

constexpr int kNobody = __LINE__ + 3;
__global__ void wait_for_nobody(unsigned arrivals) {
  if (threadIdx.x == 0) ptx::barrier_init(&shared<Pipe>().full[1], arrivals);
  ptx::sync_block();
  ptx::barrier_expect(&shared<Pipe>().full[1], 16), ptx::barrier_wait(&shared<Pipe>().full[1], 0);
}

CASE(a_phase_that_never_ends_is_a_deadlock_that_says_what_is_missing) {
  under_schedules(4, [] {
    expect_error(
        [] { launch({dim3(1), dim3(32), sizeof(Pipe), "nobody", nullptr}, wait_for_nobody, 33u); },
        {"nobody, block (0, 0, 0): deadlock: 32 threads wait in barrier_wait at emulator_async.cpp" + at(kNobody + 1),
         "lacks 1 arrivals and 512 bytes"});
  });
}

enum class Misuse {
  None,
  NoInit,
  TwoInits,
  TooManyArrivals,
  Overwritten,
  Misaligned,
  Outside,
  NoFence,
  Parity,
  NoArrivals
};

__global__ void misuse(Misuse how, const uint8_t* in) {
  Pipe& pipe = shared<Pipe>();
  auto* barrier = &pipe.full[0];
  if (how != Misuse::NoInit) ptx::barrier_init(barrier, how == Misuse::NoArrivals ? 0 : 1);
  if (how != Misuse::NoFence) ptx::fence_barrier_init();
  if (how == Misuse::TwoInits) ptx::barrier_init(barrier, 1);
  if (how == Misuse::Overwritten) barrier->bits = 1;
  if (how == Misuse::Misaligned) barrier = reinterpret_cast<ptx::Barrier*>(reinterpret_cast<uint8_t*>(barrier) + 4);
  if (how == Misuse::Outside) barrier = reinterpret_cast<ptx::Barrier*>(&pipe + 1);
  ptx::barrier_expect(barrier, 16);
  if (how == Misuse::TooManyArrivals) ptx::barrier_arrive(barrier);
  ptx::copy_bulk(pipe.words, in, 16, barrier);
  ptx::barrier_wait(barrier, how == Misuse::Parity ? 2 : 0);
}

CASE(barriers_refuse_what_the_hardware_does_not_define) {
  alignas(16) const uint8_t in[16] = {};
  const auto run = [&](Misuse how) {
    launch({dim3(1), dim3(1), sizeof(Pipe), "misuse", nullptr}, misuse, how, &in[0]);
  };
  under_schedules(3, [&] {
    run(Misuse::None);
    expect_error([&] { run(Misuse::NoInit); }, {"misuse, block", "barrier_expect before the barrier_init", "1536"});
    expect_error([&] { run(Misuse::TwoInits); }, {"a second barrier_init"});
    expect_error([&] { run(Misuse::TooManyArrivals); }, {"barrier_arrive: more arrivals than the 1 of a phase"});
    expect_error([&] { run(Misuse::Overwritten); }, {"was overwritten"});
    expect_error([&] { run(Misuse::Misaligned); }, {"an address of 8 bytes is aligned to 4"});
    expect_error([&] { run(Misuse::Outside); }, {"barrier_expect at byte", "of shared memory"});
    expect_error([&] { run(Misuse::NoFence); }, {"without a fence_barrier_init"});
    expect_error([&] { run(Misuse::Parity); }, {"a parity is 0 or 1, got 2"});
    expect_error([&] { run(Misuse::NoArrivals); }, {"1 to 2^20 - 1 arrivals, got 0"});
  });
}

// ---- bulk copies ----

enum class Slip { None, NoWait, WrongParity, NoRelease, FewBytes, NoExpect, Left };

// Thread 32 copies; warp 0 adds up.
template <Slip S>
__global__ void copy_in_bulk(const uint32_t* in, uint32_t* out, int rounds) {
  Pipe& pipe = shared<Pipe>();
  open_pipe(pipe, 1, 32);
  if (ptx::warp_id() == 1) {
    if (ptx::lane_id() != 0) return;
    for (int i = 0; i < rounds; ++i) {
      const int slot = i % kSlots;
      if (S != Slip::NoRelease) ptx::barrier_wait(&pipe.empty[slot], static_cast<unsigned>(i / kSlots & 1) ^ 1u);
      if (S == Slip::NoExpect) {
        ptx::barrier_arrive(&pipe.full[slot]);
      } else {
        ptx::barrier_expect(&pipe.full[slot], kBytes + (S == Slip::FewBytes ? 16 : 0));
      }
      ptx::copy_bulk(pipe.words[slot], in + i * kWords, kBytes / 2, &pipe.full[slot]);
      ptx::copy_bulk(&pipe.words[slot][kWords / 2], in + i * kWords + kWords / 2, kBytes / 2, &pipe.full[slot]);
    }
    return;
  }
  uint32_t sum = 0;
  if (S != Slip::Left) {
    for (int i = 0; i < rounds; ++i) {
      const int slot = i % kSlots;
      if (S != Slip::NoWait) {
        ptx::barrier_wait(&pipe.full[slot], static_cast<unsigned>(i / kSlots & 1) ^ (S == Slip::WrongParity ? 1u : 0u));
      }
      for (int j = 0; j < kWords; j += 32) sum += pipe.words[slot][j + ptx::lane_id()];
      ptx::barrier_arrive(&pipe.empty[slot]);
    }
  }
  out[ptx::lane_id()] = sum;
}

// In how many of the first six schedules sums are wrong or the launch ends in an error.
template <Slip S>
int wrong_schedules(int rounds = 8) {
  std::vector<uint32_t> in(static_cast<size_t>(rounds * kWords + 3)), out(32);
  std::iota(in.begin(), in.end(), 1u);
  uint32_t* aligned = in.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) ++aligned;
  int wrong = 0;
  under_schedules(6, [&] {
    bool right = true;
    try {
      launch({dim3(1), dim3(64), sizeof(Pipe), "bulk", nullptr}, copy_in_bulk<S>, aligned, out.data(), rounds);
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t sum = 0;
        for (int i = lane; i < rounds * kWords; i += 32) sum += aligned[i];
        right &= out[static_cast<size_t>(lane)] == sum;
      }
    } catch (const std::runtime_error&) {
      right = false;
    }
    wrong += !right;
  });
  return wrong;
}

CASE(bulk_copies_are_right_in_every_schedule) { expect(wrong_schedules<Slip::None>() == 0, "wrong"); }
CASE(a_missing_wait_for_a_bulk_copy_is_found) { expect(wrong_schedules<Slip::NoWait>() >= 2, "not found"); }
CASE(a_wrong_parity_is_found) { expect(wrong_schedules<Slip::WrongParity>() >= 2, "not found"); }
CASE(a_bulk_copy_over_what_is_read_is_found) { expect(wrong_schedules<Slip::NoRelease>() >= 2, "not found"); }
CASE(bytes_that_never_come_are_found) { expect(wrong_schedules<Slip::FewBytes>() == 6, "not found"); }
CASE(bytes_that_nobody_expects_are_found) { expect(wrong_schedules<Slip::NoExpect>() >= 2, "not found"); }
CASE(a_bulk_copy_that_nobody_waits_for_is_found) { expect(wrong_schedules<Slip::Left>(3) >= 2, "not found"); }

__global__ void copy_bulk_wrongly(const uint8_t* in, int offset, unsigned bytes) {
  Pipe& pipe = shared<Pipe>();
  ptx::barrier_init(&pipe.full[0], 1);
  ptx::fence_barrier_init();
  ptx::barrier_expect(&pipe.full[0], bytes);
  ptx::copy_bulk(reinterpret_cast<uint8_t*>(&pipe) + offset, in, bytes, &pipe.full[0]);
  ptx::barrier_wait(&pipe.full[0], 0);
}

CASE(bulk_copies_check_their_addresses) {
  alignas(16) const uint8_t in[64] = {};
  const auto copy = [&](int source, int offset, unsigned bytes) {
    launch({dim3(1), dim3(1), sizeof(Pipe), "copy_bulk_wrongly", nullptr}, copy_bulk_wrongly, &in[source], offset,
           bytes);
  };
  under_schedules(3, [&] {
    copy(16, 32, 48);
    expect_error([&] { copy(8, 32, 16); }, {"an address of 16 bytes is aligned to 8"});
    expect_error([&] { copy(0, 40, 16); }, {"an address of 16 bytes is aligned to 8"});
    expect_error([&] { copy(0, 32, 24); }, {"copy_bulk is of a multiple of 16 bytes, got 24"});
    expect_error([&] { copy(0, 32, 0); }, {"copy_bulk is of a multiple of 16 bytes, got 0"});
    expect_error([&] { copy(0, sizeof(Pipe) - 16, 32); }, {"copy_bulk at byte", "of shared memory"});
  });
}

// ---- cp_async that arrives by itself ----

template <bool Early>
__global__ void arrive_with_copies(const uint32_t* in, uint32_t* out, int rounds) {
  Pipe& pipe = shared<Pipe>();
  open_pipe(pipe, 32, 32);
  const int lane = ptx::lane_id();
  uint32_t sum = 0;
  for (int i = 0; i < rounds; ++i) {
    const int slot = i % kSlots;
    const unsigned parity = static_cast<unsigned>(i / kSlots & 1);
    if (ptx::warp_id() == 1) {
      ptx::barrier_wait(&pipe.empty[slot], parity ^ 1u);
      if (Early) ptx::cp_async_arrive(&pipe.full[slot]);
      for (int j = 0; j < 4; ++j) ptx::cp_async<4>(&pipe.words[slot][32 * j + lane], in + i * kWords + 32 * j + lane);
      if (!Early) ptx::cp_async_arrive(&pipe.full[slot]);
    } else {
      ptx::barrier_wait(&pipe.full[slot], parity);
      for (int j = 0; j < 4; ++j) sum += pipe.words[slot][32 * j + 31 - lane];
      ptx::barrier_arrive(&pipe.empty[slot]);
    }
  }
  if (ptx::warp_id() == 0) out[31 - lane] = sum;
}

CASE(copies_arrive_at_a_barrier_by_themselves) {
  constexpr int kRounds = 7;
  std::vector<uint32_t> in(kRounds * kWords), out(32);
  std::iota(in.begin(), in.end(), 1u);
  const auto right = [&](auto kernel) {
    launch({dim3(1), dim3(64), sizeof(Pipe), "arrive", nullptr}, kernel, in.data(), out.data(), kRounds);
    for (size_t lane = 0; lane < 32; ++lane) {
      uint32_t sum = 0;
      for (size_t i = lane; i < in.size(); i += 32) sum += in[i];
      if (out[lane] != sum) return false;
    }
    return true;
  };
  int early = 0;
  under_schedules(6, [&] {
    expect(right(arrive_with_copies<false>), "wrong");
    early += !right(arrive_with_copies<true>);
  });
  expect(early >= 2, "an arrival before the copies isn't found");
}

}  // namespace
}  // namespace bitfold::cuda::test
