// Q2_K, Q4_K, Q5_K, and with importance Q4_1 and Q5_1: the encoders of csrc/search on these lanes.
#include "cpu/isa.hpp"
#include "search/encode_affine.inl"

namespace bitfold::cpu {

void BITFOLD_ISA(encode_blocks_affine)(Kernels& kernels) {
  kernels.encode_blocks[kQ2K] = search::encode_super<kQ2K, false>;
  kernels.encode_blocks[kQ4K] = search::encode_super<kQ4K, false>;
  kernels.encode_blocks[kQ5K] = search::encode_super<kQ5K, false>;
  kernels.encode_blocks_weighted[kQ2K] = search::encode_super<kQ2K, true>;
  kernels.encode_blocks_weighted[kQ4K] = search::encode_super<kQ4K, true>;
  kernels.encode_blocks_weighted[kQ5K] = search::encode_super<kQ5K, true>;
  kernels.encode_blocks_weighted[kQ4_1] = search::encode_weighted<kQ4_1>;
  kernels.encode_blocks_weighted[kQ5_1] = search::encode_weighted<kQ5_1>;
}

}  // namespace bitfold::cpu
