// What the CUDA backend offers for x rounded to 8 bits, row by row (formats/int8.hpp), beside cuda.hpp, whose rules
// hold here too. x is fp32, bf16 or fp16.
#pragma once

#include "cuda/cuda.hpp"
#include "formats/int8.hpp"

namespace bitfold::cuda {

// Bytes of device memory that linear_int8 needs beside its arguments, on 256-byte boundaries; their contents don't
// matter.
int64_t linear_int8_workspace(const LinearInt8Args& args);
// The CPU's bits. Numbers of columns that aren't ascending and below k end in a trap of the device.
void linear_int8(const LinearInt8Args& args, void* workspace, Stream stream);

}  // namespace bitfold::cuda
