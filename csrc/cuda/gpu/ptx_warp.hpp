// Lanes, warps and blocks together. The instructions of a warp are for all its lanes: each must come to the same one.
// Twin: emulator/ptx_warp.hpp.
#pragma once

#include <cstdint>

#include "cuda/gpu/device.hpp"

namespace bitfold::cuda::ptx {

BITFOLD_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
// The same, asked of the processor anew: instead of a register for all of a loop, or a place on its stack.
BITFOLD_DEVICE int lane_id_anew() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return static_cast<int>(lane);
}
BITFOLD_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

// The same number, of which the compiler knows nothing: what a loop's turn makes of it is made anew in the next, and no
// registers keep it meanwhile.
BITFOLD_DEVICE int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- a warp; T has 32 bits ----

template <class T>
BITFOLD_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// The value of lane `lane` of the four that this one is among: the number may be a constant, which takes no register.
template <class T>
BITFOLD_DEVICE T shuffle_of_four(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane, 4);
}
template <class T>
BITFOLD_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of the lane `delta` above; the last lanes keep their own.
template <class T>
BITFOLD_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
// The value of the lane `delta` below; the first lanes keep their own.
template <class T>
BITFOLD_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}

BITFOLD_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
BITFOLD_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value) != 0; }
BITFOLD_DEVICE bool all(bool value) { return __all_sync(0xffffffffu, value) != 0; }

// What the lanes wrote before, all of them see after; shuffles and votes promise nothing of the kind.
BITFOLD_DEVICE void sync_warp() { __syncwarp(); }

// ---- a block ----

BITFOLD_DEVICE void sync_block() { __syncthreads(); }

// Barriers 1 ... 15 for `threads` threads of the block, whole warps; bar_arrive doesn't wait.
BITFOLD_DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
BITFOLD_DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- kernels of a stream, where one may begin before the last has ended (Launch::early): sm_90 and newer ----

// Until the kernel before has ended and all that it wrote is there. All threads of a kernel that is launched early come
// here, whatever becomes of them: then no kernel ends before those ahead of it.
BITFOLD_DEVICE void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel, if its launch is early, may begin when all blocks have come here or ended. After wait_for_earlier,
// so that it meets this kernel alone.
BITFOLD_DEVICE void let_later_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

[[noreturn]] BITFOLD_DEVICE void trap() {
  asm volatile("trap;");
  __builtin_unreachable();
}

}  // namespace bitfold::cuda::ptx
