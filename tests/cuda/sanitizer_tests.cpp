// sanitizer_tests NAME: one kernel that does something wrong that the sanitizers have to see (test_sanitizers.py), or,
// by the names quiet_..., something right that they must not report.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "cuda/device.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kInts = 258;  // 8 bytes more than whole 16
struct Shared {
  int value[64];
  alignas(16) int ring[3][32];
  ptx::Barrier full[2], empty[2];
  alignas(16) uint8_t matrix[2048];  // 64 columns of 16 halves
};

void start(int blocks, int threads, void (*kernel)(int*), int* data) {
  launch({dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), sizeof(Shared), "kernel", nullptr},
         kernel, data);
}

// Two kernels, of which the second begins before the first has ended.
void start_pair(int threads, void (*first)(int*), void (*second)(int*), int* data) {
  emulator::config().ahead = 1;
  start(1, threads, first, data);
  launch({.grid = 2,
          .block = static_cast<unsigned>(threads),
          .shared_bytes = sizeof(Shared),
          .name = "second",
          .stream = nullptr,
          .early = true},
         second, data);
  emulator::synchronize();
}

// ---- races: the result may well be right ----

__global__ void race_add_to_shared(int* out) {
  auto& s = shared<Shared>();
  if (threadIdx.x == 0) s.value[0] = 0;
  ptx::sync_block();
  s.value[0] += 1;
  ptx::sync_block();
  out[threadIdx.x] = s.value[0];
}
__global__ void race_add_to_global(int* out) { *out += 1; }
__global__ void race_between_blocks(int* out) { out[threadIdx.x] = static_cast<int>(blockIdx.x); }
__global__ void race_three_blocks_apart(int* out) { out[blockIdx.x % 3] = static_cast<int>(blockIdx.x); }
__global__ void race_four_blocks_apart(int* out) { out[blockIdx.x % 4] = static_cast<int>(blockIdx.x); }

// A shuffle makes lanes meet, but promises nothing about memory.
__global__ void race_behind_shuffle(int* out) {
  auto& s = shared<Shared>();
  s.value[threadIdx.x] = 1;
  ptx::shuffle(1, 0);
  out[threadIdx.x] = s.value[threadIdx.x ^ 1u];
}

// Reads of one round and writes of the next.
__global__ void race_second_barrier(int* out) {
  auto& s = shared<Shared>();
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    s.value[threadIdx.x] = i;
    ptx::sync_block();
    sum += s.value[(threadIdx.x + 33) % 64];
  }
  out[threadIdx.x] = sum;
}

