// Included by every kernel body: what the simd header, included before it, does not give. The build compiles each body
// once for each instruction set, with BITFOLD_ISA_NAME set to its name.
#pragma once

#include "cpu/kernels.hpp"
#include "formats/codec.hpp"

// fill_<kernel>_<isa>: puts the kernels of one body into the table.
#define BITFOLD_JOIN_(a, b, c) a##b##_##c
#define BITFOLD_JOIN(a, b, c) BITFOLD_JOIN_(a, b, c)
#define BITFOLD_ISA(kernel) BITFOLD_JOIN(fill_, kernel, BITFOLD_ISA_NAME)

namespace bitfold::cpu {
namespace {

BITFOLD_SIMD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BITFOLD_SIMD int lowest_one(uint32_t a) { return std::countr_zero(a); }  // a is not 0

// A vector to where an output begins or goes on.
template <Stores To>
BITFOLD_SIMD void put(float* p, F a) {
  if (To == Stores::PastCaches && reinterpret_cast<uintptr_t>(p) % sizeof(F) == 0) stream(p, a);
  else store(p, a);
}

}  // namespace
}  // namespace bitfold::cpu

// csrc/search is written on these lanes.
namespace bitfold::search {
using namespace cpu;
}
