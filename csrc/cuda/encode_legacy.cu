// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4, whose scale follows from their range, on the GPU.
#include "cuda/encode_blocks.hpp"
#include "search/encode_legacy.inl"

namespace bitfold::cuda {
namespace {

template <int Row>
struct Ranged {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) {
    if constexpr (Row == kQ4_0) search::encode_centred<Row, 8>(a);
    else if constexpr (Row == kQ5_0) search::encode_centred<Row, 16>(a);
    else if constexpr (Row == kQ4_1) search::encode_ranged<Row, 15>(a);
    else if constexpr (Row == kQ5_1) search::encode_ranged<Row, 31>(a);
    else if constexpr (Row == kQ8_0) search::encode_q8_0(a);
    else search::encode_mxfp4(a);
  }
};

}  // namespace

void encode_legacy(int row, const BlocksArgs& a, Stream stream) {
  switch (row) {
    case kQ4_0: return start_encoder<kQ4_0, Ranged<kQ4_0>>("encode q4_0", a, stream);
    case kQ4_1: return start_encoder<kQ4_1, Ranged<kQ4_1>>("encode q4_1", a, stream);
    case kQ5_0: return start_encoder<kQ5_0, Ranged<kQ5_0>>("encode q5_0", a, stream);
    case kQ5_1: return start_encoder<kQ5_1, Ranged<kQ5_1>>("encode q5_1", a, stream);
    case kQ8_0: return start_encoder<kQ8_0, Ranged<kQ8_0>>("encode q8_0", a, stream);
    default: return start_encoder<kMxfp4, Ranged<kMxfp4>>("encode mxfp4", a, stream);
  }
}

}  // namespace bitfold::cuda
