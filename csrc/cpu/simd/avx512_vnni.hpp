// AVX-512 with VNNI: the same lanes, and products of bytes in one instruction (compiled with -mavx512vnni).
#pragma once

#include "cpu/simd/avx512.hpp"
