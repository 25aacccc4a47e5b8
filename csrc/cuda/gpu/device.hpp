// What CUDA gives a kernel beyond instructions. Twin: emulator/device.hpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Device functions, inlined; those of HOST_DEVICE may also be constexpr and run on the host.
#define BITFOLD_DEVICE __device__ __forceinline__
#define BITFOLD_HOST_DEVICE __host__ __device__ __forceinline__

namespace bitfold::cuda {

// Whether this code is a GPU's with wgmma. A kernel that has another body for other GPUs asks wgmma_where(chosen),
// which is a constant here, so that only one of them is compiled; `chosen` is what the host knows of the GPU.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kWgmma = true;
#else
inline constexpr bool kWgmma = false;
#endif
BITFOLD_DEVICE constexpr bool wgmma_where(bool chosen) {
  static_cast<void>(chosen);
  return kWgmma;
}

// The block's dynamic shared memory as T, aligned to 1024 bytes; it holds nothing defined at the start.
template <class T>
BITFOLD_DEVICE T& shared() {
  static_assert(alignof(T) <= 1024);
  extern __shared__ __align__(1024) unsigned char bitfold_shared_memory[];
  return *reinterpret_cast<T*>(bitfold_shared_memory);
}

}  // namespace bitfold::cuda
