#include "torch/border.hpp"

#include <cstdint>
#include <stdexcept>

// In torch's header only for those who build for torch 2.13 and nothing older.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace bitfold::border {

void fail(const std::string& sentence) { throw std::invalid_argument(sentence); }

std::string torch_reason() {
  if (&torch_exception_get_what_without_backtrace == nullptr) return "";
  return std::string(": ") + torch_exception_get_what_without_backtrace();
}

namespace {

std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::string text = "[";
  for (int64_t i = 0; i < dims; ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int64_t> extent_sizes(const PlaneLaw& law, int64_t n, int64_t k) {
  const Extent extent = plane_extent(law, n, k);
  return extent.dims == 1 ? std::vector<int64_t>{extent.columns} : std::vector<int64_t>{extent.rows, extent.columns};
}

void check_size(const Format& format, int64_t n, int64_t k) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (n < 0 || n > kMost) fail("n is " + std::to_string(n) + "; it must be between 0 and 2^31");
  if (k < 0 || k > kMost) fail("k is " + std::to_string(k) + "; it must be between 0 and 2^31");
  if (format.is_block() && k % format.group != 0) {
    fail("k is " + std::to_string(k) + "; for " + to_string(format) + " it must be a multiple of " +
         std::to_string(format.group));
  }
}

// Kernels for GPUs load 16 bytes at once.
constexpr uintptr_t kGpuAlignment = 16;

}  // namespace

std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes().data(), tensor.dim()); }

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::U8: return ScalarType::Byte;
    case DType::F16: return ScalarType::Half;
    case DType::BF16: return ScalarType::BFloat16;
    case DType::F32: return ScalarType::Float;
    default: return ScalarType::Double;
  }
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

DType float_dtype(ScalarType type, const std::string& what) {
  switch (type) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    case ScalarType::Double: return DType::F64;
    default: fail(what + " is " + dtype_name(type) + "; it must be float32, bfloat16, float16 or float64");
  }
}

Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return empty_beside(like, std::vector<int64_t>(shape), type);
}

Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  try {
    return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
  } catch (const std::exception&) {  // whose text is where in torch's header the call was
    throw std::runtime_error(
        "torch has no memory " +
        (like.is_cuda() ? "on cuda:" + std::to_string(like.get_device_index()) : std::string("of the CPU")) +
        " for a " + dtype_name(type) + " tensor of shape " +
        shape_text(shape.data(), static_cast<int64_t>(shape.size())) + torch_reason());
  }
}

Device device_of(const std::vector<Tensor>& planes) {
  if (planes.empty()) fail("planes is empty; it must hold the planes of the format");
  return Device(planes[0], "planes[0]");
}

Weight read_weight(const Device& device, const std::vector<Tensor>& planes, const std::string& format_text, int64_t n,
                   int64_t k, const std::string& layout_text) {
  const Format format = parse_format(format_text);
  const Layout layout = parse_layout(layout_text);
  check_size(format, n, k);
  if (layout == Layout::Flat && (format.info().grid != Grid::Codebook || format.group < 1)) {
    fail("layout is 'flat', which only nf4 and fp4 have; for " + format_text + " it must be 'rows'");
  }
  Weight w{format, layout, n, k, nullptr, nullptr, nullptr, nullptr, nullptr};
  const PlaneLaws laws = plane_laws(format);
  if (static_cast<int>(planes.size()) != laws.count) {
    fail("planes has " + std::to_string(planes.size()) + " tensors; " + format_text + " has " +
         std::to_string(laws.count));
  }
  for (size_t i = 0; i < planes.size(); ++i) {
    const PlaneLaw& law = laws.items[i];
    const Tensor& plane = planes[i];
    const std::string what = "planes[" + std::to_string(i) + "] (" + std::string(law.name) + ")";
    device.require(plane, what);
    if (plane.scalar_type() != scalar_type(law.dtype)) {
      fail(what + " is " + dtype_name(plane.scalar_type()) + "; for " + format_text + " it must be " +
           dtype_name(scalar_type(law.dtype)));
    }
    const Extent extent = plane_extent(law, w.plane_rows(), w.plane_columns());
    const auto sizes = plane.sizes();
    const bool fits =
        extent.dims == plane.dim() &&
        (extent.dims == 1 ? sizes[0] == extent.columns : sizes[0] == extent.rows && sizes[1] == extent.columns);
    if (!fits) {
      const std::vector<int64_t> expected = extent_sizes(law, w.plane_rows(), w.plane_columns());
      fail(what + " has shape " + shape_text(plane) + "; for " + format_text + " of a " + std::to_string(n) + " x " +
           std::to_string(k) + " weight it must be " + shape_text(expected.data(), extent.dims));
    }
    if (!plane.is_contiguous()) fail(what + " is not contiguous; it must be");
    const void* data = plane.const_data_ptr();
    if (device.gpu() && reinterpret_cast<uintptr_t>(data) % kGpuAlignment != 0) {
      fail(what + " starts at byte " + std::to_string(reinterpret_cast<uintptr_t>(data)) +
           "; on a GPU it must start at a multiple of " + std::to_string(kGpuAlignment) + ", as a clone of it does");
    }
    set_plane(&w, law.plane, data);
  }
  return w;
}

