// Every torch op: its schema, and what it does with torch's tensors on any device. docs/formats.md defines planes and
// layouts.
//
// On a GPU linear, linear_grad_x, decode and embedding neither wait nor allocate but through torch, so that CUDA graphs
// can capture them. What the others have to look at is copied to the host.
#include <array>
#include <cmath>
#include <cstdio>

#include "cuda/plan.hpp"
#include "torch/border.hpp"
#include "torch/errors.hpp"
#include "torch/fp8.hpp"
#include "torch/gptq.hpp"
#include "torch/int8.hpp"
#include "torch/kv.hpp"
#include "torch/products.hpp"

namespace bitfold {
namespace {

using namespace border;

// torch.ops.bitfold, and the tests' torch.ops.bitfold_emulated.
#if defined(BITFOLD_EMULATED)
#define BITFOLD_NAMESPACE bitfold_emulated
#else
#define BITFOLD_NAMESPACE bitfold
#endif
#define BITFOLD_LIBRARY(name) STABLE_TORCH_LIBRARY(name, library)
#define BITFOLD_LIBRARY_IMPL(name, key) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
#define BITFOLD_BOX(op) &with_python_errors<TORCH_BOX(&op)>

BITFOLD_LIBRARY(BITFOLD_NAMESPACE) {
  library.def(
      "encode(Tensor weight, str format, Tensor? nested_offset=None, bool clamp=False, Tensor? importance=None) -> "
      "Tensor[]");
  library.def(
      "decode(Tensor[] planes, str format, SymInt n, SymInt k, ScalarType dtype, str layout=\"rows\") -> Tensor");
  library.def("pack(Tensor codes, Tensor? scales, Tensor? zeros, str format, Tensor[] nested) -> Tensor[]");
  library.def("unpack(Tensor[] planes, str format, SymInt n, SymInt k, str layout=\"rows\") -> Tensor[]");
  library.def(
      "linear(Tensor x, Tensor[] planes, str format, SymInt n, SymInt k, Tensor? bias=None, str layout=\"rows\", "
      "str activations=\"float\") -> Tensor");
  library.def(
      "linear_grad_x(Tensor grad, Tensor[] planes, str format, SymInt n, SymInt k, str layout=\"rows\") -> Tensor");
  library.def(
      "embedding(Tensor ids, Tensor[] planes, str format, SymInt n, SymInt k, ScalarType dtype, str layout=\"rows\") "
      "-> Tensor");
  library.def(
      "linear_int8(Tensor x, Tensor[] planes, str format, SymInt n, SymInt k, Tensor? bias=None, float threshold=0, "
      "bool per_row=False, Tensor? x_scale=None, Tensor? outlier_columns=None, Tensor? outlier_weight=None) -> Tensor");
  library.def(
      "linear_fp8(Tensor x, Tensor[] planes, str format, SymInt n, SymInt k, Tensor? bias=None, Tensor? x_scale=None) "
      "-> Tensor");
  library.def("round_fp8(Tensor x, Tensor? x_scale=None) -> Tensor[]");
  library.def("block_grid(Tensor blocks, str format, SymInt n, SymInt k) -> Tensor[]");
  library.def("put_block_codes(Tensor blocks, Tensor codes, str format) -> Tensor");
  library.def("gptq_factor(Tensor hessian, Tensor order, float unit, float damping) -> Tensor[]");
  library.def(
      "gptq_columns(Tensor weight, Tensor order, Tensor factor, int begin, Tensor step, Tensor offset, Tensor group, "
      "Tensor? table, int low, int high, Tensor? behind=None, bool round=True) -> Tensor[]");
  library.def(
      "search_steps(Tensor weight, int group, Tensor start, Tensor factors, ScalarType stored, Tensor? zeros, "
      "Tensor? importance, Tensor? table, int low, int high) -> Tensor[]");
  library.def("kv_pack(Tensor keys, Tensor values, str format, int group, int value_group) -> Tensor");
  library.def(
      "kv_unpack(Tensor[] pages, SymInt blocks, SymInt first, Tensor[] keys, Tensor[] values, str format, int group, "
      "int value_group) -> Tensor[]");
  library.def(
      "kv_attention(Tensor query, Tensor[] pages, SymInt blocks, SymInt first, Tensor keys, Tensor values, str format, "
      "int group, int value_group, Tensor? mask=None, float scale=1.0) -> Tensor");
}

std::string scale_advice(const Format& format) {
  Format wider = format;
  wider.scale = format.scale == Scale::F16 ? Scale::BF16 : Scale::F32;
  return format.scale == Scale::F32 ? std::string("rescale the weight") : "use '" + to_string(wider) + "'";
}

void report(const EncodeStatus& status, const Format& format, const Tensor& weight) {
  const std::string name = to_string(format);
  const std::string at = "weight[" + std::to_string(status.row) + ", " + std::to_string(status.column) + "]";
  const std::string group = format.group == kPerTensor    ? std::string("the weight")
                            : format.group == kPerChannel ? "row " + std::to_string(status.row)
                            : format.row_shift > 0        ? "the block that starts at " + at
                                                          : "group " + std::to_string(status.column / format.group) +
                                                                " of row " + std::to_string(status.row);
  char value[32];
  std::snprintf(value, sizeof(value), "%.3g", status.value);
  const auto fail_block = [&] {
    fail("block " + std::to_string(status.column / format.group) + " of row " + std::to_string(status.row) +
         ", whose largest weight is " + value + ", needs a scale that " + name + " can't hold; rescale the weight");
  };
  switch (status.fault) {
    case EncodeFault::None: return;
    case EncodeFault::NotFinite:
      fail(at + " is " + (status.value != status.value ? "NaN" : "infinite") +
           (weight.scalar_type() == ScalarType::Double ? " as a float32" : "") + "; it must be finite");
    case EncodeFault::CastOverflow:
      fail(std::to_string(status.count) + " values do not fit " + name + ", the first is " + at + " = " +
           std::to_string(status.value) + "; use bf16, or clamp=True to saturate them");
    case EncodeFault::ScaleOverflow:
      if (format.is_block()) fail_block();
      fail("the scale of " + group + " is " + std::to_string(status.value) + ", too large for the scale dtype of " +
           name + "; " + scale_advice(format));
    case EncodeFault::ScaleUnderflow:
      if (format.is_block()) fail_block();
      fail("the scale of " + group + " is " + value + ", too small for the scale dtype of " + name + "; " +
           scale_advice(format));
  }
}

// The importance of k columns as fp32, checked.
Tensor read_importance(const Device& device, const Tensor& importance, int64_t k) {
  device.require(importance, "importance");
  if (importance.scalar_type() != ScalarType::Float || importance.dim() != 1 || importance.size(0) != k) {
    fail("importance is a " + std::string(dtype_name(importance.scalar_type())) + " of shape " +
         shape_text(importance) + "; it must be a float32 of shape [" + std::to_string(k) + "]");
  }
  Tensor dense = torch::stable::contiguous(importance);
  const Tensor host = device.host(dense);
  const auto* values = static_cast<const float*>(host.const_data_ptr());
  bool some = k == 0;
  for (int64_t i = 0; i < k; ++i) {
    if (!std::isfinite(values[i]) || values[i] < 0.0f) {
      fail("importance[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
           "; it must be finite and at least 0");
    }
    some = some || values[i] > 0.0f;
  }
  if (!some) fail("importance is all 0; at least one column must count");
  return dense;
}

std::vector<Tensor> encode(const Tensor& weight, const std::string& format_text, std::optional<Tensor> nested_offset,
                           bool clamp, std::optional<Tensor> importance) {
  const Format format = parse_format(format_text);
  if (weight.dim() != 2) fail("weight has shape " + shape_text(weight) + "; it must have two dimensions");
  const Device device(weight, "weight");
  std::optional<Tensor> owner;
  const MatrixIn matrix = read_matrix(weight, "weight", &owner);
  const float* offset = nullptr;
  if (nested_offset) {
    if (format.scale != Scale::Nested) fail("nested_offset is given; " + to_string(format) + " has no nested scales");
    device.require(*nested_offset, "nested_offset");
    if (nested_offset->scalar_type() != ScalarType::Float || nested_offset->numel() != 1) {
      fail("nested_offset is a " + std::string(dtype_name(nested_offset->scalar_type())) + " of shape " +
           shape_text(*nested_offset) + "; it must be one float32");
    }
    offset = static_cast<const float*>(nested_offset->const_data_ptr());
    const Tensor host = device.host(*nested_offset);
    const float value = *static_cast<const float*>(host.const_data_ptr());
    if (!std::isfinite(value)) fail("nested_offset is " + std::to_string(value) + "; it must be finite");
  }
  if (clamp && format.info().grid != Grid::Cast && !format.is_block())
    fail("clamp is True; it must be False for " + to_string(format) + ", whose scales fit the weights");
  std::optional<Tensor> dense_importance;
  if (importance) {
    if (!format.is_block())
      fail("importance is given; for " + to_string(format) + " it must be None: only GGUF's blocks use it");
    dense_importance = read_importance(device, *importance, matrix.columns);
  }
  PlanesOut out{};
  std::vector<Tensor> planes = new_planes(weight, format, matrix.rows, matrix.columns, &out);
  const auto* columns = dense_importance ? static_cast<const float*>(dense_importance->const_data_ptr()) : nullptr;
  report(device.encode({format, matrix, out, clamp, offset, columns, nullptr}, weight), format, weight);
  return planes;
}

Tensor decode(const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k, ScalarType dtype,
              const std::string& layout) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, layout);
  const DType target = float_dtype(dtype, "dtype");
  Tensor out = empty_beside(planes[0], {n, k}, dtype);
  device.decode({w, nullptr, n, target, out.mutable_data_ptr(), nullptr});
  return out;
}

