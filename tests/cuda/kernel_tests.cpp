// kernel_tests COUNT FILE...: runs the op that each file (kernel_cases.py) describes under the emulator's first COUNT
// schedules and compares with what the file expects, up to the first difference. Everything that a kernel is given is a
// heap block of its own of exactly the size that it should need, so that AddressSanitizer sees the first byte beyond;
// and another kernel, launched just before the op's, writes it, so that nobody may look at it earlier.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
#include "cuda/gptq.hpp"
#include "cuda/kv.hpp"
#include "cuda/linear_int8.hpp"
#include "cuda/plan.hpp"
#include "formats/numeric.hpp"

namespace {

using namespace bitfold;

constexpr int kUnwritten = 0xa5;

// ---- files ----

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes, int fill = 0) : bytes_(bytes) {
    void* memory = nullptr;
    if (bytes > 0 && posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
    data_.reset(static_cast<char*>(memory));
    if (bytes > 0) std::memset(memory, fill, bytes);
  }
  char* data() const { return data_.get(); }  // null where there is nothing
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> data_;
  size_t bytes_ = 0;
};

struct MemoryCopy {
  char* to;
  const char* from;
  size_t bytes;
};
__global__ void write_all(const MemoryCopy* copies, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
}

// Lines "name value", of which "tensor name" has the number of bytes, then an empty line, then the tensors.
class CaseFile {
 public:
  explicit CaseFile(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::string> tensors;
    for (std::string line; std::getline(file, line) && !line.empty();) {
      const size_t space = line.rfind(' ');
      values_[line.substr(0, space)] = line.substr(space + 1);
      if (line.starts_with("tensor ")) tensors.push_back(line.substr(0, space));
    }
    for (const std::string& name : tensors) {
      Memory memory(std::stoull(values_[name]));
      file.read(memory.data(), static_cast<std::streamsize>(memory.bytes()));
      tensors_[name.substr(7)] = std::move(memory);
    }
    if (!file) throw std::runtime_error("cannot be read");
  }

  // The same, with tensors that aren't written before the next kernel, which is launched here, has run.
  CaseFile written_by_a_kernel() const {
    CaseFile later;
    later.values_ = values_;
    for (const auto& [name, tensor] : tensors_) {
      Memory& memory = later.tensors_[name] = Memory(tensor.bytes(), kUnwritten);
      const MemoryCopy copy{memory.data(), tensor.data(), tensor.bytes()};
      if (name == "scale") write_all(&copy, 1);  // which the host looks at
      else later.copies_.push_back(copy);
    }
    cuda::launch({.grid = 1, .block = 1, .shared_bytes = 0, .name = "write_all", .stream = nullptr}, write_all,
                 later.copies_.data(), later.copies_.size());
    return later;
  }

  const std::string& text(const std::string& name) const { return values_.at(name); }
  int64_t number(const std::string& name) const { return std::stoll(text(name)); }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  const Memory& tensor(const std::string& name) const { return tensors_.at(name); }
  void* data(const std::string& name) const { return has(name) ? tensor(name).data() : nullptr; }

  DType dtype(const std::string& name) const {
    static const std::map<std::string, DType> kNames = {
        {"fp16", DType::F16}, {"bf16", DType::BF16}, {"fp32", DType::F32}, {"fp64", DType::F64}};
    return kNames.at(text(name));
  }
  Format format() const { return parse_format(text("format")); }
  Layout layout() const { return parse_layout(text("layout")); }

  Weight weight() const {
    Weight w{format(), layout(), number("n"), number("k"), nullptr, nullptr, nullptr, nullptr, nullptr};
    const PlaneLaws laws = plane_laws(w.format);
    for (int i = 0; i < laws.count; ++i) {
      const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
      set_plane(&w, law.plane, data(std::string(law.name)));
    }
    return w;
  }
  MatrixIn matrix(const std::string& name) const {
    return {data(name),        dtype("dtype"),       number("rows"),
            number("columns"), number("row_stride"), number("column_stride")};
  }

 private:
  CaseFile() = default;

  std::map<std::string, std::string> values_;
  std::map<std::string, Memory> tensors_;
  std::vector<MemoryCopy> copies_;
};

