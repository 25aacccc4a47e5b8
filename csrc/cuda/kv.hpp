// What the CUDA backend offers for the packed KV cache, beside cuda.hpp, whose rules hold here too.
#pragma once

#include "cuda/cuda.hpp"
#include "formats/kv.hpp"

namespace bitfold::cuda {

void kv_pack(const KvPackArgs& args, Stream stream);

}  // namespace bitfold::cuda
