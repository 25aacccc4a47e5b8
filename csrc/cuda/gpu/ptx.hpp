// Instructions of the GPU, one function each (sm_80 and newer; sm_90a alone: async, wgmma). Twin: emulator/ptx.hpp.
#pragma once

#include "cuda/gpu/ptx_async.hpp"
#include "cuda/gpu/ptx_memory.hpp"
#include "cuda/gpu/ptx_mma.hpp"
#include "cuda/gpu/ptx_numbers.hpp"
#include "cuda/gpu/ptx_warp.hpp"
#include "cuda/gpu/ptx_wgmma.hpp"
