// What the encoders' kernels share: the first fault, whatever the order of the threads.
#pragma once

#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
#include "cuda/matrix.hpp"
#include "search/grid.hpp"

namespace bitfold::cuda {

// What could not be encoded. `first` is the smallest of fault_keys, all ones where there is none.
struct Faults {
  unsigned long long first;
  unsigned long long overflows;  // of casts
  EncodeStatus status;           // of the first, filled in when there is one
};

// Orders faults as the CPU does: a weight that is not finite comes before everything else, then the place counts.
BITFOLD_HOST_DEVICE constexpr unsigned long long fault_key(bool not_finite, int64_t place) {
  return static_cast<unsigned long long>(place) | (not_finite ? 0ull : 1ull << 63);
}
BITFOLD_DEVICE void add_fault(Faults* faults, bool not_finite, const MatrixIn& w, int64_t row, int64_t column) {
  ptx::atomic_min(&faults->first, fault_key(not_finite, row * w.columns + column));
}

// ---- what the driver knows of the units ----

// Blocks of threads that go over `count` pieces of work, `each` at a time, in steps of the grid.
constexpr unsigned grid_for(int64_t count, int64_t each) {
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned>(smaller(ceil_div(count, each), kMost));
}

// GGUF's blocks: row_means has the mean of each row's squares where block_row_means asks for it.
bool block_row_means(const EncodeArgs& args);
void encode_blocks(const EncodeArgs& args, float* row_means, Faults* faults, Stream stream);

}  // namespace bitfold::cuda
