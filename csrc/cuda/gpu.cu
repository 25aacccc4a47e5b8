// The current device.
#include "cuda/architectures.hpp"
#include "cuda/cuda.hpp"
#include "cuda/device.hpp"

namespace bitfold::cuda {

Gpu gpu() {
  Gpu gpu;
  describe_device(gpu.capability, gpu.multiprocessors, gpu.shared_bytes);
  gpu.wgmma = has_wgmma(BITFOLD_CUDA_ARCHITECTURES, gpu.capability);
  gpu.early = has_early(BITFOLD_CUDA_ARCHITECTURES, gpu.capability) && driver_knows_early_launches();
  return gpu;
}

}  // namespace bitfold::cuda
