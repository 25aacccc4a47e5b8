// Barriers in shared memory, bulk copies and the fence between proxies. Twin: gpu/ptx_async.hpp, which says what each
// means.
#pragma once

#include <cstdint>

#include "cuda/emulator/async.hpp"
#include "cuda/emulator/device.hpp"

namespace bitfold::cuda::ptx {

using emulator::Where;

struct alignas(8) Barrier {
  uint64_t bits;  // a mark; what the barrier counts is the run time's (barriers.cpp)
};

BITFOLD_DEVICE void barrier_init(Barrier* barrier, unsigned arrivals, const Where& where = Where::current()) {
  emulator::barrier_init(barrier, arrivals, where);
}
BITFOLD_DEVICE void fence_barrier_init() { emulator::fence_barrier_init(); }
BITFOLD_DEVICE void barrier_arrive(Barrier* barrier, const Where& where = Where::current()) {
  emulator::barrier_arrive(barrier, 0, "barrier_arrive", where);
}
BITFOLD_DEVICE void barrier_expect(Barrier* barrier, unsigned bytes, const Where& where = Where::current()) {
  emulator::barrier_arrive(barrier, bytes, "barrier_expect", where);
}
BITFOLD_DEVICE void barrier_wait(Barrier* barrier, unsigned parity, const Where& where = Where::current()) {
  emulator::barrier_wait(barrier, parity, where);
}

BITFOLD_DEVICE void cp_async_arrive(Barrier* barrier, const Where& where = Where::current()) {
  emulator::cp_async_arrive(barrier, where);
}
BITFOLD_DEVICE void copy_bulk(void* shared, const void* global, unsigned bytes, Barrier* barrier,
                              const Where& where = Where::current()) {
  emulator::copy_bulk(shared, global, bytes, barrier, where);
}
BITFOLD_DEVICE void copy_box(void* shared, const TensorMap& map, int byte, int line, Barrier* barrier,
                             const Where& where = Where::current()) {
  emulator::copy_box(shared, map, byte, line, barrier, where);
}
BITFOLD_DEVICE void fence_async() { emulator::fence_async(); }

}  // namespace bitfold::cuda::ptx
