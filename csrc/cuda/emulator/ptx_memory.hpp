// Loads, stores, copies and atomics. Loads and stores are the compiler's own, so that sanitizers see them. Twin:
// gpu/ptx_memory.hpp, which says what each means.
#pragma once

#include <cstdint>

#include "cuda/emulator/device.hpp"

namespace bitfold::cuda::ptx {

using emulator::Where;

namespace detail {

template <class T>
T load(const void* global, const Where& where) {
  emulator::check_access(global, sizeof(T), sizeof(T), where);
  return *static_cast<const T*>(global);
}
template <class T>
void store(void* global, T value, const Where& where) {
  emulator::check_access(global, sizeof(T), sizeof(T), where);
  *static_cast<T*>(global) = value;
}

}  // namespace detail

BITFOLD_DEVICE uint4 load16(const void* global, const Where& where = Where::current()) {
  return detail::load<uint4>(global, where);
}
BITFOLD_DEVICE uint2 load8(const void* global, const Where& where = Where::current()) {
  return detail::load<uint2>(global, where);
}
BITFOLD_DEVICE uint32_t load4(const void* global, const Where& where = Where::current()) {
  return detail::load<uint32_t>(global, where);
}
BITFOLD_DEVICE uint16_t load2(const void* global, const Where& where = Where::current()) {
  return detail::load<uint16_t>(global, where);
}
BITFOLD_DEVICE uint8_t load1(const void* global) { return *static_cast<const uint8_t*>(global); }

BITFOLD_DEVICE uint4 load_streaming16(const void* global, const Where& where = Where::current()) {
  return detail::load<uint4>(global, where);
}
BITFOLD_DEVICE uint2 load_streaming8(const void* global, const Where& where = Where::current()) {
  return detail::load<uint2>(global, where);
}
BITFOLD_DEVICE uint32_t load_streaming4(const void* global, const Where& where = Where::current()) {
  return detail::load<uint32_t>(global, where);
}

BITFOLD_DEVICE float4 load_written16(const void* global, const Where& where = Where::current()) {
  return detail::load<float4>(global, where);
}

BITFOLD_DEVICE uint4 load_fresh16(const void* global, const Where& where = Where::current()) {
  return detail::load<uint4>(global, where);
}
BITFOLD_DEVICE uint2 load_fresh8(const void* global, const Where& where = Where::current()) {
  return detail::load<uint2>(global, where);
}
BITFOLD_DEVICE uint32_t load_fresh4(const void* global, const Where& where = Where::current()) {
  return detail::load<uint32_t>(global, where);
}
BITFOLD_DEVICE uint16_t load_fresh2(const void* global, const Where& where = Where::current()) {
  return detail::load<uint16_t>(global, where);
}

BITFOLD_DEVICE void prefetch(const void* global, int bytes, const Where& where = Where::current()) {
  emulator::check_access(global, 1, bytes, where);
}
BITFOLD_DEVICE void prefetch_sector(const void* global, const Where& where = Where::current()) {
  emulator::check_access(global, 1, 1, where);
}

BITFOLD_DEVICE void store_streaming16(void* global, uint4 value, const Where& where = Where::current()) {
  detail::store(global, value, where);
}
BITFOLD_DEVICE void store_streaming8(void* global, uint2 value, const Where& where = Where::current()) {
  detail::store(global, value, where);
}
BITFOLD_DEVICE void store_streaming4(void* global, uint32_t value, const Where& where = Where::current()) {
  detail::store(global, value, where);
}

template <int N>
BITFOLD_DEVICE void cp_async(void* shared, const void* global, int bytes = N, const Where& where = Where::current()) {
  static_assert(N == 4 || N == 8 || N == 16);
  emulator::cp_async(shared, global, N, bytes, where);
}
BITFOLD_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
BITFOLD_DEVICE void cp_async_wait() {
  static_assert(N >= 0);
  emulator::cp_async_wait(N);
}

// ---- atomics: real ones, for ThreadSanitizer's sake ----

namespace detail {

template <class T, class F>
T atomic_update(T* p, F updated) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, updated(old), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace detail

BITFOLD_DEVICE int atomic_add(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL); }
BITFOLD_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
BITFOLD_DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long value) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
BITFOLD_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t value) { return __atomic_fetch_or(p, value, __ATOMIC_ACQ_REL); }
BITFOLD_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t value) {
  return detail::atomic_update(p, [=](uint32_t old) { return old < value ? value : old; });
}
BITFOLD_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t value) {
  return detail::atomic_update(p, [=](uint32_t old) { return old < value ? old : value; });
}
BITFOLD_DEVICE unsigned long long atomic_min(unsigned long long* p, unsigned long long value) {
  return detail::atomic_update(p, [=](unsigned long long old) { return old < value ? old : value; });
}

BITFOLD_DEVICE void fence() {}  // one OS thread: every write is seen by all

}  // namespace bitfold::cuda::ptx
