// The host's side. Device memory is the host's own, and a launch has happened when it returns, but where a test wants
// it otherwise (Config::ahead). Twin: gpu/launch.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>

#include "cuda/emulator/async.hpp"
#include "cuda/emulator/device.hpp"

namespace bitfold::cuda {

using Stream = void*;

struct Launch {
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  const char* name;
  Stream stream;
  bool early = false;
};

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> parameters;
  };
  const emulator::Shape shape{.grid = how.grid,
                              .block = how.block,
                              .shared_bytes = how.shared_bytes,
                              .parameter_bytes = (int64_t{0} + ... + int64_t{sizeof(Parameters)}),
                              .name = how.name,
                              .early = how.early};
  emulator::run(
      shape,
      [](void* context) {
        const Call& c = *static_cast<const Call*>(context);
        std::apply(c.kernel, c.parameters);
      },
      std::make_shared<Call>(Call{kernel, {arguments...}}));
}

inline TensorMap tensor_map(const ByteMatrix& matrix) {
  emulator::check_matrix(matrix);
  return {matrix};
}

// The device that is emulated: by default as large as an H200.
inline void describe_device(int& capability, int& multiprocessors, int64_t& shared_bytes) {
  capability = emulator::config().capability;
  multiprocessors = emulator::config().multiprocessors;
  shared_bytes = emulator::config().shared_bytes;
}

inline bool driver_knows_early_launches() { return true; }

inline void fill(void* device, uint8_t byte, int64_t bytes, Stream) {
  emulator::synchronize();
  std::memset(device, byte, static_cast<size_t>(bytes));
}
inline void clear(void* device, int64_t bytes, Stream stream) { fill(device, 0, bytes, stream); }

inline void read_back(void* host, const void* device, int64_t bytes, Stream) {
  emulator::synchronize();
  std::memcpy(host, device, static_cast<size_t>(bytes));
}

}  // namespace bitfold::cuda
