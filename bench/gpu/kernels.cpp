// The kernels for GPUs without torch: encode, decode and linear of the formats, beside a copy within the GPU's memory
// and cuBLAS in bf16. Each case is validated before it is timed.
//
//   cmake -B build-bench -DBITFOLD_BENCH=ON -DBITFOLD_CUDA=on -DBITFOLD_PYTHON=OFF && cmake --build build-bench
//   build-bench/bench/bench_gpu [--grid=quick|full]
//
// A matrix is used again after kRotation bytes of others, so that no cache answers. Times are a CUDA graph's, one call
// for each of the matrices; encode waits for the GPU itself and is timed as its caller sees it.
#include <benchmark/benchmark.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda.hpp"
#include "cuda/plan.hpp"
#include "formats/format.hpp"
#include "formats/numeric.hpp"

namespace {

using namespace bitfold;

constexpr int64_t kRotation = int64_t{256} << 20;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": " + cublasGetStatusString(status));
}

// Device memory.
struct Memory {
  void* data = nullptr;
  int64_t bytes;
  explicit Memory(int64_t size) : bytes(size) {
    check(cudaMalloc(&data, static_cast<size_t>(size + 256)), "cudaMalloc");
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data); }
};
using Owned = std::unique_ptr<Memory>;

cudaStream_t stream() {
  static cudaStream_t made = [] {
    cudaStream_t fresh;
    check(cudaStreamCreateWithFlags(&fresh, cudaStreamNonBlocking), "cudaStreamCreate");
    return fresh;
  }();
  return made;
}

cublasHandle_t blas() {
  static cublasHandle_t made = [] {
    cublasHandle_t fresh;
    check(cublasCreate(&fresh), "cublasCreate");
    check(cublasSetStream(fresh, stream()), "cublasSetStream");
    return fresh;
  }();
  return made;
}

// Sums of four uniform numbers, near enough to weights, as bf16.
std::vector<uint16_t> numbers(int64_t count, uint64_t seed) {
  std::vector<uint16_t> out(static_cast<size_t>(count));
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (uint16_t& value : out) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    int sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int>(state >> (16 * i) & 0xffff) - 0x8000;
    value = float_to_bf16(static_cast<float>(sum) / 32768.0f);
  }
  return out;
}

