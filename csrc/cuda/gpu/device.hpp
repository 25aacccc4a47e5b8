// What CUDA gives a kernel beyond instructions. Twin: emulator/device.hpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Device functions, inlined; those of HOST_DEVICE may also be constexpr and run on the host.
#define BITFOLD_DEVICE __device__ __forceinline__
#define BITFOLD_HOST_DEVICE __host__ __device__ __forceinline__

namespace bitfold::cuda {

// The block's dynamic shared memory as T, aligned to 1024 bytes; it holds nothing defined at the start.
template <class T>
BITFOLD_DEVICE T& shared() {
  static_assert(alignof(T) <= 1024);
  extern __shared__ __align__(1024) unsigned char bitfold_shared_memory[];
  return *reinterpret_cast<T*>(bitfold_shared_memory);
}

}  // namespace bitfold::cuda
