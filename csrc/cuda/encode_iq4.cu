// IQ4_NL and IQ4_XS on the GPU, with importance and without.
#include "cuda/encode_blocks.hpp"
#include "search/encode_iq4.inl"

namespace bitfold::cuda {
namespace {

struct Iq4Nl {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) { search::encode_iq4_nl(a); }
};
struct Iq4Xs {
  BITFOLD_DEVICE static void run(const EncodeBlocksArgs& a, const float*) { search::encode_iq4_xs(a); }
};

}  // namespace

void encode_iq4(int row, const BlocksArgs& a, Stream stream) {
  if (row == kIq4Nl) return start_encoder<kIq4Nl, Iq4Nl>("encode iq4_nl", a, stream);
  start_encoder<kIq4Xs, Iq4Xs>("encode iq4_xs", a, stream);
}

}  // namespace bitfold::cuda
