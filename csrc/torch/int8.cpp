#include "torch/int8.hpp"

#include <cmath>

#include "formats/int8.hpp"

namespace bitfold::border {
namespace {

std::string described(const Tensor& tensor) {
  return std::string("a ") + dtype_name(tensor.scalar_type()) + " of shape " + shape_text(tensor);
}

// One float32 number. What it is, a GPU is not asked: that would wait for it.
const float* read_scale(const Device& device, const Tensor& scale) {
  device.require(scale, "x_scale");
  if (scale.scalar_type() != ScalarType::Float || scale.numel() != 1)
    fail("x_scale is " + described(scale) + "; it must be one float32");
  const auto* value = static_cast<const float*>(scale.const_data_ptr());
  if (!device.gpu() && !(std::isfinite(*value) && *value > 0.0f))
    fail("x_scale is " + std::to_string(*value) + "; it must be above 0 and finite");
  return value;
}

// The columns of which there is a copy, and the copy.
void read_copy(const Device& device, const Tensor& columns, const Tensor& copy, int64_t n, int64_t k,
               LinearInt8Args* args) {
  device.require(columns, "outlier_columns");
  device.require(copy, "outlier_weight");
  if (columns.scalar_type() != ScalarType::Int || columns.dim() != 1)
    fail("outlier_columns is " + described(columns) + "; it must be an int32 of shape [c]");
  const int64_t count = columns.size(0);
  const bool small = copy.scalar_type() == ScalarType::Half || copy.scalar_type() == ScalarType::BFloat16;
  if (!small || copy.dim() != 2 || copy.size(0) != n || copy.size(1) != count) {
    fail("outlier_weight is " + described(copy) + "; it must be a float16 or bfloat16 of shape [" + std::to_string(n) +
         ", " + std::to_string(count) + "]");
  }
  if (!columns.is_contiguous()) fail("outlier_columns is not contiguous; it must be");
  if (!copy.is_contiguous()) fail("outlier_weight is not contiguous; it must be");
  args->columns = static_cast<const int32_t*>(columns.const_data_ptr());
  args->copy = copy.const_data_ptr();
  args->copy_dtype = float_dtype(copy.scalar_type(), "outlier_weight");
  args->copies = count;
  for (int64_t i = 0; i < count && !device.gpu(); ++i) {  // a GPU's kernel looks itself
    const int64_t column = args->columns[i], least = i > 0 ? args->columns[i - 1] + 1 : 0;
    if (column < least || column >= k) {
      fail("outlier_columns[" + std::to_string(i) + "] is " + std::to_string(column) + "; it must be at least " +
           std::to_string(least) + " and below " + std::to_string(k) + ": columns are ascending");
    }
  }
}

}  // namespace

Tensor linear_int8(const Tensor& x, const std::vector<Tensor>& planes, const std::string& format, int64_t n, int64_t k,
                   std::optional<Tensor> bias, double threshold, bool per_row, std::optional<Tensor> x_scale,
                   std::optional<Tensor> outlier_columns, std::optional<Tensor> outlier_weight) {
  const Device device = device_of(planes);
  const Weight w = read_weight(device, planes, format, n, k, "rows");
  if (w.format.row != kInt8 || w.format.group > 0) {
    fail("format is '" + to_string(w.format) +
         "'; for x rounded to 8 bits, row by row, it must be int8 with one scale for each row or for all, as "
         "'int8-channel'");
  }
  std::optional<Tensor> x_owner;
  const MatrixIn rows = read_activations(device, x, "x", "k", k, &x_owner);
  const std::optional<Tensor> dense_bias = read_bias(device, bias, x, n);
  if (device.gpu() && rows.dtype == DType::F64)
    fail("x is float64; with activations of 8 bits on a GPU it must be float32, bfloat16 or float16");
  if (!(threshold >= 0.0 && std::isfinite(threshold)))
    fail("threshold is " + std::to_string(threshold) + "; it must be at least 0 and finite, 0 for no outliers");
  if (x_scale && threshold > 0.0) fail("x_scale is given with a threshold; one of them must be left away");
  if (outlier_columns.has_value() != outlier_weight.has_value())
    fail("one of outlier_columns and outlier_weight is given; it must be both or none");
  LinearInt8Args args{w,          rows,      dense_bias ? dense_bias->const_data_ptr() : nullptr,
                      nullptr,    threshold, per_row,
                      nullptr,    nullptr,   nullptr,
                      DType::F16, 0,         nullptr};
  if (x_scale) args.x_scale = read_scale(device, *x_scale);
  if (outlier_columns) read_copy(device, *outlier_columns, *outlier_weight, n, k, &args);
  Tensor y = empty_beside(x, shape_beside(x, n), x.scalar_type());
  args.y = y.mutable_data_ptr();
  device.linear_int8(args, x);
  return y;
}

}  // namespace bitfold::border
