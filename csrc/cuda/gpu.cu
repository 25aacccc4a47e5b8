// The current device.
#include "cuda/cuda.hpp"
#include "cuda/device.hpp"

namespace bitfold::cuda {

Gpu gpu() {
  Gpu gpu;
  describe_device(gpu.capability, gpu.multiprocessors, gpu.shared_bytes);
  return gpu;
}

}  // namespace bitfold::cuda
