// Instructions of the GPU, one function each (sm_80 and newer). Twin: emulator/ptx.hpp.
#pragma once

#include "cuda/gpu/ptx_memory.hpp"
#include "cuda/gpu/ptx_mma.hpp"
#include "cuda/gpu/ptx_numbers.hpp"
#include "cuda/gpu/ptx_warp.hpp"