Tensor embedding(const Tensor& ids, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
                 ScalarType dtype, const std::string& layout) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, layout);
  const DType target = float_dtype(dtype, "dtype");
  device.require(ids, "ids");
  if (ids.scalar_type() != ScalarType::Long && ids.scalar_type() != ScalarType::Int) {
    fail(std::string("ids is ") + dtype_name(ids.scalar_type()) + "; it must be int64 or int32");
  }
  const Tensor rows = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const auto* data = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count && !device.gpu(); ++i) {  // a GPU's kernel looks itself
    if (data[i] < 0 || data[i] >= n)
      fail("ids holds " + std::to_string(data[i]) + "; it must be at least 0 and below " + std::to_string(n));
  }
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(k);
  Tensor out = empty_beside(ids, shape, dtype);
  device.decode({w, data, count, target, out.mutable_data_ptr(), nullptr});
  return out;
}

// ---- logical codes <-> bit streams ----

// A logical plane of codes or zeros: uint8, below 2^bits.
Tensor logical_codes(const Device& device, const Tensor& tensor, const std::string& what, int bits, int64_t rows,
                     int64_t columns) {
  device.require(tensor, what);
  if (tensor.scalar_type() != ScalarType::Byte)
    fail(what + " is " + dtype_name(tensor.scalar_type()) + "; it must be uint8");
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns) {
    fail(what + " has shape " + shape_text(tensor) + "; it must be [" + std::to_string(rows) + ", " +
         std::to_string(columns) + "]");
  }
  Tensor dense = torch::stable::contiguous(tensor);
  const Tensor host = device.host(dense);
  const auto* codes = static_cast<const uint8_t*>(host.const_data_ptr());
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (codes[i] >> bits != 0) {
      fail(what + " holds " + std::to_string(codes[i]) + "; it must be between 0 and " +
           std::to_string((1 << bits) - 1));
    }
  }
  return dense;
}

