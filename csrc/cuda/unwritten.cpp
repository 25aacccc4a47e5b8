// What has no kernel yet. Whoever writes one removes its line here; with the last line goes the file.
#include <stdexcept>

#include "cuda/kernels.hpp"

namespace bitfold::cuda {

#define BITFOLD_UNWRITTEN(result, name, ...) \
  result name(__VA_ARGS__) { throw std::runtime_error(#name " has no CUDA kernel yet"); }

BITFOLD_UNWRITTEN(int64_t, linear_tile_workspace, const LinearArgs&)
BITFOLD_UNWRITTEN(void, linear_tile, const LinearArgs&, void*, Stream)

}  // namespace bitfold::cuda
