// Where a kernel's source calls an instruction.
#pragma once

#include <source_location>

namespace bitfold::cuda::emulator {

#ifdef __cpp_lib_source_location
using Where = std::source_location;
#else  // Clang before 16
class Where {
 public:
  static constexpr Where current(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE(),
                                 unsigned column = __builtin_COLUMN()) {
    Where where;
    where.file_ = file;
    where.line_ = line;
    where.column_ = column;
    return where;
  }
  constexpr const char* file_name() const { return file_; }
  constexpr unsigned line() const { return line_; }
  constexpr unsigned column() const { return column_; }

 private:
  const char* file_ = "";
  unsigned line_ = 0, column_ = 0;
};
#endif

}  // namespace bitfold::cuda::emulator
