// Q3_K, Q6_K, and with importance Q4_0 and Q5_0: the encoders of csrc/search on these lanes.
#include "cpu/isa.hpp"
#include "search/encode_symmetric.inl"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_blocks_symmetric)(Kernels& kernels) {
  kernels.encode_blocks[kQ3K] = search::encode_q3_k;
  kernels.encode_blocks[kQ6K] = search::encode_q6_k<false>;
  kernels.encode_blocks_weighted[kQ3K] = search::encode_q3_k_weighted;
  kernels.encode_blocks_weighted[kQ6K] = search::encode_q6_k<true>;
  kernels.encode_blocks_weighted[kQ4_0] = search::encode_weighted<kQ4_0, 8>;
  kernels.encode_blocks_weighted[kQ5_0] = search::encode_weighted<kQ5_0, 16>;
}

}  // namespace bitfold::cpu
