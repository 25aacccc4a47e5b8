// What the CPU backend offers: one function an op. Arguments were checked at the border (csrc/torch).
#pragma once

#include "formats/args.hpp"
#include "formats/int8.hpp"

namespace bitfold::cpu {

EncodeStatus encode(const EncodeArgs& args);
void decode(const DecodeArgs& args);
void linear(const LinearArgs& args);
void linear_grad_x(const LinearGradArgs& args);
void linear_int8(const LinearInt8Args& args);
void pack(const PackArgs& args);
void unpack(const PackArgs& args);

}  // namespace bitfold::cpu
