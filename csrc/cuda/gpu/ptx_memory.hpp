// Loads, stores, copies and atomics. The number in a name is the bytes; addresses are aligned to it. Twin:
// emulator/ptx_memory.hpp.
#pragma once

#include <cstdint>

#include "cuda/gpu/device.hpp"

namespace bitfold::cuda::ptx {

BITFOLD_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- global memory that nobody writes while the kernel runs ----

BITFOLD_DEVICE uint4 load16(const void* global) { return __ldg(static_cast<const uint4*>(global)); }
BITFOLD_DEVICE uint2 load8(const void* global) { return __ldg(static_cast<const uint2*>(global)); }
BITFOLD_DEVICE uint32_t load4(const void* global) { return __ldg(static_cast<const uint32_t*>(global)); }
BITFOLD_DEVICE uint16_t load2(const void* global) { return __ldg(static_cast<const uint16_t*>(global)); }
BITFOLD_DEVICE uint8_t load1(const void* global) { return __ldg(static_cast<const uint8_t*>(global)); }

// The same for what is read once: it takes no place in the first cache. `volatile` keeps their order, which is how a
// kernel has many of them in flight.
BITFOLD_DEVICE uint4 load_streaming16(const void* global) {
  uint4 d;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(global));
  return d;
}
BITFOLD_DEVICE uint2 load_streaming8(const void* global) {
  uint2 d;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(global));
  return d;
}
BITFOLD_DEVICE uint32_t load_streaming4(const void* global) {
  uint32_t d;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(d) : "l"(global));
  return d;
}

// ---- global memory that other blocks have written: past the first cache, which doesn't hear of it ----

BITFOLD_DEVICE float4 load_written16(const void* global) { return __ldcg(static_cast<const float4*>(global)); }

// ---- global memory that the kernel before may have written while this one had begun (wait_for_earlier) ----
// `volatile` keeps them behind the wait, which the compiler may let loads of memory that nobody writes go ahead of.

BITFOLD_DEVICE uint4 load_fresh16(const void* global) {
  uint4 d;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(global));
  return d;
}
BITFOLD_DEVICE uint2 load_fresh8(const void* global) {
  uint2 d;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(global));
  return d;
}
BITFOLD_DEVICE uint32_t load_fresh4(const void* global) {
  uint32_t d;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(d) : "l"(global));
  return d;
}
BITFOLD_DEVICE uint16_t load_fresh2(const void* global) {
  uint16_t d;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(d) : "l"(global));
  return d;
}

// The pieces of 16 bytes that have any of these are asked for, into the second cache, which hears of whatever is
// written to them: also before wait_for_earlier. Nothing on GPUs older than Hopper. By one thread: a warp does one
// after the other. Fewer than 1 MB.
BITFOLD_DEVICE void prefetch(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  const auto address = reinterpret_cast<uintptr_t>(global), first = address & ~uintptr_t{15};
  const auto count = static_cast<uint32_t>(address + static_cast<uint32_t>(bytes) + 15 - first) & ~15u;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(count));
#endif
}

// The same for the sector that has this byte, and a thread's own.
BITFOLD_DEVICE void prefetch_sector(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ---- global memory that the kernel doesn't read again ----

BITFOLD_DEVICE void store_streaming16(void* global, uint4 value) { __stcs(static_cast<uint4*>(global), value); }
BITFOLD_DEVICE void store_streaming8(void* global, uint2 value) { __stcs(static_cast<uint2*>(global), value); }
BITFOLD_DEVICE void store_streaming4(void* global, uint32_t value) { __stcs(static_cast<uint32_t*>(global), value); }

// ---- copies from global to shared memory that go on while the thread does ----

// Of the N bytes that are written the first `bytes` are read, the others zero.
template <int N>
BITFOLD_DEVICE void cp_async(void* shared, const void* global, int bytes = N) {
  static_assert(N == 4 || N == 8 || N == 16);
  if constexpr (N == 16) {  // past the first cache
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(N),
                 "r"(bytes)
                 : "memory");
  }
}

// The thread's copies since the last commit become a group; wait<N> waits until all but its newest N groups are there.
// Others see them after a barrier.
BITFOLD_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
BITFOLD_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- atomics, on global or shared memory; they return what was there ----

BITFOLD_DEVICE int atomic_add(int* p, int value) { return atomicAdd(p, value); }
BITFOLD_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) { return atomicAdd(p, value); }
BITFOLD_DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  return atomicAdd(p, value);
}
BITFOLD_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t value) { return atomicOr(p, value); }
BITFOLD_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t value) { return atomicMax(p, value); }
BITFOLD_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t value) { return atomicMin(p, value); }
BITFOLD_DEVICE unsigned long long atomic_min(unsigned long long* p, unsigned long long value) {
  return atomicMin(p, value);
}

// What this thread wrote before, every thread of the GPU sees before what it writes after.
BITFOLD_DEVICE void fence() { __threadfence(); }

}  // namespace bitfold::cuda::ptx
