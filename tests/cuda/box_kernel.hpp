// A product of bytes that come by boxes, and its data: for the emulator's tests (emulator_boxes.cpp) and for a GPU
// (gpu_instructions.cu).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/device.hpp"

namespace bitfold::cuda::test {

// What is wrong with a kernel: where a box goes, the bytes that are waited for, where wgmma begins to read.
enum class BoxMistake { None, Place, FewerBytes, MoreBytes, Start, NoWait };

template <int N>
struct BoxRoom {
  alignas(1024) uint8_t a[64][kBoxBytes];
  alignas(1024) uint8_t b[N][kBoxBytes];
  ptx::Barrier full;
};

struct BoxJob {
  TensorMap a, b;  // 64 lines, and N
  int byte, line;  // of both, where their boxes begin
  int* d;          // [thread][N / 2]
};

template <int N, BoxMistake M>
__global__ void __launch_bounds__(128, 1) multiply_boxes(const __grid_constant__ BoxJob job) {
  auto& room = shared<BoxRoom<N>>();
  if (threadIdx.x == 0) {
    ptx::barrier_init(&room.full, 1);
    ptx::fence_barrier_init();
  }
  ptx::sync_block();
  if (threadIdx.x == 0) {
    constexpr unsigned kMore = M == BoxMistake::MoreBytes ? 16 : 0, kFewer = M == BoxMistake::FewerBytes ? 16 : 0;
    ptx::barrier_expect(&room.full, (64 + N) * kBoxBytes + kMore - kFewer);
    ptx::copy_box(room.a[M == BoxMistake::Place ? 4 : 0], job.a, job.byte, job.line, &room.full);
    ptx::copy_box(room.b, job.b, job.byte, job.line, &room.full);
  }
  if (M != BoxMistake::NoWait) ptx::barrier_wait(&room.full, 0);
  int d[N / 2];
  for (int& sum : d) sum = 0;
  ptx::wgmma_keep(d);
  const uint64_t a = ptx::wgmma_box(room.a[M == BoxMistake::Start ? 1 : 0]), b = ptx::wgmma_box(room.b);
  ptx::wgmma_fence();
  for (int at = 0; at < kBoxBytes / 16; at += 2) ptx::wgmma_u8s8<N>(d, a + at, b + at, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_keep(d);
  for (int i = 0; i < N / 2; ++i) job.d[static_cast<int>(threadIdx.x) * (N / 2) + i] = d[i];
}

template <int N>
struct BoxData {
  // Lines of so many bytes, others between them; a box reaches beyond both.
  static constexpr int kLines = 70, kBytes = 200, kStride = 224, kByte = 96, kLine = 16;
  std::vector<uint8_t> a, b;
  std::vector<int> d = std::vector<int>(64 * N), right = d;

  explicit BoxData(const std::function<unsigned()>& draw) : a(kLines * kStride + 16), b(a.size()) {
    for (auto* bytes : {&a, &b})
      std::generate(bytes->begin(), bytes->end(), [&] { return static_cast<uint8_t>(draw()); });
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < N; ++column) {
        int sum = 0;
        for (int k = 0; k < kBoxBytes; ++k) sum += at(start(a), row, k) * static_cast<int8_t>(at(start(b), column, k));
        const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
        right[static_cast<size_t>(thread * (N / 2) + column / 8 * 4 + row / 8 % 2 * 2 + column % 2)] = sum;
      }
    }
  }
  static uint8_t* start(std::vector<uint8_t>& bytes) {
    return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
  }
  static ByteMatrix matrix(const void* data, int lines) { return {data, kLines, kBytes, kStride, lines}; }
  bool is_right() const { return d == right; }

 private:
  // Of a box; what lies beyond the matrix is zero.
  static uint8_t at(const uint8_t* data, int line, int byte) {
    if (kLine + line >= kLines || kByte + byte >= kBytes) return 0;
    return data[(kLine + line) * kStride + kByte + byte];
  }
};

}  // namespace bitfold::cuda::test
