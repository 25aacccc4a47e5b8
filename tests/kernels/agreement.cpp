// Do the instruction sets agree? Encodes, decodes and multiplies with the one that BITFOLD_ISA names, and prints for
// each format a hash of everything that must be the same to the bit: planes, decoded weights, products of whole
// numbers. The other products may differ by rounding; their largest relative error goes to stderr, and ends in failure
// where it is too large. GPTQ's sums are those of plain loops to the bit (gptq.hpp); packed keys and values are
// held against plain loops too, decoded and attended to (kv.hpp). run.sh compares what several sets print; it needs
// neither torch nor Python.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu.hpp"
#include "cpu/kernels.hpp"
#include "cpu/linear_fp8.hpp"
#include "gptq.hpp"
#include "kv.hpp"
#include "numbers.hpp"

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
  void print(const Format& format, const char* what) const {
    std::printf("%s %s %016llx\n", to_string(format).c_str(), what, static_cast<unsigned long long>(value_));
  }

 private:
  uint64_t value_ = 1469598103934665603ull;
};

// A NaN is a NaN: which one an operation makes is the processor's choice.
void one_nan(Numbers& values) {
  for (float& value : values) value = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
}
void one_nan(std::vector<uint16_t>& values, DType dtype) {
  const uint16_t infinity = dtype == DType::F16 ? 0x7c00 : 0x7f80;
  for (uint16_t& value : values) value = (value & 0x7fff) > infinity ? 0x7fff : value;
}

struct Encoded {
  std::vector<std::vector<char>> planes;
  Weight w;
  EncodeStatus status;
};

Encoded encode(const Format& format, const Numbers& source, int64_t n, bool clamp, const float* importance) {
  const int64_t k = columns(format);
  Encoded out;
  PlanesOut to{};
  const PlaneLaws laws = plane_laws(format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    out.planes.emplace_back(static_cast<size_t>(plane_extent(law, n, k).elements() * law.unit / 8));
    set_plane(&to, law.plane, out.planes.back().data());
  }
  out.status = cpu::encode({format, {source.data(), DType::F32, n, k, k, 1}, to, clamp, nullptr, importance, serial});
  out.w = {format, Layout::Rows, n, k, to.codes, to.scales, to.zeros, to.nested_scales, to.nested_offset};
  return out;
}

Numbers decode(const Weight& w, Hash& hash) {
  Numbers decoded(static_cast<size_t>(w.n * w.k));
  cpu::decode({w, nullptr, w.n, DType::F32, decoded.data(), serial});
  one_nan(decoded);
  hash.add(decoded);
  for (const DType dtype : {DType::F16, DType::BF16}) {
    std::vector<uint16_t> rounded(decoded.size());
    cpu::decode({w, nullptr, w.n, dtype, rounded.data(), serial});
    one_nan(rounded, dtype);
    hash.add(rounded);
  }
  return decoded;
}

