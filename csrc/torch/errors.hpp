// C++'s exceptions as Python's. From the functions of module.cpp pybind11 makes them so; what leaves an op comes to
// Python through torch, which makes a RuntimeError of each from 2.15 on, unless it is Python's own already.
#pragma once

#include <torch/csrc/stable/library.h>

namespace bitfold {

// Within a catch block: a ValueError of std::invalid_argument, a MemoryError of std::bad_alloc, which pybind11 has for
// them too; all else as it is.
[[noreturn]] void throw_for_python();

// What TORCH_BOX makes of an op.
template <auto Boxed>
void with_python_errors(StableIValue* stack, uint64_t arguments, uint64_t results) {
  try {
    Boxed(stack, arguments, results);
  } catch (...) {
    throw_for_python();
  }
}

}  // namespace bitfold
