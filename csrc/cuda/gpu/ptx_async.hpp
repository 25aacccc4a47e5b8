// Barriers in shared memory (mbarrier), bulk copies that arrive at them, and the fence between a thread's own writes
// and what reads shared memory by itself. Hopper's (sm_90a) alone: where a kernel is compiled for another GPU, a call
// traps. Twin: emulator/ptx_async.hpp.
//
// From "Parallel Thread Execution ISA" (9.0), by the names of its sections; tests/cuda/gpu_instructions.cu holds it
// against a GPU:
//   "mbarrier object": a phase ends when its pending arrivals and its pending bytes (tx-count) are both none, and the
//     next begins with the arrivals of barrier_init. The first phase has parity 0.
//   "mbarrier.test_wait/try_wait", .parity: true when the phase of that parity, the current one or the one before, has
//     ended; what was written before the arrivals (.release is the default) is seen after the wait (.acquire).
//   "cp.async.mbarrier.arrive", .noinc: the arrival is one of those that barrier_init counted.
//   "cp.async.bulk": it writes by the async proxy, which wgmma reads by; addresses and bytes are multiples of 16.
//   "cp.async.bulk.tensor", "Tensors" (bound checks, "128B swizzle mode"): copy_box, by a map in the kernel's
//   parameters
//     (launch.hpp).
//   "Async proxy": stores and cp.async (not bulk) write by the generic proxy, and need fence.proxy.async between.
#pragma once

#include <cstdint>

#include "cuda/gpu/launch.hpp"
#include "cuda/gpu/ptx_memory.hpp"
#include "cuda/gpu/ptx_warp.hpp"

namespace bitfold::cuda::ptx {

struct alignas(8) Barrier {
  uint64_t bits;
};

// ---- barriers ----

// One thread; others (and copy_bulk) may use it after fence_barrier_init() of that thread and a sync_block().
BITFOLD_DEVICE void barrier_init(Barrier* barrier, unsigned arrivals) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  trap();
#endif
}
BITFOLD_DEVICE void fence_barrier_init() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  trap();
#endif
}

BITFOLD_DEVICE void barrier_arrive(Barrier* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  trap();
#endif
}
// Arrives too, and the phase also waits for so many bytes of copy_bulk.
BITFOLD_DEVICE void barrier_expect(Barrier* barrier, unsigned bytes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  trap();
#endif
}
// Until the phase of this parity has ended: 0 for the first, and by turns.
BITFOLD_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  unsigned ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
#else
  trap();
#endif
}

// ---- copies ----

// Arrives for this thread when all of its earlier cp_async are there, which it doesn't wait for.
BITFOLD_DEVICE void cp_async_arrive(Barrier* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  trap();
#endif
}

// One thread's; its bytes count against those that barrier_expect promised when they are there.
BITFOLD_DEVICE void copy_bulk(void* shared, const void* global, unsigned bytes, Barrier* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#else
  trap();
#endif
}

// The same of a box of a matrix, from this byte of this line on: kBoxBytes of each of its lines, on end, and of eight
// lines (1024 bytes, from a multiple of 1024 on) 16 bytes at c change places with those at c ^ line % 8. All bytes of a
// box count, those beyond the matrix too, which are zero.
BITFOLD_DEVICE void copy_box(void* shared, const TensorMap& map, int byte, int line, Barrier* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(byte), "r"(line), "r"(shared_address(barrier))
      : "memory");
#else
  trap();
#endif
}

// What was written to shared memory before by stores or cp_async (once it has been waited for), wgmma and copy_bulk see
// after. The writer's, before the barrier that tells others; where copies arrive at a barrier by themselves, each
// reader's, after its wait.
BITFOLD_DEVICE void fence_async() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  trap();
#endif
}

}  // namespace bitfold::cuda::ptx
