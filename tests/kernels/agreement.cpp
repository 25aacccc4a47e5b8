// Do the instruction sets agree? Encodes, decodes and multiplies with the one that BITFOLD_ISA names, and prints a hash
// of everything that must be the same to the bit (planes, decoded weights) and the largest relative error of the
// products, which may differ by rounding. run.sh compares what several sets print; it needs neither torch nor Python.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/cpu.hpp"
#include "cpu/kernels.hpp"

namespace {

using namespace bitfold;

constexpr int64_t kN = 37;  // ragged for every lane count, group and tile, and so are the columns but of blocks
constexpr int64_t columns(const Format& format) { return format.is_block() ? 768 : 299; }
constexpr double kTolerance = 5e-6;

void serial(int64_t count, int64_t, RangeBody body, void* context) { body(context, 0, count); }

class Hash {  // FNV-1a
 public:
  template <class T>
  void add(const std::vector<T>& items) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(items.data());
    for (size_t i = 0; i < items.size() * sizeof(T); ++i) value_ = (value_ ^ bytes[i]) * 1099511628211ull;
  }
  unsigned long long value() const { return value_; }

 private:
  uint64_t value_ = 1469598103934665603ull;
};

std::vector<float> gaussian(std::mt19937& engine, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = normal(engine);
  return out;
}

// Relative norm error of product[rows, columns] against a[rows, depth] times b, where b(d, c) reads the other factor.
template <class Factor>
double product_error(const std::vector<float>& product, const std::vector<float>& a, int64_t rows, int64_t depth,
                     int64_t columns, Factor b) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      double exact = 0;
      for (int64_t d = 0; d < depth; ++d) exact += double{a[static_cast<size_t>(i * depth + d)]} * double{b(d, c)};
      error += std::pow(exact - double{product[static_cast<size_t>(i * columns + c)]}, 2);
      norm += exact * exact;
    }
  }
  return std::sqrt(error / norm);
}

// importance: of the columns, or null.
double check_format(const Format& format, const float* importance, std::mt19937& engine, Hash& hash) {
  const int64_t k = columns(format);
  const std::vector<float> source = gaussian(engine, kN * k);
  PlanesOut out{};
  std::vector<std::vector<char>> planes;
  const PlaneLaws laws = plane_laws(format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    planes.emplace_back(static_cast<size_t>(plane_extent(law, kN, k).elements() * law.unit / 8));
    set_plane(&out, law.plane, planes.back().data());
  }
  cpu::encode({format, {source.data(), DType::F32, kN, k, k, 1}, out, false, nullptr, importance, serial});
  for (const std::vector<char>& plane : planes) hash.add(plane);

  const Weight w{format, Layout::Rows, kN, k, out.codes, out.scales, out.zeros, out.nested_scales, out.nested_offset};
  std::vector<float> decoded(static_cast<size_t>(kN * k));
  cpu::decode({w, nullptr, kN, DType::F32, decoded.data(), serial});
  hash.add(decoded);
  for (const DType dtype : {DType::F16, DType::BF16}) {
    std::vector<uint16_t> rounded(static_cast<size_t>(kN * k));
    cpu::decode({w, nullptr, kN, dtype, rounded.data(), serial});
    hash.add(rounded);
  }

  const auto weight = [&](int64_t row, int64_t column) { return decoded[static_cast<size_t>(row * k + column)]; };
  double worst = 0;
  for (const int64_t m : {1, 3, 8, 9, 21}) {
    const std::vector<float> x = gaussian(engine, m * k);
    std::vector<float> y(static_cast<size_t>(m * kN)), dx(x.size());
    cpu::linear({w, {x.data(), DType::F32, m, k, k, 1}, nullptr, y.data(), serial});
    worst = std::max(worst, product_error(y, x, m, k, kN, [&](int64_t d, int64_t c) { return weight(c, d); }));
    cpu::linear_grad_x({w, {y.data(), DType::F32, m, kN, kN, 1}, dx.data(), serial});
    worst = std::max(worst, product_error(dx, y, m, kN, k, weight));
  }
  return worst;
}

// Every pattern of the 8-bit floats, NaNs as one number.
void hash_minifloats(const char* name, Hash& hash) {
  std::vector<uint8_t> codes(256);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i);
  const uint16_t one = 0x3c00;
  const Weight w{parse_format(name), Layout::Rows, 1, 256, codes.data(), &one, nullptr, nullptr, nullptr};
  std::vector<float> decoded(256);
  cpu::decode({w, nullptr, 1, DType::F32, decoded.data(), serial});
  for (float& value : decoded) value = std::isnan(value) ? 12345.0f : value;
  hash.add(decoded);
}

}  // namespace

int main() {
  std::mt19937 engine(1);
  Hash hash;
  double worst = 0;
  for (const char* name :
       {"fp16", "bf16", "fp8-e4m3-channel", "fp8-e5m2-g32", "int8-channel", "int8-tensor-asym", "int4-g128",
        "int4-g32-asym", "int3-g64", "int3-g17-asym", "int2-g64", "nf4-b64", "nf4-b64-dq", "fp4-b64"}) {
    worst = std::max(worst, check_format(parse_format(name), nullptr, engine, hash));
  }
  std::vector<float> importance = gaussian(engine, columns(parse_format("q4_k")));
  for (float& value : importance) value *= value;
  for (const FormatRow& row : kFormats) {
    if (row.grid != Grid::Block) continue;
    for (const float* weights : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
      worst = std::max(worst, check_format(parse_format(row.family), weights, engine, hash));
    }
  }
  hash_minifloats("fp8-e4m3-channel", hash);
  hash_minifloats("fp8-e5m2-channel", hash);
  std::fprintf(stderr, "%-7s largest relative error of a product %.2e\n", cpu::kernels().isa, worst);
  std::printf("%016llx\n", hash.value());
  return worst <= kTolerance ? 0 : 1;
}
