// GGUF's blocks, whose encoders search for their scales.
#pragma once

#include "formats/args.hpp"

namespace bitfold::cpu {

EncodeStatus encode_blocks(const EncodeArgs& args);

}  // namespace bitfold::cpu
