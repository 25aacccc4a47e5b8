#pragma once

#include "cpu/kernels.hpp"
#include "formats/args.hpp"

namespace bitfold::cpu {

// `linear` with x rounded as `kernel` does, to 8 or 16 bits; w is of blocks.
void linear_int8(const LinearArgs& args, const Int8Kernel& kernel);

}  // namespace bitfold::cpu
