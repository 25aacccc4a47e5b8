// Activations of 8-bit floats: rounding rows of x, and the product with them.
#pragma once

#include "formats/fp8.hpp"

namespace bitfold::cpu {

void round_fp8(const RoundFp8Args& args);
void linear_fp8(const LinearFp8Args& args);

}  // namespace bitfold::cpu
