// Loads, stores, atomics, and copies that arrive late, early or either.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "emulator_tests.hpp"

namespace bitfold::cuda::test {
namespace {

// ---- loads and stores ----

__global__ void copy_all(const uint8_t* in, uint8_t* out) {
  ptx::store_streaming16(out, ptx::load16(in));
  ptx::store_streaming16(out + 16, ptx::load_streaming16(in + 16));
  ptx::store_streaming8(out + 32, ptx::load8(in + 32));
  ptx::store_streaming8(out + 40, ptx::load_streaming8(in + 40));
  ptx::store_streaming4(out + 48, ptx::load4(in + 48));
  ptx::store_streaming4(out + 52, ptx::load_streaming4(in + 52));
  out[56] = static_cast<uint8_t>(ptx::load2(in + 56) & 255);
  out[57] = static_cast<uint8_t>(ptx::load2(in + 56) >> 8);
  out[58] = ptx::load1(in + 58);
}

CASE(loads_and_stores_move_bytes) {
  alignas(16) uint8_t in[64], out[64] = {};
  std::iota(in, in + 64, uint8_t{1});
  launch({dim3(1), dim3(1), 0, "copy_all", nullptr}, copy_all, &in[0], &out[0]);
  expect(std::memcmp(in, out, 59) == 0, "bytes");
}

__global__ void load_at(const uint8_t* in, int bytes) {
  if (bytes == 2) ptx::load2(in);
  if (bytes == 4) ptx::load_streaming4(in);
  if (bytes == 8) ptx::load8(in);
  if (bytes == 16) ptx::load_streaming16(in);
}
__global__ void store_at(uint8_t* out) { ptx::store_streaming8(out, {}); }

CASE(addresses_are_aligned_to_what_is_moved) {
  alignas(16) uint8_t bytes[64] = {};
  for (const int size : {2, 4, 8, 16}) {
    expect_error([&] { launch({dim3(1), dim3(1), 0, "load_at", nullptr}, load_at, &bytes[size / 2], size); },
                 {"load_at, block (0, 0, 0), thread 0: an address of " + std::to_string(size) + " bytes"});
  }
  expect_error([&] { launch({dim3(1), dim3(1), 0, "store_at", nullptr}, store_at, &bytes[4]); }, {"of 8 bytes"});
}

__global__ void store_plainly(float4* out) {
  if (threadIdx.x == 1) *out = {1, 2, 3, 4};
  ptx::sync_block();
}

CASE(plain_accesses_are_aligned_too) {
  alignas(16) uint8_t bytes[64] = {};
  const auto store = [&](int at) {
    launch({dim3(1), dim3(2), 0, "store_plainly", nullptr}, store_plainly, reinterpret_cast<float4*>(&bytes[at]));
  };
  store(16);
  expect_error([&] { store(8); }, {"store_plainly, block (0, 0, 0), thread 1: an address of 16 bytes is aligned to 8",
                                   "emulator_memory.cpp:"});
  store(32);
}

// ---- atomics ----

struct Counters {
  int sum;
  uint32_t count, bits, largest, smallest;
  unsigned long long total, first;
};
__global__ void count_up(Counters* c) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::atomic_add(&c->sum, -static_cast<int>(i));
  ptx::atomic_add(&c->count, 1u);
  ptx::atomic_or(&c->bits, 1u << i % 31);
  ptx::atomic_max(&c->largest, i * 7 % 97);
  ptx::atomic_min(&c->smallest, i * 7 % 97 + 3);
  ptx::atomic_add(&c->total, 1ull << 33);
  ptx::atomic_min(&c->first, (1ull << 40) + i);
}
__global__ void take_tickets(uint32_t* next, int* taken) { taken[ptx::atomic_add(next, 1u)] += 1; }

CASE(atomics_lose_nothing) {
  under_schedules(4, [] {
    Counters c{0, 0, 0, 0, 1000, 0, ~0ull};
    launch({dim3(4), dim3(100), 0, "count_up", nullptr}, count_up, &c);
    expect(c.sum == -399 * 200 && c.count == 400 && c.bits == 0x7fffffffu, "add, or");
    expect(c.largest == 96 && c.smallest == 3 && c.total == 400ull << 33 && c.first == 1ull << 40, "min, max");
    uint32_t next = 0;
    std::vector<int> taken(400);
    launch({dim3(4), dim3(100), 0, "take_tickets", nullptr}, take_tickets, &next, taken.data());
    expect(std::all_of(taken.begin(), taken.end(), [](int count) { return count == 1; }), "tickets");
  });
}

// ---- cp_async ----

struct Ring {
  alignas(16) uint32_t word[4][32];
};

// Each lane copies `bytes` of every N, from in to shared memory.
template <int N>
__global__ void copy_some(const uint8_t* in, uint8_t* out, int bytes) {
  auto* s = reinterpret_cast<uint8_t*>(&shared<Ring>());
  ptx::cp_async<N>(s + N * threadIdx.x, in + N * threadIdx.x, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < N; ++i)
    out[N * threadIdx.x + static_cast<unsigned>(i)] = s[N * threadIdx.x + static_cast<unsigned>(i)];
}

template <int N>
void check_copies() {
  alignas(16) uint8_t in[N * 32];
  std::iota(in, in + N * 32, uint8_t{1});
  for (int bytes = 0; bytes <= N; ++bytes) {
    uint8_t out[N * 32];
    launch({dim3(1), dim3(32), sizeof(Ring), "copy_some", nullptr}, copy_some<N>, &in[0], &out[0], bytes);
    for (int i = 0; i < N * 32; ++i) expect(out[i] == (i % N < bytes ? in[i] : 0), "byte " + std::to_string(i));
  }
}

CASE(copies_fill_up_with_zeros) {
  under_schedules(3, [] {
    check_copies<4>();
    check_copies<8>();
    check_copies<16>();
  });
}

// Three groups; what is in shared memory after waiting for all but the newest `Left`.
template <int Left>
__global__ void copy_groups(const uint32_t* in, uint32_t* out) {
  Ring& s = shared<Ring>();
  const unsigned lane = threadIdx.x;
  for (unsigned group = 0; group < 3; ++group) {
    ptx::cp_async<4>(&s.word[group][lane], &in[32 * group + lane]);
    ptx::cp_async_commit();
  }
  ptx::cp_async<4>(&s.word[3][lane], &in[32 * 3 + lane]);  // of no group yet
  ptx::cp_async_wait<Left>();
  for (unsigned group = 0; group < 4; ++group) out[32 * group + lane] = s.word[group][lane];
}

template <int Left>
void check_groups() {
  std::vector<uint32_t> in(128), out(128);
  std::iota(in.begin(), in.end(), 1u);
  const auto arrived = [&](emulator::Delivery delivery) {
    emulator::config() = {.delivery = delivery, .poison = 0xff};
    launch({dim3(1), dim3(32), sizeof(Ring), "copy_groups", nullptr}, copy_groups<Left>, in.data(), out.data());
    emulator::config() = {};
    int count = 0;
    for (size_t i = 0; i < 128; ++i) {
      expect(out[i] == in[i] || out[i] == 0xffffffffu, "word");
      count += out[i] == in[i];
      if (i / 32 + Left < 3) expect(out[i] == in[i], "a group that was waited for isn't there");
    }
    return count;
  };
  const int waited_for = 32 * std::max(0, 3 - Left);
  expect(arrived(emulator::Delivery::Late) == waited_for, "late");
  expect(arrived(emulator::Delivery::Early) == 128, "early");
  const int some = arrived(emulator::Delivery::Random);
  expect(some > waited_for && some < 128, "random");
}

CASE(waits_are_for_all_but_the_newest_groups) {
  check_groups<0>();
  check_groups<1>();
  check_groups<2>();
  check_groups<3>();
}

__global__ void copy_of_another(const uint32_t* in, uint32_t* out) {
  Ring& s = shared<Ring>();
  if (threadIdx.x == 0) ptx::cp_async<4>(&s.word[0][0], in);
  ptx::cp_async_commit();
  if (threadIdx.x == 1) ptx::cp_async_wait<0>();
  ptx::sync_warp();
  if (threadIdx.x == 1) *out = s.word[0][0];
}

CASE(a_wait_is_for_the_own_copies_alone) {
  const uint32_t in = 7;
  uint32_t out = 0;
  launch({dim3(1), dim3(32), sizeof(Ring), "copy_of_another", nullptr}, copy_of_another, &in, &out);
  expect(out == 0xffffffffu, "arrived");
}

__global__ void copy_over(const uint32_t* in, uint32_t* out) {
  Ring& s = shared<Ring>();
  s.word[0][threadIdx.x] = threadIdx.x;
  ptx::cp_async<4>(&s.word[0][threadIdx.x], in + threadIdx.x);
  out[threadIdx.x] = s.word[0][threadIdx.x];  // too late
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

CASE(what_a_copy_will_overwrite_is_gone_when_it_is_issued) {
  std::vector<uint32_t> in(32, 1000), out(32);
  under_schedules(3, [&] {
    launch({dim3(1), dim3(32), sizeof(Ring), "copy_over", nullptr}, copy_over, in.data(), out.data());
    for (uint32_t i = 0; i < 32; ++i) expect(out[i] != i, "still there");
  });
}

__global__ void copy_wrongly(const uint8_t* in, int offset, int bytes) {
  auto* s = reinterpret_cast<uint8_t*>(&shared<Ring>());
  ptx::cp_async<8>(s + offset, in, bytes);
}

CASE(copies_check_their_addresses) {
  alignas(16) uint8_t in[32] = {};
  const auto copy = [&](int source, int offset, int bytes) {
    launch({dim3(1), dim3(1), sizeof(Ring), "copy_wrongly", nullptr}, copy_wrongly, &in[source], offset, bytes);
  };
  copy(8, 504, 8);
  expect_error([&] { copy(4, 0, 8); }, {"an address of 8 bytes is aligned to 4"});
  expect_error([&] { copy(0, 12, 8); }, {"an address of 8 bytes is aligned to 4"});
  expect_error([&] { copy(0, 512, 8); }, {"cp_async at byte 512 of 512 of shared memory"});
  expect_error([&] { copy(0, -8, 8); }, {"cp_async at byte -8 of 512"});
  expect_error([&] { copy(0, 0, 9); }, {"cp_async of 9 bytes into 8"});
  expect_error([&] { copy(0, 0, -1); }, {"cp_async of -1 bytes into 8"});
}

}  // namespace
}  // namespace bitfold::cuda::test
