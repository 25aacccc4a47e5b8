// What CUDA gives a kernel beyond instructions, as C++. Twin: gpu/device.hpp.
#pragma once

#include <cstdint>

#include "cuda/emulator/runtime.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define BITFOLD_DEVICE inline
#define BITFOLD_HOST_DEVICE inline

// Macros, since a variable would change under the feet of the thread that looks at it.
#define threadIdx (::bitfold::cuda::emulator::place().thread)
#define blockIdx (::bitfold::cuda::emulator::place().block)
#define blockDim (::bitfold::cuda::emulator::place().block_size)
#define gridDim (::bitfold::cuda::emulator::place().grid_size)

namespace bitfold::cuda {

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Both ways of a kernel that has two are compiled, and the host chooses.
inline constexpr bool kWgmma = true;
BITFOLD_DEVICE bool wgmma_where(bool chosen) { return chosen; }

// The block's dynamic shared memory as T, aligned to 1024 bytes and full of Config::poison at the start.
template <class T>
BITFOLD_DEVICE T& shared(const emulator::Where& where = emulator::Where::current()) {
  static_assert(alignof(T) <= 1024);
  return *static_cast<T*>(emulator::shared_memory(sizeof(T), where));
}

}  // namespace bitfold::cuda