std::vector<Tensor> new_planes(const Tensor& like, const Format& format, int64_t n, int64_t k, PlanesOut* out) {
  check_size(format, n, k);
  std::vector<Tensor> planes;
  const PlaneLaws laws = plane_laws(format);
  for (int i = 0; i < laws.count; ++i) {
    const PlaneLaw& law = laws.items[static_cast<size_t>(i)];
    const std::vector<int64_t> sizes = extent_sizes(law, n, k);
    planes.push_back(empty_beside(like, sizes, scalar_type(law.dtype)));
    set_plane(out, law.plane, planes.back().mutable_data_ptr());
  }
  return planes;
}

MatrixIn read_matrix(const Tensor& tensor, const std::string& what, std::optional<Tensor>* owner) {
  const DType dtype = float_dtype(tensor.scalar_type(), what);
  const int64_t dims = tensor.dim();
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto last = static_cast<size_t>(dims - 1);
  int64_t rows = 1, row_stride = 0;
  bool walks = true;  // one stride leads from row to row through all leading dimensions
  for (size_t i = last; i-- > 0;) {
    if (sizes[i] != 1) {
      if (rows == 1) {
        row_stride = strides[i];
      } else {
        walks = walks && strides[i] == row_stride * rows;
      }
    }
    rows *= sizes[i];
  }
  if (walks || rows == 0) return {tensor.const_data_ptr(), dtype, rows, sizes[last], row_stride, strides[last]};
  *owner = torch::stable::contiguous(tensor);
  return {(*owner)->const_data_ptr(), dtype, rows, sizes[last], sizes[last], 1};
}

MatrixIn read_activations(const Device& device, const Tensor& x, const char* what, const char* width, int64_t columns,
                          std::optional<Tensor>* owner) {
  device.require(x, what);
  if (x.dim() < 1 || x.size(x.dim() - 1) != columns) {
    fail(std::string(what) + " has shape " + shape_text(x) + "; its last dimension must be " + width + " = " +
         std::to_string(columns));
  }
  return read_matrix(x, what, owner);
}

std::vector<int64_t> shape_beside(const Tensor& x, int64_t columns) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = columns;
  return shape;
}

std::optional<Tensor> read_bias(const Device& device, const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (!bias) return std::nullopt;
  device.require(*bias, "bias");
  if (bias->scalar_type() != x.scalar_type()) {
    fail(std::string("bias is ") + dtype_name(bias->scalar_type()) + "; it must be " + dtype_name(x.scalar_type()) +
         " like x");
  }
  if (bias->dim() != 1 || bias->size(0) != n)
    fail("bias has shape " + shape_text(*bias) + "; it must be [" + std::to_string(n) + "]");
  return torch::stable::contiguous(*bias);
}

}  // namespace bitfold::border
