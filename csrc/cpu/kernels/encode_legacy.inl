// Blocks whose scale follows from their range: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4.
#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_legacy)(Kernels&) {}

}  // namespace bitfold::cpu
