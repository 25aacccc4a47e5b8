// Blocks with signed scales, found by a search: Q3_K, Q6_K, and with importance Q4_0 and Q5_0.
#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_symmetric)(Kernels&) {}

}  // namespace bitfold::cpu
