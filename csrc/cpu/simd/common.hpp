// What the instruction sets share.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined and with internal linkage: nothing that is built for one instruction set may be linked into another's.
#define BITFOLD_SIMD [[gnu::always_inline]] inline
// Before the larger functions of csrc/search, which the compiler may call.
#define BITFOLD_BODY

namespace bitfold::cpu {
namespace {

// Added to a small number, it leaves the nearest whole one, ties to even, in the lowest bits: 1.5 * 2^23.
inline constexpr float kWholes = 12582912.0f;

// Eight codes of Bits bits: the next Bits bytes as one word. (Three bytes are put together in registers: a copy through
// memory of another width stalls.)
template <int Bits>
BITFOLD_SIMD uint32_t load_word(const uint8_t* p) {
  if constexpr (Bits == 3) {
    return p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16;
  } else {
    uint32_t word = 0;
    std::memcpy(&word, p, Bits);
    return word;
  }
}

// Asks the second cache for the line of p, which may lie outside of any memory: the first has too few places for lines
// under way to keep a core's share of the memory busy.
BITFOLD_SIMD void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// The first line of a page waits until its address is translated, for longer than for memory on a virtual machine, and
// what is asked for behind it waits too. So whoever reads or writes in order also asks for a line some pages after p,
// once in each page or more often: one core then reads half as much again.
BITFOLD_SIMD void prefetch_page(const void* p) { prefetch(static_cast<const char*>(p) + 65536); }

}  // namespace
}  // namespace bitfold::cpu
