// How fast a GPU reads packed weights, as the kernels for few rows of x ask for them, if nothing else is to be done:
// the time of 8192 rows of 14336 bytes (28672 columns in 4 bits), by order of the pieces, promotion in the second
// cache, and rooms of a ring; and of plain loads, and a copy.
//
//   nvcc -std=c++20 -O3 -arch=sm_90a bench/gpu/reading.cu -o reading && ./reading
//
// 16 warps on each multiprocessor have a ring of rooms of 2 KB each, and go through tiles of 16 rows. A piece is
//   slices: 128 bytes of each of the 16 rows, of a sixteenth of the columns that is the warp's;
//   beside: the same, where the pieces of all warps are 2 KB of each row on end;
//   row:    2 KB of one row, which is the warp's.
// A block has tiles that follow one another (together), or every so many-th (strided). Matrices are used in turn, so
// that no cache answers; behind `x4` four of them are one.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kWarp = 32, kWarps = 16, kTileRows = 16, kPiece = 2048;
constexpr int kRows = 8192, kRowBytes = 14336, kMatrices = 4;
constexpr size_t kBytes = size_t{kRows} * kRowBytes;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

enum class Order { Slices, Beside, Row };

struct Work {
  const char* w;
  int tiles, rooms;
  bool strided;
  unsigned* out;  // never written, but the compiler doesn't know
};

template <int Promotion>
__device__ void copy(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Promotion == 0) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else if constexpr (Promotion == 128) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  }
}
// All but the newest `pending` groups of copies.
__device__ void wait(int pending) {
  switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
  }
}

constexpr int kPieces = kRowBytes / kPiece;  // of a tile, for a warp

// The i-th 16 bytes of a lane in a piece.
template <Order O>
__device__ const char* place(const Work& work, int tile, int warp, int piece, int lane, int i) {
  const char* rows = work.w + size_t(tile) * kTileRows * kRowBytes;
  const int row = 4 * i + lane / 8, within = lane % 8 * 16;
  if constexpr (O == Order::Slices) return rows + row * kRowBytes + (warp * kPieces + piece) * 128 + within;
  else if constexpr (O == Order::Beside) return rows + row * kRowBytes + (piece * kWarps + warp) * 128 + within;
  else return rows + warp * kRowBytes + piece * kPiece + i * 512 + lane * 16;
}

template <Order O, int Promotion>
__global__ void __launch_bounds__(kWarp* kWarps, 1) through_rings(Work work) {
  extern __shared__ __align__(128) char memory[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  char* ring = memory + warp * work.rooms * kPiece;
  const auto block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int first = work.strided ? block : work.tiles * block / blocks, step = work.strided ? blocks : 1;
  const int end = work.strided ? work.tiles : work.tiles * (block + 1) / blocks;
  int tile = first, piece = 0, to = 0, from = 0;
  const auto next = [&] {
    if (tile < end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy<Promotion>(ring + to * kPiece + i * 512 + lane * 16, place<O>(work, tile, warp, piece, lane, i));
      }
      if (++piece == kPieces) piece = 0, tile += step;
    }
    asm volatile("cp.async.commit_group;");
    if (++to == work.rooms) to = 0;
  };
  for (int i = 1; i < work.rooms; ++i) next();
  unsigned all = 0;
  const int pieces = (end - first + step - 1) / step * kPieces;
  for (int i = 0; i < pieces; ++i) {
    wait(work.rooms - 2);
    __syncwarp();
    next();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 four = *reinterpret_cast<const uint4*>(ring + from * kPiece + j * 512 + lane * 16);
      all ^= four.x ^ four.y ^ four.z ^ four.w;
    }
    if (++from == work.rooms) from = 0;
  }
  if (all == 0x12345) *work.out = all;
}

