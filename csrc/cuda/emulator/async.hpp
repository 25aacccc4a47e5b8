// What the twins of Hopper's asynchronous instructions ask of the run time (barriers.cpp, wgmma.cpp).
#pragma once

#include <cstdint>

#include "cuda/emulator/runtime.hpp"

namespace bitfold::cuda {

// Boxes of lines of bytes (gpu/launch.hpp), and what a kernel is given of them.
inline constexpr int kBoxBytes = 128;
struct ByteMatrix {
  const void* data;
  int64_t lines, bytes, line_bytes;
  int box_lines;
};
struct alignas(64) TensorMap {
  ByteMatrix matrix;
};

}  // namespace bitfold::cuda

namespace bitfold::cuda::emulator {

// ---- barriers in shared memory, and copies that arrive at them ----

void barrier_init(void* barrier, unsigned arrivals, const Where& where);
void fence_barrier_init();
void barrier_arrive(void* barrier, unsigned bytes, const char* name, const Where& where);  // and expects the bytes
void barrier_wait(void* barrier, unsigned parity, const Where& where);
void cp_async_arrive(void* barrier, const Where& where);
void copy_bulk(void* shared, const void* global, unsigned bytes, void* barrier, const Where& where);
void check_matrix(const ByteMatrix& matrix);
void copy_box(void* shared, const TensorMap& map, int byte, int line, void* barrier, const Where& where);
void fence_async();

// ---- warpgroups ----

uint64_t wgmma_matrix(const void* shared, int leading_bytes, int stride_bytes, const Where& where);
uint64_t wgmma_box(const void* shared, const Where& where);
void wgmma_fence(const Where& where);
void wgmma_commit(const Where& where);
void wgmma_wait(int groups, const Where& where);

// One lane's part of a product of 64 x 16 by 16 x n halves; without registers of A of 64 x 32 by 32 x n bytes.
struct Product {
  void* d;            // n / 2 floats, or ints
  const uint32_t* a;  // 4, or null
  uint64_t b;
  int n;
  bool accumulate;
  uint64_t a_matrix = 0;

  bool of_bytes() const { return a == nullptr; }
};
void wgmma(const Product& product, const Where& where);

void registers(int count, bool up, const Where& where);

}  // namespace bitfold::cuda::emulator