// ---- ops: each gives its outputs by the names of what is expected ----

using Outputs = std::map<std::string, Memory>;

size_t bytes_of(DType dtype, int64_t count) { return static_cast<size_t>(count * dtype_bits(dtype) / 8); }

Outputs linear(const CaseFile& file) {
  LinearArgs args{
      .w = file.weight(), .x = file.matrix("x"), .bias = file.data("bias"), .y = nullptr, .parallel_for = nullptr};
  Memory y(bytes_of(args.x.dtype, args.x.rows * args.w.n), kUnwritten);
  args.y = y.data();
  const Memory workspace(static_cast<size_t>(cuda::linear_workspace(args)), kUnwritten);
  cuda::linear(args, workspace.data(), nullptr);
  cuda::emulator::synchronize();
  Outputs outputs;
  outputs["y"] = std::move(y);
  return outputs;
}

Outputs linear_int8(const CaseFile& file) {
  LinearInt8Args args{.w = file.weight(),
                      .x = file.matrix("x"),
                      .bias = file.data("bias"),
                      .y = nullptr,
                      .threshold = static_cast<double>(file.number("threshold")),
                      .per_row = file.number("per_row") != 0,
                      .x_scale = static_cast<const float*>(file.data("x_scale")),
                      .columns = static_cast<const int32_t*>(file.data("columns")),
                      .copy = file.data("copy"),
                      .copy_dtype = DType::F16,
                      .copies = file.number("copies"),
                      .parallel_for = nullptr};
  Memory y(bytes_of(args.x.dtype, args.x.rows * args.w.n), kUnwritten);
  args.y = y.data();
  const Memory workspace(static_cast<size_t>(cuda::linear_int8_workspace(args)), kUnwritten);
  cuda::linear_int8(args, workspace.data(), nullptr);
  cuda::emulator::synchronize();
  Outputs outputs;
  outputs["out y"] = std::move(y);
  return outputs;
}

Outputs linear_grad_x(const CaseFile& file) {
  LinearGradArgs args{.w = file.weight(), .dy = file.matrix("dy"), .dx = nullptr, .parallel_for = nullptr};
  Memory dx(bytes_of(args.dy.dtype, args.dy.rows * args.w.k), kUnwritten);
  args.dx = dx.data();
  cuda::linear_grad_x(args, nullptr);
  Outputs outputs;
  outputs["y"] = std::move(dx);
  return outputs;
}

Outputs decode(const CaseFile& file) {
  DecodeArgs args{.w = file.weight(),
                  .ids = static_cast<const int64_t*>(file.data("ids")),
                  .rows = file.number("rows"),
                  .dtype = file.dtype("dtype"),
                  .out = nullptr,
                  .parallel_for = nullptr};
  Memory out(bytes_of(args.dtype, args.rows * args.w.k), kUnwritten);
  args.out = out.data();
  cuda::decode(args, nullptr);
  Outputs outputs;
  outputs["out"] = std::move(out);
  return outputs;
}

Outputs encode(const CaseFile& file) {
  EncodeArgs args{.format = file.format(),
                  .w = file.matrix("w"),
                  .out = {},
                  .clamp = false,
                  .nested_offset = nullptr,
                  .importance = static_cast<const float*>(file.data("importance")),
                  .parallel_for = nullptr};
  Outputs outputs;
  const PlaneLaws laws = plane_laws(args.format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    const int64_t elements = plane_extent(law, args.w.rows, args.w.columns).elements();
    Memory& plane = outputs["out " + std::string(law.name)] =
        Memory(static_cast<size_t>(elements * law.unit / 8), kUnwritten);
    set_plane(&args.out, law.plane, plane.data());
  }
  Memory workspace(static_cast<size_t>(cuda::encode_workspace(args)), kUnwritten);
  const EncodeStatus status = cuda::encode(args, workspace.data(), nullptr);
  if (status.fault != EncodeFault::None) throw std::runtime_error("could not encode");
  return outputs;
}

