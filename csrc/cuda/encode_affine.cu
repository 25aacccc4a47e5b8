// Q2_K, Q4_K, Q5_K, and with importance Q4_1 and Q5_1, on the GPU.
#include "cuda/encode_blocks.hpp"
#include "search/encode_affine.inl"

namespace bitfold::cuda {
namespace {

template <int Row, bool Weighted>
struct Super {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) { search::encode_super<Row, Weighted>(a); }
};
template <int Row>
struct Small {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float* mean) {
    search::encode_weighted<Row>(a, mean);
  }
};

template <int Row>
void start_super(const char* name, const BlocksArgs& a, Stream stream) {
  if (a.importance != nullptr) start_encoder<Row, Super<Row, true>>(name, a, stream);
  else start_encoder<Row, Super<Row, false>>(name, a, stream);
}

}  // namespace

void encode_affine(int row, const BlocksArgs& a, Stream stream) {
  switch (row) {
    case kQ2K: return start_super<kQ2K>("encode q2_k", a, stream);
    case kQ4K: return start_super<kQ4K>("encode q4_k", a, stream);
    case kQ5K: return start_super<kQ5K>("encode q5_k", a, stream);
    case kQ4_1: return start_encoder<kQ4_1, Small<kQ4_1>>("encode q4_1", a, stream);
    default: return start_encoder<kQ5_1, Small<kQ5_1>>("encode q5_1", a, stream);
  }
}

}  // namespace bitfold::cuda