__global__ void race_copy_not_waited_for(int* in) {
  auto& s = shared<Shared>();
  for (int i = 0; i < 2; ++i) {
    ptx::cp_async<4>(&s.ring[i][threadIdx.x], in + threadIdx.x);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  in[32 + threadIdx.x] = s.ring[1][threadIdx.x];
}
__global__ void race_copy_of_another(int* in) {
  auto& s = shared<Shared>();
  ptx::cp_async<4>(&s.ring[0][threadIdx.x], in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  in[32 + threadIdx.x] = s.ring[0][threadIdx.x ^ 1u];
}
__global__ void race_copy_over_what_is_read(int* in) {
  auto& s = shared<Shared>();
  s.ring[0][threadIdx.x] = 1;
  ptx::sync_warp();
  const int other = s.ring[0][threadIdx.x ^ 1u];
  ptx::cp_async<4>(&s.ring[0][threadIdx.x], in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  in[32 + threadIdx.x] = other;
}
__global__ void race_ldmatrix(int* out) {
  auto& s = shared<Shared>();
  if (threadIdx.x < 4) s.value[threadIdx.x] = 1;
  uint32_t r[2];
  ptx::ldmatrix_x2(r, &s.value[threadIdx.x % 16 * 4]);
  out[threadIdx.x] = static_cast<int>(r[0]);
}
__global__ void race_named_barrier(int* out) {
  auto& s = shared<Shared>();
  const int warp = ptx::warp_id(), lane = ptx::lane_id();
  if (warp == 0) {
    s.value[lane] = 1;
    ptx::bar_sync(1, 64);
    s.value[lane] = 2;  // nobody said that the other has read
  } else {
    ptx::bar_sync(1, 64);
    out[lane] = s.value[31 - lane];
  }
}

BITFOLD_DEVICE void open_barriers(Shared& s, unsigned arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) ptx::barrier_init(&s.full[i], arrivals), ptx::barrier_init(&s.empty[i], arrivals);
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
}
// One warp gives 32 numbers at a time to the other, as in a pipeline of two slots.
template <bool Full, bool Empty>
BITFOLD_DEVICE void pass_on(int* out) {
  auto& s = shared<Shared>();
  open_barriers(s, 32);
  const int lane = ptx::lane_id();
  int sum = 0;
  for (int i = 0; i < 6; ++i) {
    const auto parity = static_cast<unsigned>(i / 2 & 1);
    if (ptx::warp_id() == 0) {
      if (Empty) ptx::barrier_wait(&s.empty[i % 2], parity ^ 1u);
      s.ring[i % 2][lane] = i;
      ptx::barrier_arrive(&s.full[i % 2]);
    } else {
      if (Full) ptx::barrier_wait(&s.full[i % 2], parity);
      sum += s.ring[i % 2][31 - lane];
      ptx::barrier_arrive(&s.empty[i % 2]);
    }
  }
  if (ptx::warp_id() == 1) out[32 * blockIdx.x + static_cast<unsigned>(lane)] = sum;
}
__global__ void race_full_barrier(int* out) { pass_on<false, true>(out); }
__global__ void race_empty_barrier(int* out) { pass_on<true, false>(out); }

template <bool Wait>
BITFOLD_DEVICE void copy_bulk(int* data) {
  auto& s = shared<Shared>();
  open_barriers(s, 1);
  if (threadIdx.x == 0) {
    ptx::barrier_expect(&s.full[0], 128);
    ptx::copy_bulk(s.ring[0], data, 128, &s.full[0]);
  }
  if (Wait) ptx::barrier_wait(&s.full[0], 0);
  data[32 + 32 * blockIdx.x + threadIdx.x] = s.ring[0][threadIdx.x];
  if (!Wait) ptx::barrier_wait(&s.full[0], 0);
}
__global__ void race_bulk_copy(int* data) { copy_bulk<false>(data); }

template <bool Waited>
BITFOLD_DEVICE void copies_that_arrive(int* data) {
  auto& s = shared<Shared>();
  open_barriers(s, 32);
  ptx::cp_async<4>(&s.ring[0][threadIdx.x], data + threadIdx.x);
  if (Waited) ptx::cp_async_arrive(&s.full[0]);
  if (!Waited) ptx::barrier_arrive(&s.full[0]);
  ptx::barrier_wait(&s.full[0], 0);
  data[32 + 32 * blockIdx.x + threadIdx.x] = s.ring[0][threadIdx.x ^ 1u];
}
__global__ void race_copies_that_arrive(int* data) { copies_that_arrive<false>(data); }

// What wgmma reads is written again before or after it has been waited for; the other write, before, is for a barrier.
template <bool Before, bool After>
BITFOLD_DEVICE void multiply_and_overwrite(int* out) {
  auto& s = shared<Shared>();
  const auto fill = [&](int value) {
    for (unsigned i = threadIdx.x; i < 512; i += 128) reinterpret_cast<int*>(s.matrix)[i] = value;
    ptx::fence_async();
  };
  fill(0);
  if (Before) ptx::sync_block();
  float d[32];
  const uint32_t a[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_f16<64>(d, a, ptx::wgmma_matrix(s.matrix, 1024, 128), false);
  ptx::wgmma_commit();
  if (!After) fill(1);
  ptx::wgmma_wait<0>();
  ptx::sync_block();
  if (After) fill(1);
  out[threadIdx.x] = static_cast<int>(d[0]);
}
__global__ void race_wgmma_before_writes(int* out) { multiply_and_overwrite<false, true>(out); }
__global__ void race_writes_before_wgmma_ends(int* out) { multiply_and_overwrite<true, false>(out); }

// What the kernel before may still write or read is touched before the wait for it.
__global__ void swap_numbers(int* data) { data[threadIdx.x] = data[32 + threadIdx.x]; }
__global__ void race_read_before_wait(int* data) {
  const int number = data[threadIdx.x];
  ptx::wait_for_earlier();
  data[64 + 32 * blockIdx.x + threadIdx.x] = number;
}
__global__ void race_write_before_wait(int* data) {
  if (blockIdx.x == 0) data[32 + threadIdx.x] = 1;
  ptx::wait_for_earlier();
}
__global__ void race_copy_before_wait(int* data) {
  auto& s = shared<Shared>();
  ptx::cp_async<4>(&s.ring[0][threadIdx.x], data + threadIdx.x);
  ptx::cp_async_commit();
  ptx::wait_for_earlier();
  ptx::cp_async_wait<0>();
  data[64 + 32 * blockIdx.x + threadIdx.x] = s.ring[0][threadIdx.x];
}

// ---- nothing wrong ----

__global__ void quiet_wait(int* data) {
  auto& s = shared<Shared>();
  s.value[threadIdx.x] = static_cast<int>(threadIdx.x);
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  data[64 + 32 * blockIdx.x + threadIdx.x] = data[threadIdx.x] + s.value[threadIdx.x];
}

__global__ void quiet_pipeline(int* out) { pass_on<true, true>(out); }
__global__ void quiet_bulk_copy(int* data) { copy_bulk<true>(data); }
__global__ void quiet_copies_that_arrive(int* data) { copies_that_arrive<true>(data); }
__global__ void quiet_wgmma(int* out) { multiply_and_overwrite<true, true>(out); }

__global__ void quiet_barriers(int* out) {
  auto& s = shared<Shared>();
  int sum = 0;
  for (int i = 0; i < 5; ++i) {
    s.value[threadIdx.x] = i;
    ptx::sync_block();
    sum += s.value[(threadIdx.x + 33) % 64];
    ptx::sync_block();
  }
  out[64 * blockIdx.x + threadIdx.x] = sum;
}
__global__ void quiet_warps(int* out) {
  auto& s = shared<Shared>();
  int sum = 0;
  for (int i = 0; i < 5; ++i) {
    s.value[threadIdx.x] = i;
    ptx::sync_warp();
    sum += s.value[threadIdx.x ^ 1u];
    ptx::sync_warp();
  }
  out[64 * blockIdx.x + threadIdx.x] = sum;
}
__global__ void quiet_channel(int* out) {
  auto& s = shared<Shared>();
  const int warp = ptx::warp_id(), lane = ptx::lane_id();
  int sum = 0;
  for (int i = 0; i < 6; ++i) {
    if (warp == 0) {
      if (i > 0) ptx::bar_sync(2, 64);
      s.value[lane] = i;
      ptx::bar_arrive(1, 64);
    } else {
      ptx::bar_sync(1, 64);
      sum += s.value[31 - lane];
      if (i < 5) ptx::bar_arrive(2, 64);
    }
  }
  if (warp == 1) out[32 * blockIdx.x + static_cast<unsigned>(lane)] = sum;
}
__global__ void quiet_ring(int* in) {
  auto& s = shared<Shared>();
  const unsigned i = threadIdx.x;
  int sum = 0;
  for (int step = 0; step < 2; ++step) {
    ptx::cp_async<4>(&s.ring[step][i], in + i);
    ptx::cp_async_commit();
  }
  for (int step = 0; step < 8; ++step) {
    ptx::cp_async_wait<1>();
    ptx::sync_warp();
    sum += s.ring[step % 3][i ^ 1u];
    if (step < 6) ptx::cp_async<4>(&s.ring[(step + 2) % 3][i], in + i);
    ptx::cp_async_commit();
  }
  in[32 + 32 * blockIdx.x + i] = sum;
}
__global__ void quiet_atomics(int* out) {
  auto& s = shared<Shared>();
  if (threadIdx.x == 0) s.value[0] = 0;
  ptx::sync_block();
  ptx::atomic_add(&s.value[0], 1);
  ptx::sync_block();
  if (threadIdx.x == 0) ptx::atomic_add(out, s.value[0]);
}
// The last block adds up what all of them wrote.
__global__ void quiet_last_block(int* out) {
  if (threadIdx.x != 0) return;
  out[2 + blockIdx.x] = 5;
  ptx::fence();
  if (ptx::atomic_add(&out[0], 1) + 1 < static_cast<int>(gridDim.x)) return;
  ptx::fence();
  for (unsigned i = 0; i < gridDim.x; ++i) out[1] += out[2 + i];
}

// ---- accesses outside of what there is: data has kInts, shared memory a Shared ----

int* hidden(int* pointer) {  // from what the compiler knows of it
  asm volatile("" : "+r"(pointer));
  return pointer;
}

__global__ void overrun_read(int* in) { in[0] = hidden(in)[kInts + threadIdx.x]; }
__global__ void overrun_write(int* out) { hidden(out)[static_cast<int>(threadIdx.x) - 1] = 1; }
__global__ void overrun_load(int* in) { in[0] = static_cast<int>(ptx::load16(in + 256).x); }
__global__ void overrun_store(int* out) { ptx::store_streaming8(out + kInts, {}); }
__global__ void overrun_atomic(int* out) { ptx::atomic_add(out + kInts, 1); }
__global__ void overrun_copy(int* in) { ptx::cp_async<16>(&shared<Shared>().ring[0][0], in + 256, 12); }
__global__ void overrun_bulk_copy(int* in) {
  auto& s = shared<Shared>();
  open_barriers(s, 1);
  ptx::barrier_expect(&s.full[0], 16);
  ptx::copy_bulk(s.ring[0], in + 256, 16, &s.full[0]);
  ptx::barrier_wait(&s.full[0], 0);
}
__global__ void overrun_shared(int* out) {
  out[0] = hidden(reinterpret_cast<int*>(&shared<Shared>()))[sizeof(Shared) / 4];
}
__global__ void overrun_stack(int* out) {
  int local[4] = {};
  hidden(local)[out[0] + 4] = 1;
  out[1] = hidden(local)[3];
}
__global__ void quiet_edges(int* data) {
  auto& s = shared<Shared>();
  ptx::cp_async<16>(&s.ring[2][28], data + 256, 8);  // reads the 8 bytes that are there
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  data[kInts - 1] = s.ring[2][31] + data[0];
}

const std::map<std::string, std::function<void(int*)>> kKernels = {
#define KERNEL(name, blocks, threads) {#name, [](int* data) { start(blocks, threads, name, data); }}
#define SECOND_KERNEL(name, threads) {#name, [](int* data) { start_pair(threads, swap_numbers, name, data); }}
    KERNEL(race_add_to_shared, 1, 64),
    KERNEL(race_add_to_global, 1, 2),
    KERNEL(race_between_blocks, 2, 1),
    KERNEL(race_three_blocks_apart, 6, 1),
    KERNEL(race_four_blocks_apart, 8, 1),
    KERNEL(race_behind_shuffle, 1, 32),
    KERNEL(race_second_barrier, 1, 64),
    KERNEL(race_copy_not_waited_for, 1, 32),
    KERNEL(race_copy_of_another, 1, 32),
    KERNEL(race_copy_over_what_is_read, 1, 32),
    KERNEL(race_ldmatrix, 1, 32),
    KERNEL(race_named_barrier, 1, 64),
    KERNEL(race_full_barrier, 1, 64),
    KERNEL(race_empty_barrier, 1, 64),
    KERNEL(race_bulk_copy, 1, 32),
    KERNEL(race_copies_that_arrive, 1, 32),
    KERNEL(race_wgmma_before_writes, 1, 128),
    KERNEL(race_writes_before_wgmma_ends, 1, 128),
    SECOND_KERNEL(race_read_before_wait, 32),
    SECOND_KERNEL(race_write_before_wait, 32),
    SECOND_KERNEL(race_copy_before_wait, 32),
    SECOND_KERNEL(quiet_wait, 32),
    KERNEL(quiet_pipeline, 3, 64),
    KERNEL(quiet_bulk_copy, 3, 32),
    KERNEL(quiet_copies_that_arrive, 3, 32),
    KERNEL(quiet_wgmma, 1, 128),
    KERNEL(quiet_barriers, 3, 64),
    KERNEL(quiet_warps, 3, 64),
    KERNEL(quiet_channel, 3, 64),
    KERNEL(quiet_ring, 3, 32),
    KERNEL(quiet_atomics, 3, 64),
    KERNEL(quiet_last_block, 5, 2),
    KERNEL(overrun_read, 1, 1),
    KERNEL(overrun_write, 1, 1),
    KERNEL(overrun_load, 1, 1),
    KERNEL(overrun_store, 1, 1),
    KERNEL(overrun_atomic, 1, 1),
    KERNEL(overrun_copy, 1, 1),
    KERNEL(overrun_bulk_copy, 1, 1),
    KERNEL(overrun_shared, 1, 1),
    KERNEL(overrun_stack, 1, 1),
    KERNEL(quiet_edges, 1, 1),
#undef KERNEL
#undef SECOND_KERNEL
};

}  // namespace
}  // namespace bitfold::cuda

int main(int count, char** arguments) {
  using namespace bitfold::cuda;
  if (count != 2 || !kKernels.contains(arguments[1])) return 2;
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, kInts * sizeof(int)) != 0) return 2;
  const std::unique_ptr<int, decltype(&std::free)> data(static_cast<int*>(std::memset(memory, 0, kInts * sizeof(int))),
                                                        std::free);
  emulator::config().delivery = emulator::Delivery::Early;  // so that cp_async's own results are no concern here
  try {
    kKernels.at(arguments[1])(data.get());
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
  std::puts("ran");
  return 0;
}
