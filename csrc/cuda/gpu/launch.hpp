// The host's side: starting kernels, and the few calls of CUDA's run time that launchers need. Twin:
// emulator/launch.hpp. Every failure is a std::runtime_error of one sentence.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bitfold::cuda {

using Stream = void*;

// A line of a box (ByteMatrix), of which eight are turned in shared memory as wgmma likes them.
inline constexpr int kBoxBytes = 128;

struct Launch {
  dim3 grid;
  dim3 block;  // of one dimension: lanes and warps are counted along x
  int64_t shared_bytes;
  const char* name;  // for errors
  Stream stream;
  // The kernel may begin before the last one of the stream has ended, for which it waits itself (wait_for_earlier).
  // Only where Gpu::early says so: code that doesn't wait would read what isn't there yet.
  bool early = false;
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch isn't blamed
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
// What one block may have, if its kernel asks.
inline int most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// A kernel's attributes are its own, whichever thread of the host sets them: what a launch sets may depend on the
// kernel and the device alone, or it would disturb another thread's, between its setting and its launch.
template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (how.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most_shared_bytes()),
          how.name);
  }
  // Kernels that meet, and those that want much of it, ask for the same division of a multiprocessor's memory, the one
  // with most that is shared: after another it may have to be empty first.
  if (how.early || how.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          how.name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = how.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), how.name);
}

// A matrix of bytes in global memory, in lines, as kernels on Hopper copy it (ptx::copy_box): by boxes of some lines by
// kBoxBytes. The data and line_bytes are multiples of 16; what of a box lies beyond the last line or byte is zero.
struct ByteMatrix {
  const void* data;
  int64_t lines, bytes;  // of a line
  int64_t line_bytes;    // from a line to the next
  int box_lines;         // at most 256
};
// A parameter of a kernel, or part of one that is __grid_constant__.
using TensorMap = CUtensorMap;

inline TensorMap tensor_map(const ByteMatrix& matrix) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    check(status, "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
      throw std::runtime_error("cuTensorMapEncodeTiled: this driver is older than CUDA 12.0 and lacks it");
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.bytes), static_cast<cuuint64_t>(matrix.lines)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.line_bytes)};
  const cuuint32_t box[] = {kBoxBytes, static_cast<cuuint32_t>(matrix.box_lines)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix.data), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status) + " for " +
                             std::to_string(matrix.lines) + " lines of " + std::to_string(matrix.bytes) + " bytes");
  }
  return map;
}

// The current device: capability is 90 for 9.0; shared_bytes is what one block may have.
inline void describe_device(int& capability, int& multiprocessors, int64_t& shared_bytes) {
  capability =
      10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
  multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  shared_bytes = most_shared_bytes();
}

// Whether streams and graphs that are captured from them hold early launches: since CUDA 12.3. What an older driver
// makes of one in a graph isn't written anywhere, so it gets none.
inline bool driver_knows_early_launches() {
  static const bool knows = [] {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version >= 12030;
  }();
  return knows;
}

// Every one of these bytes of device memory becomes `byte`, in the stream's order.
inline void fill(void* device, uint8_t byte, int64_t bytes, Stream stream) {
  const auto native = static_cast<cudaStream_t>(stream);
  check(cudaMemsetAsync(device, byte, static_cast<size_t>(bytes), native), "cudaMemsetAsync");
}
inline void clear(void* device, int64_t bytes, Stream stream) { fill(device, 0, bytes, stream); }

// Waits for the stream and copies device memory to the host.
inline void read_back(void* host, const void* device, int64_t bytes, Stream stream) {
  const auto native = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, native), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(native), "cudaStreamSynchronize");
}

}  // namespace bitfold::cuda