// Relative norm error of product[rows, columns] against a[rows, depth] times b, where b(d, c) reads the other factor.
template <class Factor>
double product_error(const Numbers& product, const Numbers& a, int64_t rows, int64_t depth, int64_t columns, Factor b) {
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

// Products of whole numbers with every count of rows that a kernel has: each is defined to the bit.
void multiply_int8(const Weight& w, const std::vector<Numbers>& x, Hash& hash) {
  const auto rows = static_cast<int64_t>(x.size());
  Numbers all;
  for (const Numbers& row : x) all.insert(all.end(), row.begin(), row.end());
  for (int64_t first = 0, m = 1; first < rows; first += m, m = std::min(2 * m, rows - first)) {
    Numbers y(static_cast<size_t>(m * w.n));
    cpu::linear(
        {w, {all.data() + first * w.k, DType::F32, m, w.k, w.k, 1}, nullptr, y.data(), serial, Activations::Int8});
    one_nan(y);
    hash.add(y);
  }
}

// Ordinary numbers; importance: of the columns, or null. Returns the largest relative error of a product.
double check_format(const Format& format, const float* importance, Engine& engine) {
  const int64_t k = columns(format);
  Hash hash;
  const Encoded encoded = encode(format, gaussian(engine, kN * k), kN, false, importance);
  for (const std::vector<char>& plane : encoded.planes) hash.add(plane);
  const Weight& w = encoded.w;
  const Numbers decoded = decode(w, hash);

  const auto weight = [&](int64_t row, int64_t column) { return decoded[static_cast<size_t>(row * k + column)]; };
  double worst = 0;
  for (const int64_t m : {1, 3, 8, 9, 21}) {
    const Numbers x = gaussian(engine, m * k);
    Numbers y(static_cast<size_t>(m * kN)), dx(x.size());
    cpu::linear({w, {x.data(), DType::F32, m, k, k, 1}, nullptr, y.data(), serial});
    worst = std::max(worst, product_error(y, x, m, k, kN, [&](int64_t d, int64_t c) { return weight(c, d); }));
    cpu::linear_grad_x({w, {y.data(), DType::F32, m, kN, kN, 1}, dx.data(), serial});
    worst = std::max(worst, product_error(dx, y, m, kN, k, weight));
  }
  if (format.is_block()) {
    std::vector<Numbers> x;
    for (int i = 0; i < 33; ++i) x.push_back(gaussian(engine, k));
    multiply_int8(w, x, hash);
  }
  hash.print(format, importance == nullptr ? "encoded, decoded, multiplied" : "with importance");
  return worst;
}

// Codes and scales of rows of activations as 8-bit floats: rows of every size, and hard ones.
void check_rounding(Engine& engine) {
  const int64_t k = columns(parse_format("fp8-e4m3")), m = 40;
  Numbers x = gaussian(engine, m * k);
  for (int64_t i = 0; i < m * k; ++i) x[static_cast<size_t>(i)] *= std::exp2(static_cast<float>(i / k * 7 - 150));
  for (int64_t i = 0; i < k; ++i) {
    x[static_cast<size_t>(i)] = static_cast<float>(i % 113) / 16.0f;  // ties
    x[static_cast<size_t>(k + i)] = -0.0f;
  }
  x[0] = 28.0f;
  x[static_cast<size_t>(2 * k + 5)] = std::numeric_limits<float>::quiet_NaN();
  x[static_cast<size_t>(3 * k + 5)] = -std::numeric_limits<float>::infinity();
  std::vector<uint8_t> codes(static_cast<size_t>(m * k));
  Numbers scales(static_cast<size_t>(m));
  Hash hash;
  const float given = 0.01f;
  for (const float* x_scale : {static_cast<const float*>(nullptr), &given}) {
    cpu::round_fp8({{x.data(), DType::F32, m, k, k, 1}, x_scale, codes.data(), scales.data(), serial});
    one_nan(scales);
    hash.add(codes);
    hash.add(scales);
  }
  hash.print(parse_format("fp8-e4m3"), "activations rounded");
}

// Every pattern of the 8-bit floats.
void check_minifloats(const char* name) {
  std::vector<uint8_t> codes(256);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i);
  const float one = 1.0f;
  Hash hash;
  decode({parse_format(name), Layout::Rows, 1, 256, codes.data(), &one, nullptr, nullptr, nullptr}, hash);
  hash.print(parse_format(name), "decoded");
}

// Blocks of hard numbers, stored whatever becomes of their scales; and what is said of the first row that has no
// scale. Rows are encoded alone too: there they share their lanes with nothing but themselves.
void check_hard_numbers(const Format& format, const std::vector<Numbers>& rows, const float* importance,
                        const char* what) {
  Hash hash;
  Numbers all;
  for (const Numbers& row : rows) all.insert(all.end(), row.begin(), row.end());
  const Encoded encoded = encode(format, all, static_cast<int64_t>(rows.size()), true, importance);
  hash.add(encoded.planes[0]);
  decode(encoded.w, hash);
  for (const Numbers& row : rows) {
    const Encoded alone = encode(format, row, 1, false, importance);
    const EncodeStatus& s = alone.status;
    hash.add(alone.planes[0]);
    hash.add(std::vector<int64_t>{static_cast<int64_t>(s.fault), s.row, s.column, std::bit_cast<int64_t>(s.value)});
  }
  hash.print(format, what);
}

