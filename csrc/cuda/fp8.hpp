// What the CUDA backend offers for activations of 8-bit floats, beside cuda.hpp, whose rules hold here too. The product
// is torch's (csrc/torch/fp8.cpp).
#pragma once

#include "cuda/cuda.hpp"
#include "formats/fp8.hpp"

namespace bitfold::cuda {

void round_fp8(const RoundFp8Args& args, Stream stream);

}  // namespace bitfold::cuda
