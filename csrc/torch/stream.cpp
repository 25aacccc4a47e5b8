#include "torch/stream.hpp"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

// In torch's header only where CUDA's headers are.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace bitfold::border {
namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

// torch loads its libraries for itself alone (RTLD_LOCAL). Through the umbrella library that this module depends on the
// symbol is seen all the same, unless the umbrella that was there when it was loaded had no CUDA: then the library is
// asked.
GetStream find() {
  if (&aoti_torch_get_current_cuda_stream != nullptr) return &aoti_torch_get_current_cuda_stream;
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

void* current_stream(int32_t device_index) {
  static const GetStream get = find();
  void* stream = nullptr;
  if (get == nullptr || get(device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch does not tell its current CUDA stream (aoti_torch_get_current_cuda_stream)");
  }
  return stream;
}

}  // namespace bitfold::border
