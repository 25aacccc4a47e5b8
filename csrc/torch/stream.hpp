// torch's current CUDA stream, found at run time: one module serves torch with and without CUDA.
#pragma once

#include <cstdint>

namespace bitfold::border {

// A cudaStream_t of the device. Where torch doesn't tell it that is an error, never the default stream, which would run
// beside the work that the op depends on.
void* current_stream(int32_t device_index);

}  // namespace bitfold::border
