// A small product by wgmma, pipelined as a kernel would be, and its data: for the emulator's tests (emulator_wgmma.cpp)
// and for a GPU (gpu_instructions.cu).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "cuda/device.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::test {

// ---- matrices as the PTX ISA lays them out ----

// Bytes of column c, row k (of 16) in a B whose core matrices of 8 columns by 8 k lie so.
inline size_t place(int column, int k, int leading, int stride) {
  return static_cast<size_t>(column / 8 * stride + k / 8 * leading + column % 8 * 16 + k % 8 * 2);
}
struct Spot {
  int thread, r, part;
};
inline Spot spot_a(int row, int k) {
  return {row / 16 * 32 + row % 8 * 4 + k % 8 / 2, row / 8 % 2 + 2 * (k / 8), k % 2};
}
inline Spot spot_d(int row, int column) {
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

// How x comes: one thread's copy_bulk; cp_async of 128 that wait for it, fence and arrive; cp_async that arrives by
// itself, and the readers' fence.
enum class Way { Bulk, Copies, Arrivals };
constexpr Way kWays[] = {Way::Bulk, Way::Copies, Way::Arrivals};

struct Job {
  const uint32_t* a;  // [step][half][thread][4]
  const uint8_t* x;   // [step], as a slot holds it
  float* d;           // [thread][N / 2]
  bool accumulate;    // onto d
  Way way;
};

// 128 threads multiply, and those of another warpgroup bring x.
template <int N, Mistake M>
__global__ void __launch_bounds__(256, 1) multiply(Job job) {
  constexpr int kBytes = N * kDepth * 2;
  auto& room = shared<Room<N>>();
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kSlots; ++i) {
      ptx::barrier_init(&room.full[i], job.way == Way::Bulk ? 1 : 128);
      ptx::barrier_init(&room.empty[i], 128);
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (thread >= 128) {
    ptx::registers_down<40>();
    if (job.way == Way::Bulk && thread != 128) return;
    for (int step = 0; step < kSteps; ++step) {
      const int slot = step % kSlots;
      if (M != Mistake::NoRelease) ptx::barrier_wait(&room.empty[slot], static_cast<unsigned>(step / kSlots + 1) & 1u);
      if (job.way == Way::Bulk) {
        ptx::barrier_expect(&room.full[slot], kBytes);
        ptx::copy_bulk(room.x[slot], job.x + step * kBytes, kBytes, &room.full[slot]);
      } else {
        for (int i = (thread - 128) * 16; i < kBytes; i += 128 * 16) {
          ptx::cp_async<16>(&room.x[slot][i], job.x + step * kBytes + i);
        }
        if (job.way == Way::Arrivals) {
          ptx::cp_async_arrive(&room.full[slot]);
          continue;
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
    if (job.way == Way::Arrivals && M != Mistake::NoProxyFence) ptx::fence_async();
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

// Numbers for Data<N> that show how tensor cores align halves too small to be normal, as A's are here: sums are some
// 1e-5 from float64 if the products are aligned as those of the smallest normal half are, else 5e-7.
inline std::function<float()> small_halves_of_a(int n) {
  return [n, random = std::mt19937(1), drawn = 0]() mutable {
    const bool of_a = drawn++ % (64 + n) < 64;  // the order in which Data draws
    if (of_a) return std::ldexp(static_cast<float>(1 + random() % 3), -24);
    return std::ldexp(1024.0f + static_cast<float>(random() % 1024), -10 - static_cast<int>(random() % 9));
  };
}

}  // namespace bitfold::cuda::test
