// Q3_K, Q6_K, and with importance Q4_0 and Q5_0, on the GPU.
#include "cuda/encode_blocks.hpp"
#include "search/encode_symmetric.inl"

namespace bitfold::cuda {
namespace {

// Shared memory, not registers, says how many of these threads a multiprocessor has: both searches share a kernel.
struct Q3K {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) {
    if (a.importance != nullptr) search::encode_q3_k_weighted(a);
    else search::encode_q3_k(a);
  }
};
struct Q6K {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) {
    if (a.importance != nullptr) search::encode_q6_k<true>(a);
    else search::encode_q6_k<false>(a);
  }
};
template <int Row, int N>
struct Small {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float* mean) {
    search::encode_weighted<Row, N>(a, mean);
  }
};

}  // namespace

void encode_symmetric(int row, const BlocksArgs& a, Stream stream) {
  switch (row) {
    case kQ3K: return start_encoder<kQ3K, Q3K>("encode q3_k", a, stream);
    case kQ6K: return start_encoder<kQ6K, Q6K>("encode q6_k", a, stream);
    case kQ4_0: return start_encoder<kQ4_0, Small<kQ4_0, 8>>("encode q4_0", a, stream);
    default: return start_encoder<kQ5_0, Small<kQ5_0, 16>>("encode q5_0", a, stream);
  }
}

}  // namespace bitfold::cuda
