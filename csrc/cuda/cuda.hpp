// What the CUDA backend offers: one function an op. Arguments were checked at the border (csrc/torch); all pointers in
// them are the device's, of the current device, and parallel_for is unused. Everything is queued on the stream, and
// nothing waits for it but encode. What a GPU refuses is a std::runtime_error of one sentence.
#pragma once

#include "formats/args.hpp"

namespace bitfold::cuda {

using Stream = void*;  // a cudaStream_t

struct Gpu {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
  bool wgmma;            // the GPU has it, and this build code for it
  bool early;            // kernels may begin before those ahead of them have ended (Launch::early)
};
// The current device.
Gpu gpu();

// Bytes of device memory that encode needs beside its arguments; their contents don't matter.
int64_t encode_workspace(const EncodeArgs& args);
// Waits for the GPU: it has to say what it could not encode.
EncodeStatus encode(const EncodeArgs& args, void* workspace, Stream stream);
// Row numbers beyond the matrix end in a trap of the device.
void decode(const DecodeArgs& args, Stream stream);
void pack(const PackArgs& args, Stream stream);
void unpack(const PackArgs& args, Stream stream);

// Bytes of device memory that linear needs beside its arguments, on 256-byte boundaries; their contents don't matter.
int64_t linear_workspace(const LinearArgs& args);
// Every regime of the plan but Matmul, which is the border's: decode, and torch's product.
void linear(const LinearArgs& args, void* workspace, Stream stream);
void linear_grad_x(const LinearGradArgs& args, Stream stream);

}  // namespace bitfold::cuda
