// Blocks of codes into the uneven levels of IQ4: IQ4_NL and IQ4_XS.
#include "cpu/isa.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_iq4)(Kernels&) {}

}  // namespace bitfold::cpu