void require_planes(const Format& format) {
  if (format.is_block())
    fail("format is '" + to_string(format) +
         "', whose blocks hold codes and scales together; it must be one with planes");
}

// A plane that is stored as it is: a contiguous copy, checked by read_weight afterwards.
Tensor plain_copy(const Tensor& tensor) { return torch::stable::clone(torch::stable::contiguous(tensor)); }

std::vector<Tensor> pack(const Tensor& codes, std::optional<Tensor> scales, std::optional<Tensor> zeros,
                         const std::string& format_text, const std::vector<Tensor>& nested) {
  const Format format = parse_format(format_text);
  const std::string name = to_string(format);
  if (codes.dim() != 2) fail("codes has shape " + shape_text(codes) + "; it must have two dimensions");
  const Device device(codes, "codes");
  const int64_t n = codes.size(0), k = codes.size(1);
  const bool cast = format.info().grid == Grid::Cast;
  require_planes(format);
  if (scales.has_value() == cast)
    fail(cast ? "scales is given; " + name + " has none" : "scales is None; " + name + " needs them");
  const bool has_zeros = format.zero == Zero::Integer;
  if (zeros.has_value() != has_zeros)
    fail(has_zeros ? "zeros is None; " + name + " needs them" : "zeros is given; " + name + " has none");
  const size_t nested_count = format.scale == Scale::Nested ? 2 : 0;
  if (nested.size() != nested_count) {
    fail("nested has " + std::to_string(nested.size()) + " tensors; for " + name + " it must have " +
         std::to_string(nested_count));
  }
  std::vector<Tensor> planes;
  if (cast) {
    planes.push_back(plain_copy(codes));
  } else {
    PlanesOut out{};
    planes = new_planes(codes, format, n, k, &out);
    const Tensor logical = logical_codes(device, codes, "codes", format.bits(), n, k);
    Tensor logical_zeros = codes;
    if (has_zeros) {
      logical_zeros = logical_codes(device, *zeros, "zeros", format.bits(), format.group == kPerTensor ? 1 : n,
                                    groups_in_row(format, k));
    }
    device.pack({format, Layout::Rows, n, k, static_cast<uint8_t*>(logical.mutable_data_ptr()),
                 has_zeros ? static_cast<uint8_t*>(logical_zeros.mutable_data_ptr()) : nullptr,
                 static_cast<uint8_t*>(out.codes), out.zeros, nullptr});
    planes[kScales] = plain_copy(*scales);
    for (size_t i = 0; i < nested.size(); ++i) planes[planes.size() - nested.size() + i] = plain_copy(nested[i]);
  }
  read_weight(device, planes, format_text, n, k, "rows");
  return planes;
}

