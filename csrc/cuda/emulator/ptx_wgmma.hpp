// Products of a warpgroup. Twin: gpu/ptx_wgmma.hpp, which says what each register holds. Sums are made as mma's are.
#pragma once

#include <cstdint>

#include "cuda/emulator/async.hpp"
#include "cuda/emulator/device.hpp"

namespace bitfold::cuda::ptx {

using emulator::Where;

BITFOLD_DEVICE uint64_t wgmma_matrix(const void* shared, int leading_bytes, int stride_bytes,
                                     const Where& where = Where::current()) {
  return emulator::wgmma_matrix(shared, leading_bytes, stride_bytes, where);
}
BITFOLD_DEVICE uint64_t wgmma_box(const void* shared, const Where& where = Where::current()) {
  return emulator::wgmma_box(shared, where);
}
BITFOLD_DEVICE void wgmma_fence(const Where& where = Where::current()) { emulator::wgmma_fence(where); }
BITFOLD_DEVICE void wgmma_commit(const Where& where = Where::current()) { emulator::wgmma_commit(where); }
template <int N>
BITFOLD_DEVICE void wgmma_wait(const Where& where = Where::current()) {
  static_assert(N >= 0 && N <= 7);
  emulator::wgmma_wait(N, where);
}
template <int Sums>
BITFOLD_DEVICE void wgmma_keep(float (&)[Sums]) {}
template <int Sums>
BITFOLD_DEVICE void wgmma_keep(int (&)[Sums]) {}
template <int Steps>
BITFOLD_DEVICE void wgmma_keep(uint32_t (&)[Steps][4]) {}

// Both arrays are looked at until the product has been waited for, as the registers are: they have to live so long.
template <int N>
BITFOLD_DEVICE void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                              const Where& where = Where::current()) {
  static_assert(N == 64 || N == 128);
  emulator::wgmma({.d = d, .a = a, .b = b, .n = N, .accumulate = accumulate}, where);
}

template <int N>
BITFOLD_DEVICE void wgmma_u8s8(int (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                               const Where& where = Where::current()) {
  static_assert(N == 64 || N == 128 || N == 256);
  emulator::wgmma({.d = d, .a = nullptr, .b = b, .n = N, .accumulate = accumulate, .a_matrix = a}, where);
}

template <int Count>
BITFOLD_DEVICE void registers_up(const Where& where = Where::current()) {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  emulator::registers(Count, true, where);
}
template <int Count>
BITFOLD_DEVICE void registers_down(const Where& where = Where::current()) {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  emulator::registers(Count, false, where);
}

}  // namespace bitfold::cuda::ptx
