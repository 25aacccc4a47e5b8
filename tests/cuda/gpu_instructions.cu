// Hopper's instructions on a Hopper: the product of emulator_wgmma.cpp, whose layouts and waits are as the PTX ISA's
// text says, against float64. Whole numbers are exact.
//
//   nvcc -std=c++20 --expt-relaxed-constexpr -arch=sm_90a -Icsrc tests/cuda/gpu_instructions.cu -o gpu_instructions
#include <cstdio>
#include <random>

#include "wgmma_kernel.hpp"

namespace bitfold::cuda::test {
namespace {

template <class T>
struct OnGpu {
  T* data = nullptr;
  explicit OnGpu(const T* host, size_t count) : bytes(count * sizeof(T)) {
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    check(cudaMemcpy(data, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  ~OnGpu() { cudaFree(data); }
  void fetch(T* host) const { check(cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy"); }
  size_t bytes;
};

template <int N, Mistake M = Mistake::None>
double run(bool accumulate, Way way, const std::function<float()>& draw) {
  Data<N> data(accumulate, draw);
  const OnGpu<uint32_t> a(data.a.data(), data.a.size());
  const OnGpu<uint8_t> x(data.start(), kSteps * N * kDepth * 2);
  const OnGpu<float> d(data.d.data(), data.d.size());
  launch({dim3(1), dim3(256), sizeof(Room<N>), "multiply", nullptr}, multiply<N, M>,
         Job{a.data, x.data, d.data, accumulate, way});
  d.fetch(data.d.data());
  return data.distance();
}

bool report(const char* what, double distance, double most) {
  std::printf("%-60s %.3g%s\n", what, distance, distance <= most ? "" : "  WRONG");
  return distance <= most;
}

template <int N>
bool all_ways() {
  std::mt19937 random(1);
  const std::function<float()> integers = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };
  const std::function<float()> floats = [&] { return static_cast<float>(random() % 2048) / 1024.0f - 1.0f; };
  const char* names[] = {"copy_bulk", "cp_async", "cp_async_arrive"};
  bool right = true;
  for (const Way way : kWays) {
    for (const bool accumulate : {false, true}) {
      const std::string what =
          "N " + std::to_string(N) + ", " + names[static_cast<int>(way)] + (accumulate ? ", onto sums" : "");
      right &= report((what + ", integers").c_str(), run<N>(accumulate, way, integers), 0);
      right &= report((what + ", floats").c_str(), run<N>(accumulate, way, floats), 1e-5);
    }
  }
  if (!right)
    report("with the offsets of the matrix changed over", run<N, Mistake::SwappedOffsets>(false, Way::Bulk, integers),
           0);
  return right;
}

}  // namespace
}  // namespace bitfold::cuda::test

int main() {
  try {
    const bool right = bitfold::cuda::test::all_ways<64>() & bitfold::cuda::test::all_ways<128>();
    std::puts(right ? "all right" : "some are wrong");
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 2;
  }
}
