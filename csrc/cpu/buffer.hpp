// Scratch memory of a driver, and the loop that its work is cut by.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "cpu/kernels.hpp"
#include "formats/args.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cpu {

// `count` elements on cache lines, uninitialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T), kAlign))) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// parallel_for with a lambda fn(begin, end).
template <class Fn>
void cut(ParallelFor parallel_for, int64_t count, int64_t grain, const Fn& fn) {
  if (count <= 0) return;
  const auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Fn*>(context))(begin, end); };
  parallel_for(count, grain, body, const_cast<Fn*>(&fn));
}

// Ranges of [0, count) that threads take as they get free: one that the machine slows down holds up nobody. `work` is
// called once by each thread, with next(begin, end), which is false when nothing is left.
template <class Work>
void share(ParallelFor parallel_for, int64_t count, int64_t block, const Work& work) {
  const int64_t blocks = ceil_div(count, block);
  std::atomic<int64_t> taken{0};
  cut(parallel_for, blocks, 1, [&](int64_t, int64_t) {
    work([&](int64_t* begin, int64_t* end) {
      const int64_t mine = taken.fetch_add(1, std::memory_order_relaxed);
      *begin = mine * block;
      *end = count < *begin + block ? count : *begin + block;
      return mine < blocks;
    });
  });
}

// Rows of about this many elements are worth a thread's attention.
inline constexpr int64_t kGrainElements = 32768;
constexpr int64_t grain_rows(int64_t elements_per_row) {
  return elements_per_row >= kGrainElements ? 1 : kGrainElements / (elements_per_row > 0 ? elements_per_row : 1);
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

constexpr int64_t dtype_bytes(DType dtype) { return dtype_bits(dtype) / 8; }

// One row of a strided matrix as fp32.
inline void read_row(const Kernels& kernels, const MatrixIn& in, int64_t row, float* to) {
  const int64_t size = dtype_bytes(in.dtype);
  const auto* from = static_cast<const char*>(in.data) + row * in.row_stride * size;
  if (in.column_stride == 1) {
    kernels.to_float(from, in.dtype, in.columns, to);
  } else {
    for (int64_t i = 0; i < in.columns; ++i) kernels.to_float(from + i * in.column_stride * size, in.dtype, 1, to + i);
  }
}

// One row as double, for the floor.
inline void read_row(const MatrixIn& in, int64_t row, double* to) {
  for (int64_t i = 0; i < in.columns; ++i) {
    const int64_t at = row * in.row_stride + i * in.column_stride;
    switch (in.dtype) {
      case DType::F64: to[i] = static_cast<const double*>(in.data)[at]; break;
      case DType::F32: to[i] = static_cast<const float*>(in.data)[at]; break;
      case DType::BF16: to[i] = bf16_to_float(static_cast<const uint16_t*>(in.data)[at]); break;
      default: to[i] = half_to_float(static_cast<const uint16_t*>(in.data)[at]); break;
    }
  }
}

// Element i of an array of `dtype`.
inline void store_double(DType dtype, void* to, int64_t i, double value) {
  switch (dtype) {
    case DType::F64: static_cast<double*>(to)[i] = value; break;
    case DType::F32: static_cast<float*>(to)[i] = static_cast<float>(value); break;
    case DType::BF16: static_cast<uint16_t*>(to)[i] = float_to_bf16(static_cast<float>(value)); break;
    default: static_cast<uint16_t*>(to)[i] = float_to_half(static_cast<float>(value)); break;
  }
}

// Columns [begin, end) of matrix row `row`, whatever the layout.
inline void decode_row(const Kernels& kernels, const Weight& w, int64_t row, int64_t begin, int64_t end, float* to,
                       Stores stores = Stores::Cached) {
  const bool flat = w.layout == Layout::Flat;
  const int64_t shift = flat ? row * w.k : 0;
  kernels.decode_span[w.format.row](w, flat ? 0 : row, shift + begin, shift + end, to, stores);
}

}  // namespace bitfold::cpu