// Packs logical codes, and unpacks what it packed.
Outputs pack(const CaseFile& file) {
  Memory codes(file.tensor("codes").bytes(), kUnwritten), zeros(file.has("zeros") ? file.tensor("zeros").bytes() : 0);
  Memory packed(static_cast<size_t>(file.number("packed_bytes")), kUnwritten);
  Memory packed_zeros(static_cast<size_t>(file.number("packed_zeros_bytes")), kUnwritten);
  PackArgs args{.format = file.format(),
                .layout = file.layout(),
                .n = file.number("n"),
                .k = file.number("k"),
                .codes = static_cast<uint8_t*>(file.data("codes")),
                .zeros = static_cast<uint8_t*>(file.data("zeros")),
                .packed_codes = packed.as<uint8_t>(),
                .packed_zeros = packed_zeros.as<uint8_t>(),
                .parallel_for = nullptr};
  cuda::pack(args, nullptr);
  args.codes = codes.as<uint8_t>();
  args.zeros = zeros.as<uint8_t>();
  cuda::unpack(args, nullptr);
  cuda::emulator::synchronize();
  Outputs outputs;
  outputs["out codes"] = std::move(packed);
  outputs["out logical codes"] = std::move(codes);
  if (packed_zeros.data()) outputs["out zeros"] = std::move(packed_zeros);
  return outputs;
}

Outputs gptq_columns(const CaseFile& file) {
  const int64_t n = file.number("n"), columns = file.number("k");
  const bool rounds = file.number("round") != 0, hands_out = file.has("behind");
  const auto bytes = [&](bool wanted, size_t each) { return wanted ? static_cast<size_t>(n * columns) * each : 0; };
  Memory codes(bytes(rounds, 1), kUnwritten), errors(bytes(hands_out, sizeof(float)), kUnwritten);
  Memory loss(static_cast<size_t>(n) * sizeof(double), kUnwritten);
  const auto floats = [&](const char* name) { return static_cast<const float*>(file.data(name)); };
  const GptqColumnsArgs args{.weight = {file.data("weight"), DType::F32, n, columns, columns, 1},
                             .order = static_cast<const int64_t*>(file.data("order")),
                             .group = static_cast<const int64_t*>(file.data("group")),
                             .factor = floats("factor"),
                             .k = file.number("total"),
                             .begin = file.number("begin"),
                             .behind = floats("behind"),
                             .grid = {floats("step"), floats("offset"), file.number("groups"), floats("table"),
                                      file.number("low"), file.number("high"), rounds},
                             .codes = codes.as<uint8_t>(),
                             .errors = errors.as<float>(),
                             .loss = loss.as<double>(),
                             .parallel_for = nullptr};
  const Memory workspace(static_cast<size_t>(cuda::gptq_columns_workspace(args)), kUnwritten);
  cuda::gptq_columns(args, workspace.data(), nullptr);
  cuda::emulator::synchronize();
  Outputs outputs;
  if (rounds) outputs["out codes"] = std::move(codes);
  if (hands_out) outputs["out errors"] = std::move(errors);
  outputs["out loss"] = std::move(loss);
  return outputs;
}

Outputs search_steps(const CaseFile& file) {
  const int64_t n = file.number("n"), k = file.number("k");
  const size_t bytes = file.tensor("start").bytes();
  Memory step(bytes, kUnwritten), cost(bytes, kUnwritten);
  const auto floats = [&](const char* name) { return static_cast<const float*>(file.data(name)); };
  cuda::search_steps({.weight = {file.data("weight"), DType::F32, n, k, k, 1},
                      .group = file.number("group"),
                      .importance = floats("importance"),
                      .start = floats("start"),
                      .zeros = floats("zeros"),
                      .factors = floats("factors"),
                      .tried = file.number("tried"),
                      .stored = static_cast<Scale>(file.number("stored")),
                      .table = floats("table"),
                      .low = file.number("low"),
                      .high = file.number("high"),
                      .step = step.as<float>(),
                      .cost = cost.as<float>(),
                      .parallel_for = nullptr},
                     nullptr);
  Outputs outputs;
  outputs["out step"] = std::move(step);
  outputs["out cost"] = std::move(cost);
  return outputs;
}

