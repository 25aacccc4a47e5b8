// The file of a kernel's case (case_file.py): lines "name value", of which "tensor name" has the number of bytes, then
// an empty line, then the tensors. Everything that a kernel is given is a heap block of its own of exactly the size
// that it should need, so that AddressSanitizer sees the first byte beyond; and another kernel, launched just before
// the op's, writes it, so that nobody may look at it earlier.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "formats/args.hpp"

namespace bitfold::cuda::test {

inline constexpr int kUnwritten = 0xa5;

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

class CaseFile {
 public:
  explicit CaseFile(const char* path);

  // The same, with tensors that aren't written before the next kernel, which is launched here, has run.
  CaseFile written_by_a_kernel() const;

  const std::string& text(const std::string& name) const { return values_.at(name); }
  int64_t number(const std::string& name) const { return std::stoll(text(name)); }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  const Memory& tensor(const std::string& name) const { return tensors_.at(name); }
  void* data(const std::string& name) const { return has(name) ? tensor(name).data() : nullptr; }

  DType dtype(const std::string& name) const;
  Format format() const { return parse_format(text("format")); }
  Layout layout() const { return parse_layout(text("layout")); }

  Weight weight() const;
  MatrixIn matrix(const std::string& name) const;

 private:
  CaseFile() = default;

  std::map<std::string, std::string> values_;
  std::map<std::string, Memory> tensors_;
  std::vector<MemoryCopy> copies_;
};

inline size_t bytes_of(DType dtype, int64_t count) { return static_cast<size_t>(count * dtype_bits(dtype) / 8); }

}  // namespace bitfold::cuda::test