Owned upload(const std::vector<uint16_t>& host) {
  auto memory = std::make_unique<Memory>(static_cast<int64_t>(2 * host.size()));
  check(cudaMemcpy(memory->data, host.data(), 2 * host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

std::vector<float> download_bf16(const void* data, int64_t count) {
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  check(cudaMemcpy(bits.data(), data, 2 * bits.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::vector<float> out;
  for (uint16_t value : bits) out.push_back(bf16_to_float(value));
  return out;
}

// A weight of bf16, and as many packed copies of it as the rotation needs.
struct Packed {
  Format format;
  int64_t n, k, nbytes;
  std::vector<std::vector<Owned>> copies;
  std::vector<Weight> weights;

  Packed(const Format& f, int64_t rows, int64_t columns, const Memory& source)
      : format(f), n(rows), k(columns), nbytes(stored_bytes(f, rows, columns)) {
    const int64_t count = ceil_div(kRotation, nbytes) + 1;
    for (int64_t i = 0; i < count; ++i) add();
    const EncodeStatus status = encode(source, 0);
    if (status.fault != EncodeFault::None) throw std::runtime_error(to_string(format) + " can't encode the weight");
    for (size_t i = 1; i < copies.size(); ++i) {
      for (size_t p = 0; p < copies[i].size(); ++p) {
        check(cudaMemcpy(copies[i][p]->data, copies[0][p]->data, static_cast<size_t>(copies[0][p]->bytes),
                         cudaMemcpyDeviceToDevice),
              "cudaMemcpy");
      }
    }
  }

  void add() {
    const PlaneLaws laws = plane_laws(format);
    copies.emplace_back();
    Weight weight{format, Layout::Rows, n, k, nullptr, nullptr, nullptr, nullptr, nullptr};
    for (int i = 0; i < laws.count; ++i) {
      const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
      copies.back().push_back(std::make_unique<Memory>(plane_extent(law, n, k).elements() * law.unit / 8));
      set_plane(&weight, law.plane, copies.back().back()->data);
    }
    weights.push_back(weight);
  }

  // Waits for the GPU.
  EncodeStatus encode(const Memory& source, size_t copy) {
    PlanesOut out{};
    const PlaneLaws laws = plane_laws(format);
    for (int i = 0; i < laws.count; ++i)
      set_plane(&out, laws.items[static_cast<size_t>(i)].plane, copies[copy][static_cast<size_t>(i)]->data);
    const EncodeArgs args{format, {source.data, DType::BF16, n, k, k, 1}, out, false, nullptr, nullptr, nullptr};
    if (!workspace || workspace->bytes < cuda::encode_workspace(args))
      workspace = std::make_unique<Memory>(cuda::encode_workspace(args));
    return cuda::encode(args, workspace->data, stream());
  }
  Owned workspace;
};

// Seconds of one of `calls` calls, from a graph of all of them.
template <class Call>
class Graph {
 public:
  Graph(int64_t calls, Call call) : calls_(calls) {
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int64_t i = 0; i < calls; ++i) call(i);
    check(cudaStreamEndCapture(stream(), &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&ready_, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaEventDestroy(start_), cudaEventDestroy(end_);
    cudaGraphExecDestroy(ready_);
  }
  double seconds() {
    check(cudaEventRecord(start_, stream()), "cudaEventRecord");
    check(cudaGraphLaunch(ready_, stream()), "cudaGraphLaunch");
    check(cudaEventRecord(end_, stream()), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return 1e-3 * milliseconds / static_cast<double>(calls_);
  }

 private:
  int64_t calls_;
  cudaGraphExec_t ready_;
  cudaEvent_t start_, end_;
};

template <class Call>
void run(benchmark::State& state, int64_t calls, double bytes, double flop, Call call) {
  Graph<Call> graph(calls, call);
  graph.seconds();
  for (auto _ : state) state.SetIterationTime(graph.seconds());
  const double iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(1e-9 * bytes * iterations, benchmark::Counter::kIsRate);
  if (flop > 0) state.counters["TFLOP/s"] = benchmark::Counter(1e-12 * flop * iterations, benchmark::Counter::kIsRate);
}

void copy(benchmark::State& state) {
  Memory from(int64_t{1} << 30), to(int64_t{1} << 30);
  check(cudaMemset(from.data, 0x5a, static_cast<size_t>(from.bytes)), "cudaMemset");
  run(state, 2, 2.0 * static_cast<double>(from.bytes), 0, [&](int64_t) {
    check(cudaMemcpyAsync(to.data, from.data, static_cast<size_t>(from.bytes), cudaMemcpyDeviceToDevice, stream()),
          "cudaMemcpyAsync");
  });
}

void product(const void* w, const void* x, void* y, int64_t m, int64_t n, int64_t k) {
  const float one = 1.0f, zero = 0.0f;  // column-major: y^T[n, m] = w^T... of row-major w[n, k] and x[m, k]
  check(cublasGemmEx(blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k),
                     &one, w, CUDA_R_16BF, static_cast<int>(k), x, CUDA_R_16BF, static_cast<int>(k), &zero, y,
                     CUDA_R_16BF, static_cast<int>(n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
}

struct Shape {
  int64_t n, k;
};

void cublas(benchmark::State& state, Shape shape, int64_t m) {
  const auto [n, k] = shape;
  const Owned x = upload(numbers(m * k, 2));
  Memory y(2 * m * n);
  const Owned source = upload(numbers(n * k, 1));
  const int64_t count = ceil_div(kRotation, 2 * n * k) + 1;
  std::vector<Owned> copies;
  for (int64_t i = 0; i < count; ++i) {
    copies.push_back(std::make_unique<Memory>(2 * n * k));
    check(cudaMemcpy(copies.back()->data, source->data, static_cast<size_t>(2 * n * k), cudaMemcpyDeviceToDevice),
          "cudaMemcpy");
  }
  product(copies[0]->data, x->data, y.data, m, n, k);  // its workspace is allocated at the first call
  check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  run(state, count, static_cast<double>(2 * n * k), 2.0 * static_cast<double>(m * n * k),
      [&](int64_t i) { product(copies[static_cast<size_t>(i)]->data, x->data, y.data, m, n, k); });
}

double relative_error(const std::vector<float>& got, const std::vector<float>& wanted) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - wanted[i], 2);
    size += std::pow(static_cast<double>(wanted[i]), 2);
  }
  return std::sqrt(error / size);
}

void linear(benchmark::State& state, const std::string& format, Shape shape, int64_t m) {
  const auto [n, k] = shape;
  const Owned source = upload(numbers(n * k, 1));
  Packed packed(parse_format(format), n, k, *source);
  const Owned x = upload(numbers(m * k, 2));
  Memory y(2 * m * n), decoded(2 * n * k), expected(2 * m * n);
  const auto args = [&](int64_t i) {
    return LinearArgs{.w = packed.weights[static_cast<size_t>(i)],
                      .x = {x->data, DType::BF16, m, k, k, 1},
                      .bias = nullptr,
                      .y = y.data,
                      .parallel_for = nullptr};
  };
  Memory workspace(cuda::linear_workspace(args(0)));
  const bool whole = cuda::plan_linear(packed.format, Layout::Rows, m, DType::BF16).regime == cuda::Regime::Matmul;
  const auto decode = [&](int64_t i, void* out) {
    cuda::decode({packed.weights[static_cast<size_t>(i)], nullptr, n, DType::BF16, out, nullptr}, stream());
  };
  const auto call = [&](int64_t i) {
    if (!whole) return cuda::linear(args(i), workspace.data, stream());
    decode(i, decoded.data);
    product(decoded.data, x->data, y.data, m, n, k);
  };
  decode(0, decoded.data);
  product(decoded.data, x->data, expected.data, m, n, k);
  call(0);
  check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  const double error = relative_error(download_bf16(y.data, m * n), download_bf16(expected.data, m * n));
  if (!(error < 1e-2)) return state.SkipWithError(("relative error " + std::to_string(error)).c_str());
  state.counters["error"] = error;
  run(state, static_cast<int64_t>(packed.weights.size()), static_cast<double>(packed.nbytes),
      2.0 * static_cast<double>(m * n * k), call);
}

void decode(benchmark::State& state, const std::string& format, Shape shape) {
  const auto [n, k] = shape;
  const std::vector<uint16_t> host = numbers(n * k, 1);
  const Owned source = upload(host);
  Packed packed(parse_format(format), n, k, *source);
  Memory out(2 * n * k);
  const auto call = [&](int64_t i) {
    cuda::decode({packed.weights[static_cast<size_t>(i)], nullptr, n, DType::BF16, out.data, nullptr}, stream());
  };
  call(0);
  check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  std::vector<float> wanted;
  for (uint16_t value : host) wanted.push_back(bf16_to_float(value));
  const double error = relative_error(download_bf16(out.data, n * k), wanted);
  if (!(error < 0.5)) return state.SkipWithError(("relative error " + std::to_string(error)).c_str());
  state.counters["rounding"] = error;
  run(state, static_cast<int64_t>(packed.weights.size()), static_cast<double>(packed.nbytes + 2 * n * k), 0, call);
}

void encode(benchmark::State& state, const std::string& format, Shape shape) {
  const auto [n, k] = shape;
  const Owned source = upload(numbers(n * k, 1));
  Packed packed(parse_format(format), n, k, *source);
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    packed.encode(*source, 0);
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  state.counters["weights/s"] =
      benchmark::Counter(static_cast<double>(n * k * state.iterations()), benchmark::Counter::kIsRate);
}

std::string named(const std::string& op, const std::string& what, Shape shape, int64_t m = 0) {
  const std::string size = std::to_string(shape.n) + "x" + std::to_string(shape.k);
  return op + "/" + what + "/" + size + (m > 0 ? "/m=" + std::to_string(m) : "");
}

// n x k of the layers: Llama-3 8B and 70B (q and o, k and v, gate and up, down), Qwen2.5 7B (gate and up, down).
const std::vector<Shape> kShapes = {{8192, 28672}, {28672, 8192}, {8192, 8192},  {1024, 8192},  {4096, 4096},
                                    {1024, 4096},  {14336, 4096}, {4096, 14336}, {18944, 3584}, {3584, 18944}};
const std::vector<std::string> kFormatsOfGrid = {"int4-g128", "int4-g128-asym", "nf4",  "nf4-dq", "fp4", "int8",
                                                 "fp8",       "int3-g64",       "q4_k", "q6_k",   "q8_0"};
const std::vector<int64_t> kBatches = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};

void register_grid(bool full) {
  const auto shapes = full ? kShapes : std::vector<Shape>{kShapes[0]};
  const auto formats = full ? kFormatsOfGrid : std::vector<std::string>{"int4-g128", "nf4", "q4_k"};
  const auto batches = full ? kBatches : std::vector<int64_t>{1, 16, 64, 128, 1024};
  const auto add = [](const std::string& name, auto body) {
    benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMicrosecond)->MinTime(0.1);
  };
  add("copy", copy);
  for (const Shape shape : shapes) {
    for (const int64_t m : batches)
      add(named("linear", "cublas bf16", shape, m), [=](benchmark::State& state) { cublas(state, shape, m); });
    for (const std::string& format : formats) {
      add(named("encode", format, shape), [=](benchmark::State& state) { encode(state, format, shape); });
      add(named("decode", format, shape), [=](benchmark::State& state) { decode(state, format, shape); });
      for (const int64_t m : batches)
        add(named("linear", format, shape, m), [=](benchmark::State& state) { linear(state, format, shape, m); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool full = false;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--grid=full") == 0) full = true;
    else if (std::strcmp(argv[i], "--grid=quick") != 0) argv[kept++] = argv[i];
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  register_grid(full);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