KvShape kv_shape(const CaseFile& file) {
  return {parse_kv_format(file.text("format")), file.number("group"), file.number("k"), file.number("value_group")};
}

// Of [batch, heads, tokens, head size], contiguous.
KvTokens kv_tokens(const CaseFile& file, const char* name, const char* heads, int64_t tokens) {
  const int64_t head = file.number("k");
  return {file.data(name), file.dtype("dtype"), file.number(heads) * tokens * head, tokens * head, head};
}

Outputs kv_pack(const CaseFile& file) {
  const int64_t tokens = file.number("n"), blocks = tokens / file.number("group");
  const int64_t count = file.number("batch") * file.number("heads") * blocks;
  Memory out(static_cast<size_t>(count * file.number("block_bytes")), kUnwritten);
  cuda::kv_pack({.shape = kv_shape(file),
                 .batch = file.number("batch"),
                 .heads = file.number("heads"),
                 .blocks = blocks,
                 .keys = kv_tokens(file, "keys", "heads", tokens),
                 .values = kv_tokens(file, "values", "heads", tokens),
                 .out = out.as<uint8_t>(),
                 .parallel_for = nullptr},
                nullptr);
  Outputs outputs;
  outputs["out"] = std::move(out);
  return outputs;
}

std::vector<KvPage> kv_pages(const CaseFile& file) {
  std::vector<KvPage> pages;
  for (int64_t i = 0; i < file.number("pages"); ++i) {
    const Memory& page = file.tensor("page" + std::to_string(i));
    const int64_t of_head = static_cast<int64_t>(page.bytes()) / (file.number("batch") * file.number("heads"));
    pages.push_back({page.as<uint8_t>(), of_head / file.number("block_bytes"), of_head});
  }
  return pages;
}

Outputs kv_unpack(const CaseFile& file) {
  const int64_t recent = file.number("recent"), tokens = file.number("n") - file.number("first") + recent;
  const std::vector<KvPage> pages = kv_pages(file);
  const DType dtype = file.dtype("dtype");
  const size_t bytes = bytes_of(dtype, file.number("batch") * file.number("heads") * tokens * file.number("k"));
  Memory keys(bytes, kUnwritten), values(bytes, kUnwritten);
  const KvExact exact{kv_tokens(file, "keys", "heads", recent), kv_tokens(file, "values", "heads", recent), recent};
  cuda::kv_unpack({.shape = kv_shape(file),
                   .batch = file.number("batch"),
                   .heads = file.number("heads"),
                   .pages = pages.data(),
                   .page_count = static_cast<int64_t>(pages.size()),
                   .first = file.number("first"),
                   .exact = &exact,
                   .exact_count = 1,
                   .dtype = dtype,
                   .keys = keys.data(),
                   .values = values.data(),
                   .parallel_for = nullptr},
                  nullptr);
  Outputs outputs;
  outputs["out keys"] = std::move(keys);
  outputs["out values"] = std::move(values);
  return outputs;
}

Outputs kv_attention(const CaseFile& file) {
  const int64_t batch = file.number("batch"), heads = file.number("heads"), rows = file.number("rows");
  const int64_t recent = file.number("recent"), seen = file.number("n") - file.number("first") + recent;
  const std::vector<KvPage> pages = kv_pages(file);
  KvAttentionArgs args{.shape = kv_shape(file),
                       .batch = batch,
                       .heads = heads,
                       .query_heads = file.number("query_heads"),
                       .rows = rows,
                       .query = kv_tokens(file, "query", "query_heads", rows),
                       .pages = pages.data(),
                       .page_count = static_cast<int64_t>(pages.size()),
                       .first = file.number("first"),
                       .keys = kv_tokens(file, "keys", "heads", recent),
                       .values = kv_tokens(file, "values", "heads", recent),
                       .recent = recent,
                       .mask = static_cast<KvMask>(file.number("mask")),
                       .mask_data = file.data("mask"),
                       .mask_dtype = file.dtype("dtype"),
                       .mask_strides = {rows * seen, 0, seen, 1},
                       .scale = *file.tensor("scale").as<float>(),
                       .out = nullptr,
                       .parallel_for = nullptr};
  Memory out(bytes_of(file.dtype("dtype"), batch * rows * args.query_heads * args.shape.head), kUnwritten);
  args.out = out.data();
  const Memory workspace(static_cast<size_t>(cuda::kv_attention_workspace(args)), kUnwritten);
  cuda::kv_attention(args, workspace.data(), nullptr);
  cuda::emulator::synchronize();
  Outputs outputs;
  outputs["y"] = std::move(out);
  return outputs;
}