template <int Ahead>
__global__ void by_loads(Work work) {
  const auto* w = reinterpret_cast<const uint4*>(work.w);
  const size_t count = size_t(work.tiles) * kTileRows * kRowBytes / 16;
  unsigned all = 0;
  for (size_t i = size_t{blockIdx.x} * blockDim.x * Ahead + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x * Ahead) {
    uint4 four[Ahead] = {};
#pragma unroll
    for (int j = 0; j < Ahead; ++j) {
      if (i + j * blockDim.x < count) four[j] = __ldcs(w + i + j * blockDim.x);
    }
#pragma unroll
    for (int j = 0; j < Ahead; ++j) all ^= four[j].x ^ four[j].y ^ four[j].z ^ four[j].w;
  }
  if (all == 0x12345) *work.out = all;
}

// Microseconds of a call: the median of five times the mean of 16. run(i): with the i-th matrix.
template <class Run>
float microseconds(const Run& run) {
  constexpr int kCalls = 16;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 5; ++i) {
    run(0);
    check(cudaEventRecord(begin));
    for (int call = 0; call < kCalls; ++call) run(call % kMatrices);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaGetLastError());
    float time = 0;
    check(cudaEventElapsedTime(&time, begin, end));
    times.push_back(1000 * time / kCalls);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}
double gigabytes(float time, double bytes) { return bytes / time / 1e3; }

struct Memory {
  char* w;
  unsigned* out;
  int multiprocessors;

  Work work(int i, bool all, int rooms = 0, bool strided = false) const {
    return {w + i * kBytes, (all ? kMatrices : 1) * kRows / kTileRows, rooms, strided, out};
  }
};

template <Order O, int Promotion>
void print_rings(const char* name, const Memory& memory) {
  const auto kernel = through_rings<O, Promotion>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 6 * kWarps * kPiece));
  for (const bool strided : {false, true}) {
    std::printf("%s %3dB %s", name, Promotion, strided ? "strided " : "together");
    for (int rooms = 2; rooms <= 6; ++rooms) {
      const auto run = [&](int i, bool all) {
        kernel<<<memory.multiprocessors, kWarp * kWarps, rooms * kWarps * kPiece>>>(
            memory.work(i, all, rooms, strided));
      };
      const float one = microseconds([&](int i) { run(i, false); }), four = microseconds([&](int) { run(0, true); });
      std::printf("  %d: %.1f %.0f (x4 %.0f)", rooms, one, gigabytes(one, kBytes), gigabytes(four, kMatrices * kBytes));
    }
    std::printf("\n");
  }
}

template <int Ahead>
void print_loads(const Memory& memory) {
  for (const int each : {2, 4, 8}) {
    const float time =
        microseconds([&](int i) { by_loads<Ahead><<<each * memory.multiprocessors, 512>>>(memory.work(i, false)); });
    std::printf("loads, %d ahead, %d blocks a multiprocessor: %.1f %.0f\n", Ahead, each, time, gigabytes(time, kBytes));
  }
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  Memory memory{.w = nullptr, .out = nullptr, .multiprocessors = device.multiProcessorCount};
  char* other = nullptr;
  check(cudaMalloc(&memory.w, kMatrices * kBytes));
  check(cudaMemset(memory.w, 1, kMatrices * kBytes));
  check(cudaMalloc(&other, kBytes));
  check(cudaMalloc(&memory.out, sizeof(unsigned)));
  std::printf("%s\n", device.name);
  const float time = microseconds(
      [&](int i) { check(cudaMemcpyAsync(other, memory.w + i * kBytes, kBytes, cudaMemcpyDeviceToDevice)); });
  std::printf("a copy, read and written: %.1f %.0f\n", time, gigabytes(time, 2 * kBytes));
  print_loads<4>(memory);
  print_loads<8>(memory);
  print_rings<Order::Slices, 0>("slices", memory);
  print_rings<Order::Slices, 128>("slices", memory);
  print_rings<Order::Slices, 256>("slices", memory);
  print_rings<Order::Beside, 0>("beside", memory);
  print_rings<Order::Beside, 256>("beside", memory);
  print_rings<Order::Row, 0>("row   ", memory);
  print_rings<Order::Row, 256>("row   ", memory);
}
