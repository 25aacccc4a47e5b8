// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4: the encoders of csrc/search on these lanes.
#include "cpu/isa.hpp"
#include "search/encode_legacy.inl"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_blocks_legacy)(Kernels& kernels) {
  kernels.encode_ranges[kQ4_0] = search::encode_centred<kQ4_0, 8>;
  kernels.encode_ranges[kQ4_1] = search::encode_ranged<kQ4_1, 15>;
  kernels.encode_ranges[kQ5_0] = search::encode_centred<kQ5_0, 16>;
  kernels.encode_ranges[kQ5_1] = search::encode_ranged<kQ5_1, 31>;
  kernels.encode_ranges[kQ8_0] = search::encode_q8_0;
  kernels.encode_ranges[kMxfp4] = search::encode_mxfp4;
}

}  // namespace bitfold::cpu
