// The kernels without torch: encode, decode and linear of every family; each case is validated before it is timed.
//
//   cmake -B build-bench -DBITFOLD_BENCH=ON -DBITFOLD_PYTHON=OFF && cmake --build build-bench
//   build-bench/bench/bench_kernels       (BITFOLD_ISA forces an instruction set)
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu.hpp"
#include "formats/format.hpp"

namespace {

using namespace bitfold;

constexpr int64_t kN = 4096, kK = 4096;

void threads_for(int64_t count, int64_t grain, RangeBody body, void* context) {
  const int64_t workers = std::min<int64_t>(std::thread::hardware_concurrency(), ceil_div(count, grain));
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < workers; ++i)
    pool.emplace_back(body, context, count * i / workers, count * (i + 1) / workers);
  body(context, 0, count / std::max<int64_t>(workers, 1));
  for (std::thread& thread : pool) thread.join();
}

std::vector<float> gaussian(int64_t count) {
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = normal(engine);
  return out;
}

const std::vector<float>& source() {
  static const std::vector<float> weights = gaussian(kN * kK);
  return weights;
}

// An encoded kN x kK matrix.
struct Encoded {
  Format format;
  std::vector<std::vector<char>> planes;
  PlanesOut out{};

  explicit Encoded(const Format& f) : format(f) {
    const PlaneLaws laws = plane_laws(format);
    for (int i = 0; i < laws.count; ++i) {
      const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
      planes.emplace_back(static_cast<size_t>(plane_extent(law, kN, kK).elements() * law.unit / 8));
      set_plane(&out, law.plane, planes.back().data());
    }
    encode();
  }
  void encode() {
    cpu::encode({format, {source().data(), DType::F32, kN, kK, kK, 1}, out, false, nullptr, nullptr, threads_for});
  }
  Weight weight() const {
    return {format, Layout::Rows, kN, kK, out.codes, out.scales, out.zeros, out.nested_scales, out.nested_offset};
  }
  std::vector<float> decode() const {
    std::vector<float> matrix(source().size());
    cpu::decode({weight(), nullptr, kN, DType::F32, matrix.data(), threads_for});
    return matrix;
  }
};

void bench_encode(benchmark::State& state, const std::string& name) {
  Encoded encoded(parse_format(name));
  double error = 0, norm = 0;
  const std::vector<float> decoded = encoded.decode();
  for (size_t i = 0; i < decoded.size(); ++i) {
    error += std::pow(double{decoded[i]} - double{source()[i]}, 2);
    norm += std::pow(double{source()[i]}, 2);
  }
  if (!(error < 0.9 * norm)) return state.SkipWithError("the decoded weights are not the weights");
  for (auto _ : state) encoded.encode();
  state.SetItemsProcessed(state.iterations() * kN * kK);
}

// Into memory that is there already; bench_copy is its ceiling.
void bench_decode(benchmark::State& state, const std::string& name) {
  const Encoded encoded(parse_format(name));
  std::vector<float> matrix = encoded.decode();
  double error = 0, norm = 0;
  for (size_t i = 0; i < matrix.size(); ++i) {
    error += std::pow(double{matrix[i]} - double{source()[i]}, 2);
    norm += std::pow(double{source()[i]}, 2);
  }
  if (!(error < 0.9 * norm)) return state.SkipWithError("the decoded weights are not the weights");
  for (auto _ : state) cpu::decode({encoded.weight(), nullptr, kN, DType::F32, matrix.data(), threads_for});
  state.SetItemsProcessed(state.iterations() * kN * kK);
  state.SetBytesProcessed(state.iterations() * (kN * kK * 4 + stored_bytes(encoded.format, kN, kK)));
}

void bench_copy(benchmark::State& state) {
  std::vector<float> to(source().size());
  const auto body = [](void* context, int64_t begin, int64_t end) {
    std::memcpy(static_cast<float*>(context) + begin, source().data() + begin, static_cast<size_t>(end - begin) * 4);
  };
  for (auto _ : state) {
    threads_for(kN * kK, 1 << 20, body, to.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kN * kK * 8);
}

void bench_linear(benchmark::State& state, const std::string& name) {
  const int64_t m = state.range(0);
  const Encoded encoded(parse_format(name));
  const std::vector<float> x = gaussian(m * kK), decoded = encoded.decode();
  std::vector<float> y(static_cast<size_t>(m * kN));
  const LinearArgs args{encoded.weight(), {x.data(), DType::F32, m, kK, kK, 1}, nullptr, y.data(), threads_for};
  cpu::linear(args);
  for (int64_t row = 0; row < kN; row += 97) {
    double exact = 0;
    for (int64_t i = 0; i < kK; ++i)
      exact += double{x[static_cast<size_t>(i)]} * double{decoded[static_cast<size_t>(row * kK + i)]};
    if (!(std::abs(exact - double{y[static_cast<size_t>(row)]}) < 1e-3))
      return state.SkipWithError("the product is wrong");
  }
  for (auto _ : state) cpu::linear(args);
  state.SetItemsProcessed(state.iterations() * m * kN * kK);
  state.SetBytesProcessed(state.iterations() * stored_bytes(encoded.format, kN, kK));
}

[[maybe_unused]] const bool registered = [] {
  benchmark::RegisterBenchmark("copy", bench_copy)->UseRealTime();
  for (const FormatRow& row : kFormats) {
    const std::string name = to_string(parse_format(row.family));
    benchmark::RegisterBenchmark(("encode/" + name).c_str(), [name](benchmark::State& state) {
      bench_encode(state, name);
    })->UseRealTime();
    benchmark::RegisterBenchmark(("decode/" + name).c_str(), [name](benchmark::State& state) {
      bench_decode(state, name);
    })->UseRealTime();
    benchmark::RegisterBenchmark(("linear/" + name).c_str(),
                                 [name](benchmark::State& state) { bench_linear(state, name); })
        ->Arg(1)
        ->Arg(8)
        ->Arg(64)
        ->UseRealTime();
  }
  return true;
}();

}  // namespace
