#include "case_file.hpp"

#include <fstream>
#include <stdexcept>

#include "cuda/device.hpp"

namespace bitfold::cuda::test {
namespace {

__global__ void write_all(const MemoryCopy* copies, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
}

}  // namespace

CaseFile::CaseFile(const char* path) {
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

CaseFile CaseFile::written_by_a_kernel() const {
  CaseFile later;
  later.values_ = values_;
  for (const auto& [name, tensor] : tensors_) {
    Memory& memory = later.tensors_[name] = Memory(tensor.bytes(), kUnwritten);
    const MemoryCopy copy{memory.data(), tensor.data(), tensor.bytes()};
    if (name == "scale") write_all(&copy, 1);  // which the host looks at
    else later.copies_.push_back(copy);
  }
  launch({.grid = 1, .block = 1, .shared_bytes = 0, .name = "write_all", .stream = nullptr}, write_all,
         later.copies_.data(), later.copies_.size());
  return later;
}

DType CaseFile::dtype(const std::string& name) const {
  static const std::map<std::string, DType> kNames = {
      {"fp16", DType::F16}, {"bf16", DType::BF16}, {"fp32", DType::F32}, {"fp64", DType::F64}};
  return kNames.at(text(name));
}

Weight CaseFile::weight() const {
  Weight w{format(), layout(), number("n"), number("k"), nullptr, nullptr, nullptr, nullptr, nullptr};
  const PlaneLaws laws = plane_laws(w.format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    set_plane(&w, law.plane, data(std::string(law.name)));
  }
  return w;
}

MatrixIn CaseFile::matrix(const std::string& name) const {
  return {data(name), dtype("dtype"), number("rows"), number("columns"), number("row_stride"), number("column_stride")};
}

}  // namespace bitfold::cuda::test