// Blocks of any bytes: every integer, and scales of every kind.
void check_any_bytes(const Format& format, const std::vector<Numbers>& x, Engine& engine) {
  const int64_t k = columns(format);
  std::vector<uint8_t> bytes(static_cast<size_t>(kN * (k / format.group) * format.info().block_bytes));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(engine() >> 24);
  const Weight w = {format, Layout::Rows, kN, k, bytes.data(), nullptr, nullptr, nullptr, nullptr};
  Hash hash;
  decode(w, hash);
  multiply_int8(w, x, hash);
  hash.print(format, "of any bytes");
}

// Products with x rounded to 8 bits row by row: few rows and many, with outliers that have a copy and that have none,
// and with numbers that are none.
void check_rows_int8(const char* name, Engine& engine) {
  const Format format = parse_format(name);
  const int64_t k = columns(format);
  const Encoded encoded = encode(format, gaussian(engine, kN * k), kN, false, nullptr);
  const std::vector<int32_t> copied = {0, 7, static_cast<int32_t>(k - 1)};
  std::vector<uint16_t> copy;
  for (const float value : gaussian(engine, kN * 3)) copy.push_back(float_to_bf16(value));
  const float step = 0.03f;
  Hash hash;
  for (const int64_t m : {1, 2, 3, 5, 8, 9, 21, 40}) {
    Numbers x = gaussian(engine, m * k);
    for (int64_t i = 0; i < m * k; i += 97) x[static_cast<size_t>(i)] *= 30.0f;
    if (m > 2) x[static_cast<size_t>(k + 5)] = std::numeric_limits<float>::infinity();
    if (m > 3) x[static_cast<size_t>(3 * k)] = std::numeric_limits<float>::quiet_NaN();
    for (const double threshold : {0.0, 2.5, 1e-3}) {
      for (const int64_t copies : {0, 3}) {
        Numbers y(static_cast<size_t>(m * kN));
        cpu::linear_int8({encoded.w,
                          {x.data(), DType::F32, m, k, k, 1},
                          nullptr,
                          y.data(),
                          threshold,
                          m % 2 == 0,
                          threshold > 0 ? nullptr : &step,
                          copied.data(),
                          copy.data(),
                          DType::BF16,
                          copies,
                          serial});
        one_nan(y);
        hash.add(y);
      }
    }
  }
  hash.print(format, "with rows of 8 bits");
}

// GPTQ's loops to the bit against plain ones, and a hash of the steps that its search finds.
double check_gptq(Engine& engine) {
  const plain::Problem p(engine);
  const int64_t groups = p.group_count();
  Numbers levels(kNf4Sorted.values.begin(), kNf4Sorted.values.end()), upper;
  bool agree = plain::factor_agrees(p, serial, &upper);
  const auto grid = [&](const float* table, int64_t low, int64_t high, bool round) {
    return GptqGrid{p.step.data(), p.offset.data(), groups, table, low, high, round};
  };
  for (const GptqGrid& each : {grid(nullptr, -8, 7, true), grid(nullptr, 0, 3, true), grid(nullptr, -128, 127, true),
                               grid(levels.data(), 0, 15, true), grid(nullptr, 0, 0, false)}) {
    agree = plain::columns_agree(p, upper, each, serial) && agree;
  }

  Numbers zeros, importance = gaussian(engine, p.width), factors;
  for (size_t i = 0; i < p.step.size(); ++i) zeros.push_back(static_cast<float>(engine() % 16));
  for (float& value : importance) value *= value;
  for (int i = 0; i < 23; ++i) factors.push_back(1.0f - static_cast<float>(i) / 32.0f);
  Numbers step(p.step.size()), cost(p.step.size());
  Hash hash;
  for (const Scale stored : {Scale::F16, Scale::BF16, Scale::F32}) {
    for (const bool table : {false, true}) {
      for (const bool weighed : {false, true}) {
        const MatrixIn weight{p.weight.data(), DType::F32, p.n, p.width, p.width, 1};
        cpu::search_steps({weight, p.group, weighed ? importance.data() : nullptr, p.step.data(),
                           table ? nullptr : zeros.data(), factors.data(), static_cast<int64_t>(factors.size()), stored,
                           table ? levels.data() : nullptr, 0, 15, step.data(), cost.data(), serial});
        hash.add(step);
        hash.add(cost);
      }
    }
  }
  hash.print(parse_format("int4"), "and nf4, steps searched for");
  return agree ? 0 : std::numeric_limits<double>::infinity();
}

