// What the CUDA backend offers for the packed KV cache, beside cuda.hpp, whose rules hold here too.
#pragma once

#include "cuda/cuda.hpp"
#include "formats/kv.hpp"

namespace bitfold::cuda {

void kv_pack(const KvPackArgs& args, Stream stream);

// `pages` and `exact` are the host's, and read before this returns; what they point to is the device's.
void kv_unpack(const KvUnpackArgs& args, Stream stream);

// Bytes of device memory that kv_attention needs beside its arguments; their contents don't matter.
int64_t kv_attention_workspace(const KvAttentionArgs& args);
// `pages` are the host's, and read before this returns; what they point to is the device's.
void kv_attention(const KvAttentionArgs& args, void* workspace, Stream stream);

}  // namespace bitfold::cuda
