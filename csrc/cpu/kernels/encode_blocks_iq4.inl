// IQ4_NL and IQ4_XS: the encoders of csrc/search on these lanes.
#include "cpu/isa.hpp"
#include "search/encode_iq4.inl"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_blocks_iq4)(Kernels& kernels) {  // with importance and without
  kernels.encode_blocks[kIq4Nl] = search::encode_iq4_nl;
  kernels.encode_blocks[kIq4Xs] = search::encode_iq4_xs;
}

}  // namespace bitfold::cpu
