// All that a kernel includes: one set of names with two meanings. Under nvcc they are CUDA and PTX instructions; under
// a C++ compiler they run on fibers of the CPU (emulator/README.md). Each file of gpu/ has its twin in emulator/, with
// the same names and signatures.
#pragma once

#if defined(__CUDACC__)
#include "cuda/gpu/device.hpp"
#include "cuda/gpu/launch.hpp"
#include "cuda/gpu/ptx.hpp"
#else
#include "cuda/emulator/device.hpp"
#include "cuda/emulator/launch.hpp"
#include "cuda/emulator/ptx.hpp"
#endif

namespace bitfold::cuda {

inline constexpr int kWarp = 32;              // lanes
inline constexpr int64_t kMostGridY = 65535;  // blocks along y, and along z; along x there may be 2^31 - 1

template <class T>
BITFOLD_HOST_DEVICE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
BITFOLD_HOST_DEVICE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
// For a >= 0 and b > 0.
template <class T>
BITFOLD_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace bitfold::cuda