Outputs run(const CaseFile& file) {
  const std::map<std::string, Outputs (*)(const CaseFile&)> ops = {{"linear", linear},
                                                                   {"linear_int8", linear_int8},
                                                                   {"linear_grad_x", linear_grad_x},
                                                                   {"decode", decode},
                                                                   {"encode", encode},
                                                                   {"pack", pack},
                                                                   {"gptq_columns", gptq_columns},
                                                                   {"search_steps", search_steps},
                                                                   {"kv_pack", kv_pack},
                                                                   {"kv_unpack", kv_unpack},
                                                                   {"kv_attention", kv_attention}};
  Outputs outputs = ops.at(file.text("op"))(file);
  cuda::emulator::synchronize();
  return outputs;
}

// ---- comparisons ----

double value_of(const Memory& memory, DType dtype, size_t i) {
  switch (dtype) {
    case DType::F16: return half_to_float(memory.as<uint16_t>()[i]);
    case DType::BF16: return bf16_to_float(memory.as<uint16_t>()[i]);
    case DType::F32: return memory.as<float>()[i];
    default: return memory.as<double>()[i];
  }
}

[[noreturn]] void differ(const std::string& name, size_t i, double actual, double expected) {
  std::ostringstream text;
  text << name << "[" << i << "] is " << actual << ", expected " << expected;
  throw std::runtime_error(text.str());
}

// Products within their tolerance, infinities and NaN where they should be, everything else to the bit.
void compare(const CaseFile& file, const Outputs& outputs) {
  for (const auto& [name, memory] : outputs) {
    const Memory& expected = file.tensor("expected " + name);
    if (name == "y") {
      for (size_t i = 0; i < expected.bytes() / sizeof(double); ++i) {
        const double actual = value_of(memory, file.dtype("dtype"), i), wanted = expected.as<double>()[i];
        const double tolerance = file.tensor("tolerance").as<double>()[i];
        const bool right = std::isfinite(wanted) ? std::fabs(actual - wanted) <= tolerance
                                                 : actual == wanted || (std::isnan(actual) && std::isnan(wanted));
        if (!right) differ(name, i, actual, wanted);
      }
    } else {
      if (memory.bytes() != expected.bytes()) throw std::runtime_error(name + " has another size");
      for (size_t i = 0; i < memory.bytes(); ++i) {
        if (memory.data()[i] != expected.data()[i]) differ(name + " byte", i, memory.data()[i], expected.data()[i]);
      }
    }
  }
}

void check(const char* path, int schedules) {
  const CaseFile file(path);
  Outputs first;
  for (int i = 0; i < schedules; ++i) {
    cuda::emulator::config() = cuda::emulator::schedule(i);
    cuda::emulator::config().multiprocessors = static_cast<int>(file.number("multiprocessors"));
    cuda::emulator::config().capability = static_cast<int>(file.number("capability"));
    cuda::emulator::config().shared_bytes = cuda::shared_bytes_of(cuda::emulator::config().capability);
    cuda::emulator::config().ahead = 1 + i % 3;
    Outputs outputs = run(file.written_by_a_kernel());
    compare(file, outputs);
    if (i == 0) {
      first = std::move(outputs);
      continue;
    }
    for (const auto& [name, memory] : outputs) {
      if (std::memcmp(memory.data(), first.at(name).data(), memory.bytes()) != 0) {
        throw std::runtime_error(name + " has other bits in schedule " + std::to_string(i));
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 2; i < count; ++i) {
    try {
      check(arguments[i], std::atoi(arguments[1]));
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", arguments[i], error.what());
      return 1;
    }
  }
  return count < 3;
}
