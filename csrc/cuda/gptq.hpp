// What the CUDA backend offers GPTQ, beside cuda.hpp, whose rules hold here too: the loop over columns,
// and the search for the steps of groups. The factor of the Hessian is torch's to make on a GPU
// (python/bitfold/quantizers/gptq.py).
#pragma once

#include "cuda/cuda.hpp"
#include "formats/gptq.hpp"

namespace bitfold::cuda {

// Bytes of device memory that gptq_columns needs beside its arguments, where it has no errors to hand out.
int64_t gptq_columns_workspace(const GptqColumnsArgs& args);
void gptq_columns(const GptqColumnsArgs& args, void* workspace, Stream stream);
void search_steps(const StepSearchArgs& args, Stream stream);

}  // namespace bitfold::cuda
