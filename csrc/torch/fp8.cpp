// linear_fp8: x rounded to e4m3, row by row, and multiplied as it is then.
//
// On the CPU the product is that of linear, with a row's scale at its end. On a GPU it is torch's own for 8-bit floats
// (aten::_scaled_mm), which takes what it can take with a scale for each row of x and one for each row of W; everything
// else is refused.
#include "torch/fp8.hpp"

#include <cmath>

#include "torch/products.hpp"

namespace bitfold::border {
namespace {

// One positive number, on the device of x. A GPU isn't asked for its value, which would be waiting for it.
const float* read_x_scale(const Device& device, const std::optional<Tensor>& x_scale) {
  if (!x_scale) return nullptr;
  device.require(*x_scale, "x_scale");
  if (x_scale->scalar_type() != ScalarType::Float || x_scale->numel() != 1) {
    fail("x_scale is a " + std::string(dtype_name(x_scale->scalar_type())) + " of shape " + shape_text(*x_scale) +
         "; it must be one float32");
  }
  const auto* scale = static_cast<const float*>(x_scale->const_data_ptr());
  if (x_scale->is_cpu() && !(std::isfinite(*scale) && *scale > 0.0f))
    fail("x_scale is " + std::to_string(*scale) + "; it must be above 0 and finite");
  return scale;
}

// x [rows, k] as codes and scales [rows, 1].
std::vector<Tensor> round_matrix(const Device& device, const Tensor& x, const MatrixIn& rows, const float* x_scale) {
  Tensor codes = empty_beside(x, {rows.rows, rows.columns}, ScalarType::Byte);
  Tensor scales = empty_beside(x, {rows.rows, 1}, ScalarType::Float);
  device.round_fp8({rows, x_scale, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                    static_cast<float*>(scales.mutable_data_ptr()), nullptr});
  return {codes, scales};
}

Tensor as_e4m3(const Tensor& codes) { return call_torch("aten::view", "dtype", codes, ScalarType::Float8_e4m3fn); }

// What torch's product for 8-bit floats asks for. From compute capability 8.9 on GPUs have instructions for them.
void require_scaled_product(const Device& device, const Weight& w, const Tensor& x) {
  constexpr int kCapability = 89, kMultiple = 16;
  const int capability = device.capability();
  const std::string gpu = "on a GPU activations of 8-bit floats are multiplied by torch, ";
  if (x.is_cuda() && capability < kCapability) {
    fail("x is on a GPU of compute capability " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10) + "; activations of 8-bit floats need 8.9 or higher");
  }
  if (w.format.row != kE4m3 || w.format.group > 0 || w.format.scale != Scale::F32) {
    fail("format is '" + to_string(w.format) + "'; " + gpu + "which needs 'fp8-e4m3-channel' or 'fp8-e4m3-tensor'");
  }
  if (x.scalar_type() != ScalarType::BFloat16)
    fail(std::string("x is ") + dtype_name(x.scalar_type()) + "; " + gpu + "which needs bfloat16");
  if (w.n == 0 || w.k == 0 || w.n % kMultiple != 0 || w.k % kMultiple != 0) {
    fail("the weight is " + std::to_string(w.n) + " x " + std::to_string(w.k) + "; " + gpu +
         "which needs multiples of " + std::to_string(kMultiple));
  }
}

Tensor scaled_product(const Device& device, const Tensor& x, const MatrixIn& rows, const Weight& w,
                      const std::vector<Tensor>& planes, const std::optional<Tensor>& bias, const float* x_scale) {
  const std::vector<int64_t> shape = shape_beside(x, w.n);
  if (rows.rows == 0) return empty_rows(x, w.n);
  const std::vector<Tensor> rounded = round_matrix(device, x, rows, x_scale);
  const Tensor scales = call_torch("aten::expand", "", planes[kScales], std::vector<int64_t>{w.n, 1}, false);
  const Tensor row_of_scales = torch::stable::contiguous(call_torch("aten::t", "", scales));
  const Tensor y =
      torch_product("aten::_scaled_mm", as_e4m3(rounded[0]), call_torch("aten::t", "", as_e4m3(planes[0])), rounded[1],
                    row_of_scales, bias, std::optional<Tensor>(), std::optional<ScalarType>(x.scalar_type()), false);
  return torch::stable::reshape(y, {shape.data(), shape.size()});
}

}  // namespace

std::vector<Tensor> round_fp8(const Tensor& x, std::optional<Tensor> x_scale) {
  const Device device(x, "x");
  if (x.dim() < 1) fail("x has no dimensions; it must have at least one");
  std::optional<Tensor> owner;
  const MatrixIn rows = read_matrix(x, "x", &owner);
  std::vector<Tensor> rounded = round_matrix(device, x, rows, read_x_scale(device, x_scale));
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const std::vector<int64_t> leading(shape.begin(), shape.end() - 1);
  return {torch::stable::reshape(rounded[0], {shape.data(), shape.size()}),
          torch::stable::reshape(rounded[1], {leading.data(), leading.size()})};
}

Tensor linear_fp8(const Tensor& x, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
                  std::optional<Tensor> bias, std::optional<Tensor> x_scale) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, "rows");
  if (w.format.is_block()) {
    fail("format is '" + to_string(w.format) +
         "'; activations of 8-bit floats are for formats with planes, such as 'fp8-e4m3-channel'");
  }
  std::optional<Tensor> owner;
  const MatrixIn rows = read_activations(device, x, "x", "k", k, &owner);
  const std::optional<Tensor> dense_bias = read_bias(device, bias, x, n);
  const float* scale = read_x_scale(device, x_scale);
  if (device.gpu()) {
    require_scaled_product(device, w, x);
    return scaled_product(device, x, rows, w, planes, dense_bias, scale);
  }
  Tensor y = empty_rows(x, n);
  device.linear_fp8(
      {{w, rows, dense_bias ? dense_bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), nullptr}, scale});
  return y;
}

}  // namespace bitfold::border
