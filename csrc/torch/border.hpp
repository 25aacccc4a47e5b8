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
// Behind a colon why the last call of torch's stable interface failed, in torch's words; before torch 2.13, which keeps
// them to itself, nothing.
std::string torch_reason();

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
// Planes decide where an op runs.
Device device_of(const std::vector<Tensor>& planes);
// New planes for an n x k weight, in the order of the laws, and where their bytes are.
std::vector<Tensor> new_planes(const Tensor& like, const Format& format, int64_t n, int64_t k, PlanesOut* out);

// A tensor of at least one dimension as rows: leading dimensions are flattened; `owner` keeps a copy alive where no
// single stride walks over the rows.
MatrixIn read_matrix(const Tensor& tensor, const std::string& what, std::optional<Tensor>* owner);
// The same of x or grad, `what`: its last dimension must be `columns`, which messages call `width`.
MatrixIn read_activations(const Device& device, const Tensor& x, const char* what, const char* width, int64_t columns,
                          std::optional<Tensor>* owner);
// A bias of x's dtype and n numbers, contiguous; none of none.
std::optional<Tensor> read_bias(const Device& device, const std::optional<Tensor>& bias, const Tensor& x, int64_t n);
// x's shape, with as many numbers in a row.
std::vector<int64_t> shape_beside(const Tensor& x, int64_t columns);

}  // namespace bitfold::border
