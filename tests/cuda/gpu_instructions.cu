// Hopper's instructions on a Hopper: the product of emulator_wgmma.cpp, whose layouts and waits are as the PTX ISA's
// text says, against float64, and that of emulator_boxes.cpp. Whole numbers are exact.
//
//   nvcc -std=c++20 --expt-relaxed-constexpr -arch=sm_90a -Icsrc tests/cuda/gpu_instructions.cu -o gpu_instructions
#include <cstdio>
#include <random>

#include "box_kernel.hpp"
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

// Shows which it is; both are right.
template <int N>
bool of_small_halves() {
  const std::string what = "N " + std::to_string(N) + ", A too small to be normal: 1e-5 or 5e-7";
  return report(what.c_str(), run<N>(false, Way::Bulk, small_halves_of_a(N)), 1e-4);
}

template <int N>
bool by_boxes() {
  std::mt19937 random(1);
  BoxData<N> data([&] { return static_cast<unsigned>(random()); });
  const OnGpu<uint8_t> a(data.start(data.a), data.a.size() - 16), b(data.start(data.b), data.b.size() - 16);
  const OnGpu<int> d(data.d.data(), data.d.size());
  launch(
      {dim3(1), dim3(128), sizeof(BoxRoom<N>), "multiply_boxes", nullptr}, multiply_boxes<N, BoxMistake::None>,
      BoxJob{tensor_map(data.matrix(a.data, 64)), tensor_map(data.matrix(b.data, N)), data.kByte, data.kLine, d.data});
  d.fetch(data.d.data());
  return report(("N " + std::to_string(N) + ", bytes that come by boxes").c_str(), data.is_right() ? 0 : 1, 0);
}

}  // namespace
}  // namespace bitfold::cuda::test

int main() {
  try {
    using namespace bitfold::cuda::test;
    const bool right =
        all_ways<64>() & all_ways<128>() & of_small_halves<64>() & by_boxes<64>() & by_boxes<128>() & by_boxes<256>();
    std::puts(right ? "all right" : "some are wrong");
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 2;
  }
}
