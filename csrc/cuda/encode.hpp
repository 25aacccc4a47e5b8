// What the encoders' kernels share: numbers of the weight, and the first fault, whatever the order of the threads.
#pragma once

#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
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

// ---- the weight as fp32 ----

BITFOLD_DEVICE float read_float(const MatrixIn& in, int64_t at) {
  switch (in.dtype) {
    case DType::F32: return static_cast<const float*>(in.data)[at];
    case DType::F16: return half_to_float(static_cast<const uint16_t*>(in.data)[at]);
    case DType::BF16: return bf16_to_float(static_cast<const uint16_t*>(in.data)[at]);
    default: return static_cast<float>(static_cast<const double*>(in.data)[at]);
  }
}

// out[i] = the number at `at` + i step, for `count` <= Count of them; the others are 0. The loads are independent, and
// all of them are on their way together.
template <int Count>
BITFOLD_DEVICE void read_floats(const MatrixIn& in, int64_t at, int64_t step, int count, float (&out)[Count]) {
  const auto read = [&](auto number) {
#pragma unroll
    for (int i = 0; i < Count; ++i) out[i] = i < count ? number(at + i * step) : 0.0f;
  };
  const auto* halves = static_cast<const uint16_t*>(in.data);
  switch (in.dtype) {
    case DType::F32: return read([&](int64_t i) { return static_cast<const float*>(in.data)[i]; });
    case DType::F16: return read([&](int64_t i) { return half_to_float(halves[i]); });
    case DType::BF16: return read([&](int64_t i) { return bf16_to_float(halves[i]); });
    default: return read([&](int64_t i) { return static_cast<float>(static_cast<const double*>(in.data)[i]); });
  }
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
