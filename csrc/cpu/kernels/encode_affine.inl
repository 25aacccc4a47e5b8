// Blocks with a scale and a minimum for each sub-block, found by a search over both: Q2_K, Q4_K, Q5_K, and with
// importance Q4_1 and Q5_1.
#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_affine)(Kernels&) {}

}  // namespace bitfold::cpu
