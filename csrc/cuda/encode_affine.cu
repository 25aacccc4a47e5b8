// Q2_K, Q4_K, Q5_K, and with importance Q4_1 and Q5_1, on the GPU.
#include "cuda/encode_blocks.hpp"
#include "search/encode_affine.inl"

namespace bitfold::cuda {
namespace {

// Shared memory, not registers, says how many of these threads a multiprocessor has: both searches share a kernel.
template <int Row>
struct Super {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) {
    if (a.importance != nullptr) search::encode_super<Row, true>(a);
    else search::encode_super<Row, false>(a);
  }
};
template <int Row>
struct Small {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float* mean) {
    search::encode_weighted<Row>(a, mean);
  }
};

}  // namespace

void encode_affine(int row, const BlocksArgs& a, Stream stream) {
  switch (row) {
    case kQ2K: return start_encoder<kQ2K, Super<kQ2K>>("encode q2_k", a, stream);
    case kQ4K: return start_encoder<kQ4K, Super<kQ4K>>("encode q4_k", a, stream);
    case kQ5K: return start_encoder<kQ5K, Super<kQ5K>>("encode q5_k", a, stream);
    case kQ4_1: return start_encoder<kQ4_1, Small<kQ4_1>>("encode q4_1", a, stream);
    default: return start_encoder<kQ5_1, Small<kQ5_1>>("encode q5_1", a, stream);
  }
}

}  // namespace bitfold::cuda
