#pragma once

#include "formats/args.hpp"

namespace bitfold::cpu {

// `linear` with activations of 8 bits; w is of blocks.
void linear_int8(const LinearArgs& args);

}  // namespace bitfold::cpu
