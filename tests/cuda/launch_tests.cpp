// csrc/cuda/gpu/launch.hpp beside a stand-in for CUDA's run time, which has what the driver remembers of kernels: what
// a launch may rely on while other threads of the host launch too. Each test that fails prints a line.
#include <cstdio>
#include <functional>
#include <map>
#include <utility>

#include "cuda/gpu/launch.hpp"

namespace {

constexpr int kMost = 232448, kWithoutAsking = 49152;  // bytes of shared memory of a block of an H200

// ---- what the driver remembers ----

int device = 0, most[] = {kMost, 101376};
cudaError_t last_error = cudaSuccess;
std::map<std::pair<int, const void*>, int> allowed;  // bytes of shared memory
std::function<void()> between;                       // runs once, when a launch has asked for its memory
int launched = 0;

cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return failed(cudaErrorInvalidValue);
  *value = most[number];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > most[device]) return failed(cudaErrorInvalidValue);
  allowed[{device, kernel}] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  if (between) std::exchange(between, nullptr)();
  const auto found = allowed.find({device, kernel});
  const int may = found == allowed.end() ? kWithoutAsking : found->second;
  if (how->dynamicSmemBytes > static_cast<size_t>(may)) return failed(cudaErrorInvalidValue);
  ++launched;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
}

namespace {

using namespace bitfold::cuda;

void kernel(int) {}

// What went wrong, or nothing.
std::string start(int64_t shared_bytes) {
  try {
    launch({.grid = dim3(1), .block = dim3(32), .shared_bytes = shared_bytes, .name = "kernel", .stream = nullptr},
           kernel, 1);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

int failures = 0;
void expect(const std::string& is, const std::string& expected, const char* of) {
  if (is == expected) return;
  std::printf("%s: '%s', expected '%s'\n", of, is.c_str(), expected.c_str());
  ++failures;
}

}  // namespace

int main() {
  for (const int64_t other : {0, kWithoutAsking, 60000, 225408}) {
    between = [=] { expect(start(other), "", "a launch by another thread"); };
    expect(start(213120), "", "a launch, when another thread's came between");
    expect(start(225408), "", "a larger launch, afterwards");
  }
  expect(std::to_string(launched), "12", "launches");

  device = 1;  // which is another kind of GPU
  expect(start(60000), "", "a launch on another device");
  expect(start(kMost), "kernel: invalid argument", "a launch that wants more than there is");
  expect(last_error == cudaSuccess ? "" : "an error is left", "", "after an error");
  expect(start(most[1]), "", "a launch that wants all that there is");
  return failures > 0 ? 1 : 0;
}
