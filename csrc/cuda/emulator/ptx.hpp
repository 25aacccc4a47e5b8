// The GPU's instructions as C++. Twin: gpu/ptx.hpp.
#pragma once

#include "cuda/emulator/ptx_async.hpp"
#include "cuda/emulator/ptx_memory.hpp"
#include "cuda/emulator/ptx_mma.hpp"
#include "cuda/emulator/ptx_numbers.hpp"
#include "cuda/emulator/ptx_warp.hpp"
#include "cuda/emulator/ptx_wgmma.hpp"
