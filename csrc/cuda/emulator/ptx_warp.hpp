// Lanes, warps and blocks together. Twin: gpu/ptx_warp.hpp, which says what each means.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/emulator/device.hpp"

namespace bitfold::cuda::ptx {

using emulator::Where;

BITFOLD_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
// The same, asked of the processor anew: instead of a register for all of a loop, or a place on its stack.
BITFOLD_DEVICE int lane_id_anew() { return lane_id(); }
BITFOLD_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

// The same number, of which the compiler knows nothing: what a loop's turn makes of it is made anew in the next, and no
// registers keep it meanwhile.
BITFOLD_DEVICE int anew(int value) { return value; }

// ---- a warp ----

namespace detail {

template <class T>
T shuffle_from(T value, int lane, const Where& where) {
  static_assert(sizeof(T) == 4);
  emulator::Exchange exchange{std::bit_cast<uint32_t>(value), lane, &where};
  emulator::shuffle(exchange, where);
  return std::bit_cast<T>(exchange.value);
}

}  // namespace detail

template <class T>
BITFOLD_DEVICE T shuffle(T value, int lane, const Where& where = Where::current()) {
  return detail::shuffle_from(value, lane & 31, where);
}
template <class T>
BITFOLD_DEVICE T shuffle_of_four(T value, int lane, const Where& where = Where::current()) {
  return detail::shuffle_from(value, lane_id() / 4 * 4 + lane % 4, where);
}
template <class T>
BITFOLD_DEVICE T shuffle_xor(T value, int mask, const Where& where = Where::current()) {
  return detail::shuffle_from(value, (lane_id() ^ mask) & 31, where);
}
template <class T>
BITFOLD_DEVICE T shuffle_down(T value, int delta, const Where& where = Where::current()) {
  const int lane = lane_id() + delta;
  return detail::shuffle_from(value, lane < 32 ? lane : lane_id(), where);
}
template <class T>
BITFOLD_DEVICE T shuffle_up(T value, int delta, const Where& where = Where::current()) {
  const int lane = lane_id() - delta;
  return detail::shuffle_from(value, lane >= 0 ? lane : lane_id(), where);
}

BITFOLD_DEVICE uint32_t ballot(bool value, const Where& where = Where::current()) {
  return emulator::vote(emulator::Vote::Ballot, value, where);
}
BITFOLD_DEVICE bool any(bool value, const Where& where = Where::current()) {
  return emulator::vote(emulator::Vote::Any, value, where) != 0;
}
BITFOLD_DEVICE bool all(bool value, const Where& where = Where::current()) {
  return emulator::vote(emulator::Vote::All, value, where) != 0;
}

BITFOLD_DEVICE void sync_warp(const Where& where = Where::current()) { emulator::sync_warp(where); }

// ---- a block ----

BITFOLD_DEVICE void sync_block(const Where& where = Where::current()) { emulator::sync_block(where); }
BITFOLD_DEVICE void bar_sync(int barrier, int threads, const Where& where = Where::current()) {
  emulator::bar_sync(barrier, threads, where);
}
BITFOLD_DEVICE void bar_arrive(int barrier, int threads, const Where& where = Where::current()) {
  emulator::bar_arrive(barrier, threads, where);
}

// ---- kernels of a stream ----

BITFOLD_DEVICE void wait_for_earlier(const Where& where = Where::current()) { emulator::wait_for_earlier(where); }
BITFOLD_DEVICE void let_later_begin(const Where& where = Where::current()) { emulator::let_later_begin(where); }

[[noreturn]] BITFOLD_DEVICE void trap(const Where& where = Where::current()) { emulator::fail("trap", where); }

}  // namespace bitfold::cuda::ptx
