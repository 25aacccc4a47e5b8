#include "torch/errors.hpp"

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

namespace bitfold {
namespace {

[[noreturn]] void raise(PyObject* type, const char* sentence) {
  const pybind11::gil_scoped_acquire python;
  pybind11::set_error(type, sentence);
  throw pybind11::error_already_set();
}

}  // namespace

void throw_for_python() {
  try {
    throw;
  } catch (const std::invalid_argument& error) {
    raise(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    raise(PyExc_MemoryError, "there is no memory for what the op keeps beside its result");
  }
}

}  // namespace bitfold
