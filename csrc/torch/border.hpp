// The border: torch's tensors become args structs here, and every argument is checked here, once. An error is one
// sentence that names the argument, what it was, and what it must be.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "formats/args.hpp"
#include "torch/device.hpp"

namespace bitfold::border {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& sentence);

std::string shape_text(const Tensor& tensor);
ScalarType scalar_type(DType dtype);
const char* dtype_name(ScalarType type);

// fp32, bf16, fp16 or float64; else an error that names `what`.
DType float_dtype(ScalarType type, const std::string& what);

// An uninitialised tensor beside `like`. Where torch has none to give, a runtime_error that says what was asked for.
Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type);
Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type);

// Planes of an n x k weight, checked against the format's laws; all on `device`.
Weight read_weight(const Device& device, const std::vector<Tensor>& planes, const std::string& format, int64_t n,
                   int64_t k, const std::string& layout);
// New planes for an n x k weight, in the order of the laws, and where their bytes are.
std::vector<Tensor> new_planes(const Tensor& like, const Format& format, int64_t n, int64_t k, PlanesOut* out);

// A tensor of at least one dimension as rows: leading dimensions are flattened; `owner` keeps a copy alive where no
// single stride walks over the rows.
MatrixIn read_matrix(const Tensor& tensor, const std::string& what, std::optional<Tensor>* owner);

}  // namespace bitfold::border