std::vector<Tensor> unpack(const std::vector<Tensor>& planes, const std::string& format_text, int64_t n, int64_t k,
                           const std::string& layout) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format_text, n, k, layout);
  require_planes(w.format);
  std::vector<Tensor> logical;
  if (w.format.info().grid == Grid::Cast) {
    logical.push_back(plain_copy(planes[0]));
    return logical;
  }
  logical.push_back(empty_beside(planes[0], {n, k}, ScalarType::Byte));
  uint8_t* zeros = nullptr;
  for (size_t i = 1; i < planes.size(); ++i) {
    const bool packed = i == kZeros && w.zeros != nullptr;
    logical.push_back(packed ? empty_beside(planes[0], {planes[i].size(0), groups_in_row(w.format, w.plane_columns())},
                                            ScalarType::Byte)
                             : plain_copy(planes[i]));
    if (packed) zeros = static_cast<uint8_t*>(logical.back().mutable_data_ptr());
  }
  device.unpack({w.format, w.layout, n, k, static_cast<uint8_t*>(logical[0].mutable_data_ptr()), zeros,
                 static_cast<uint8_t*>(const_cast<void*>(w.codes)), const_cast<uint8_t*>(w.zeros), nullptr});
  return logical;
}

// ---- products ----

// The weight decoded to x's dtype, or itself where it is stored in it: for torch's products.
Tensor decoded_for(const Device& device, const Tensor& x, const Weight& w, const Tensor& plane) {
  if (w.format.info().grid == Grid::Cast && plane.scalar_type() == x.scalar_type()) return plane;
  Tensor decoded = empty_beside(x, {w.n, w.k}, x.scalar_type());
  device.decode({w, nullptr, w.n, float_dtype(x.scalar_type(), "x"), decoded.mutable_data_ptr(), nullptr});
  return decoded;
}