// Blocks of keys and values, and the error of attention to them.
double check_kv(Engine& engine) {
  double worst = 0;
  for (int i = 0; i < kKvFormatCount; ++i) {
    for (const auto& [head, value_group] : {std::pair<int64_t, int64_t>{64, 32}, {20, 20}}) {
      const plain::KvProblem p(static_cast<KvFormat>(i), head, value_group, engine);
      const std::vector<uint8_t> packed = plain::kv_packed(p, serial);
      Hash hash;
      hash.add(packed);
      hash.print(parse_format("int8"), (std::string("of keys and values, ") + kKvFormats[i].name).c_str());
      worst = std::max(worst, plain::kv_error(p, packed, serial));
      if (!plain::kv_unpacks(p, packed, serial)) {
        std::fprintf(stderr, "kv_unpack of %s differs from plain loops\n", kKvFormats[i].name);
        worst = 1.0;
      }
    }
  }
  return worst;
}

double check_plain(Engine& engine) {
  double worst = 0;
  for (const char* name :
       {"fp16", "bf16", "fp8-e4m3-channel", "fp8-e5m2-g32", "fp8-e4m3-b4x32", "int8-channel", "int8-tensor-asym",
        "int4-g128", "int4-g32-asym", "int3-g64", "int3-g17-asym", "int2-g64", "nf4-b64", "nf4-b64-dq", "fp4-b64"}) {
    worst = std::max(worst, check_format(parse_format(name), nullptr, engine));
  }
  check_minifloats("fp8-e4m3-channel");
  check_minifloats("fp8-e5m2-channel");
  return worst;
}

double check_blocks(Engine& engine) {
  double worst = 0;
  const int64_t k = columns(parse_format("q4_k"));
  Numbers importance = gaussian(engine, k);
  for (float& value : importance) value *= value;
  const std::vector<Numbers> rows = hard_rows(engine, k), columns = hard_importance(engine, k);
  const std::vector<Numbers> x = hard_activations(engine, k);
  for (const FormatRow& row : kFormats) {
    if (row.grid != Grid::Block) continue;
    const Format format = parse_format(row.family);
    worst = std::max(worst, check_format(format, nullptr, engine));
    worst = std::max(worst, check_format(format, importance.data(), engine));
    check_hard_numbers(format, rows, nullptr, "of hard numbers");
    for (size_t i = 0; i < columns.size(); ++i) {
      check_hard_numbers(format, rows, columns[i].data(),
                         ("of hard numbers and importance " + std::to_string(i)).c_str());
    }
    check_any_bytes(format, x, engine);
  }
  return worst;
}

double check_activations(Engine& engine) {
  check_rows_int8("int8-channel", engine);
  check_rows_int8("int8-tensor-asym", engine);
  check_rounding(engine);
  return 0;
}

// What there is to check, each with random numbers of its own: what a part prints does not depend on the others. An
// error of infinity: numbers that are defined to the bit differ.
struct Part {
  const char* name;
  double (*error)(Engine&);
};
constexpr Part kParts[] = {
    {"plain", check_plain}, {"activations", check_activations}, {"gptq", check_gptq},
    {"kv", check_kv},       {"blocks", check_blocks},
};

}  // namespace

// Arguments: the parts to check; none: all.
int main(int count, char** names) {
  double worst = 0;
  const std::vector<std::string> asked(names + 1, names + count);
  for (const std::string& name : asked) {
    if (std::ranges::none_of(kParts, [&](const Part& part) { return name == part.name; })) {
      std::fprintf(stderr, "%s is no part: there are plain, activations, gptq, kv and blocks\n", name.c_str());
      return 2;
    }
  }
  for (const Part& part : kParts) {
    if (!asked.empty() && std::ranges::find(asked, part.name) == asked.end()) continue;
    Engine engine(1);
    worst = std::max(worst, part.error(engine));
  }
  std::fprintf(stderr, "%-11s largest relative error of a product %.2e\n", cpu::kernels().isa, worst);
  return worst <= kTolerance ? 0 : 1;
}