Tensor linear(const Tensor& x, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
              std::optional<Tensor> bias, const std::string& layout, const std::string& activations_text) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, layout);
  const Activations kind = parse_activations(activations_text, w.format);
  std::optional<Tensor> x_owner;
  const MatrixIn rows = read_activations(device, x, "x", "k", k, &x_owner);
  const std::optional<Tensor> dense_bias = read_bias(device, bias, x, n);
  if (device.gpu() && kind != Activations::Float)
    fail("activations is 'int8', which the CPU alone has; on a GPU it must be 'float'");
  if (device.gpu() && cuda::plan_linear(w.format, w.layout, rows.rows, w.n, rows.dtype, device.wgmma()).regime ==
                          cuda::Regime::Matmul) {
    // As a matrix: of a vector or of many dimensions torch rounds the product before it adds the bias.
    const Tensor matrix = torch::stable::reshape(x, {rows.rows, k});
    const Tensor y = torch_product("aten::linear", torch::stable::contiguous(matrix),
                                   decoded_for(device, x, w, planes[0]), dense_bias);
    const std::vector<int64_t> shape = shape_beside(x, n);
    return torch::stable::reshape(y, {shape.data(), shape.size()});
  }
  Tensor y = empty_rows(x, n);
  device.linear({w, rows, dense_bias ? dense_bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), nullptr, kind}, x);
  return y;
}

Tensor linear_grad_x(const Tensor& grad, const std::vector<Tensor>& planes, const std::string& format, int64_t n,
                     int64_t k, const std::string& layout) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, layout);
  std::optional<Tensor> owner;
  const MatrixIn rows = read_activations(device, grad, "grad", "n", n, &owner);
  if (device.gpu() && cuda::plan_grad_x(w.format, w.layout, rows.rows, rows.dtype).regime == cuda::Regime::Matmul)
    return torch_product("aten::matmul", torch::stable::contiguous(grad), decoded_for(device, grad, w, planes[0]));
  Tensor dx = empty_rows(grad, k);
  device.linear_grad_x({w, rows, dx.mutable_data_ptr(), nullptr});
  return dx;
}

template <class Library>
void implement(Library& library) {
  library.impl("encode", BITFOLD_BOX(encode));
  library.impl("decode", BITFOLD_BOX(decode));
  library.impl("pack", BITFOLD_BOX(pack));
  library.impl("unpack", BITFOLD_BOX(unpack));
  library.impl("linear", BITFOLD_BOX(linear));
  library.impl("linear_grad_x", BITFOLD_BOX(linear_grad_x));
  library.impl("embedding", BITFOLD_BOX(embedding));
  library.impl("linear_int8", BITFOLD_BOX(linear_int8));
  library.impl("linear_fp8", BITFOLD_BOX(linear_fp8));
  library.impl("round_fp8", BITFOLD_BOX(round_fp8));
  library.impl("block_grid", BITFOLD_BOX(block_grid));
  library.impl("put_block_codes", BITFOLD_BOX(put_block_codes));
  library.impl("gptq_factor", BITFOLD_BOX(gptq_factor));
  library.impl("gptq_columns", BITFOLD_BOX(gptq_columns));
  library.impl("search_steps", BITFOLD_BOX(search_steps));
  library.impl("kv_pack", BITFOLD_BOX(kv_pack));
  library.impl("kv_unpack", BITFOLD_BOX(kv_unpack));
  library.impl("kv_attention", BITFOLD_BOX(kv_attention));
}

// With CUDA's key also where there are no kernels for it: Device says so in a sentence.
BITFOLD_LIBRARY_IMPL(BITFOLD_NAMESPACE, CPU) { implement(library); }
BITFOLD_LIBRARY_IMPL(BITFOLD_NAMESPACE, CUDA) { implement(library); }

}  // namespace
}  // namespace bitfold
