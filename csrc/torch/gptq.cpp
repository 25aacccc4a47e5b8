#include "torch/gptq.hpp"

#include <cmath>

namespace bitfold::border {
namespace {

void require(const Device& device, const Tensor& tensor, const std::string& what, ScalarType type,
             std::initializer_list<int64_t> shape) {
  device.require(tensor, what);
  bool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  int64_t axis = 0;
  for (const int64_t size : shape) {
    wanted += (axis > 0 ? ", " : "") + std::to_string(size);
    fits = fits && tensor.size(axis++) == size;
  }
  if (!fits) {
    fail(what + " is a " + dtype_name(tensor.scalar_type()) + " of shape " + shape_text(tensor) + "; it must be a " +
         dtype_name(type) + " of shape [" + wanted + "]");
  }
  if (!tensor.is_contiguous()) fail(what + " is not contiguous; it must be");
}

// Contiguous int64 numbers below `end`, which a look at them on a GPU waits for.
const int64_t* indices(const Device& device, const Tensor& tensor, const std::string& what, int64_t count,
                       int64_t end) {
  require(device, tensor, what, ScalarType::Long, {count});
  const Tensor here = device.host(tensor);
  const auto* data = static_cast<const int64_t*>(here.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 0 || data[i] >= end) {
      fail(what + " holds " + std::to_string(data[i]) + "; it must be at least 0 and below " + std::to_string(end));
    }
  }
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// The whole numbers from low to high, or a table with places up to high.
void require_levels(const Device& device, const std::optional<Tensor>& table, int64_t low, int64_t high) {
  if (table) {
    require(device, *table, "table", ScalarType::Float, {high + 1});
    if (low != 0 || high < 0 || high >= kGptqLevels)
      fail("high is " + std::to_string(high) + "; with a table low must be 0 and high below " +
           std::to_string(kGptqLevels));
  } else if (low > high || high - low > 255) {
    fail("low is " + std::to_string(low) + " and high " + std::to_string(high) + "; there must be 1 to 256 levels");
  }
}

// Blocks of an n x k weight.
Weight read_blocks(const Device& device, const Tensor& blocks, const std::string& format, int64_t n, int64_t k) {
  if (device.gpu()) fail("blocks are on a GPU, where they aren't taken apart; they must be on the CPU");
  const Weight w = read_weight(device, {blocks}, format, n, k, "rows");
  if (!w.format.is_block()) fail("format is '" + format + "'; it must be one of GGUF's blocks");
  return w;
}

Scale stored_scale(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Scale::F16;
    case ScalarType::BFloat16: return Scale::BF16;
    case ScalarType::Float: return Scale::F32;
    default: fail(std::string("stored is ") + dtype_name(dtype) + "; it must be float16, bfloat16 or float32");
  }
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

}  // namespace

std::vector<Tensor> gptq_factor(const Tensor& hessian, const Tensor& order, double unit, double damping) {
  const Device device(hessian, "hessian");
  if (device.gpu()) fail("hessian is on a GPU, for which gptq_factor has no kernel; it must be on the CPU");
  if (hessian.dim() != 2 || hessian.size(0) != hessian.size(1))
    fail("hessian has shape " + shape_text(hessian) + "; it must be square");
  if (hessian.scalar_type() != ScalarType::Float && hessian.scalar_type() != ScalarType::Double)
    fail(std::string("hessian is ") + dtype_name(hessian.scalar_type()) + "; it must be float32 or float64");
  if (!(unit > 0.0) || !std::isfinite(unit))
    fail("unit is " + std::to_string(unit) + "; it must be finite and above 0");
  if (!(damping >= 0.0) || !std::isfinite(damping))
    fail("damping is " + std::to_string(damping) + "; it must be finite and at least 0");
  const int64_t k = hessian.size(0);
  const int64_t* columns = indices(device, order, "order", k, k);
  std::optional<Tensor> owner;
  const MatrixIn matrix = read_matrix(hessian, "hessian", &owner);
  Tensor factor = empty_beside(hessian, {k, k}, ScalarType::Float);
  Tensor info = empty_beside(hessian, {1}, ScalarType::Long);
  *static_cast<int64_t*>(info.mutable_data_ptr()) =
      device.gptq_factor({matrix, columns, unit, damping, static_cast<float*>(factor.mutable_data_ptr()), nullptr});
  return {factor, info};
}

std::vector<Tensor> block_grid(const Tensor& blocks, const std::string& format, int64_t n, int64_t k) {
  const Device device(blocks, "blocks");
  const Weight w = read_blocks(device, blocks, format, n, k);
  int64_t count = 0;
  const int64_t span = device.block_shape(w.format, &count);
  Tensor step = empty_beside(blocks, {k / span, n}, ScalarType::Float);
  Tensor offset = empty_beside(blocks, {k / span, n}, ScalarType::Float);
  Tensor levels = empty_beside(blocks, {count}, ScalarType::Float);
  Tensor codes = empty_beside(blocks, {count}, ScalarType::Byte);
  device.block_grid({w.format, n, k, w.codes, static_cast<float*>(step.mutable_data_ptr()),
                     static_cast<float*>(offset.mutable_data_ptr()), static_cast<float*>(levels.mutable_data_ptr()),
                     static_cast<uint8_t*>(codes.mutable_data_ptr()), nullptr});
  return {step, offset, levels, codes};
}

Tensor put_block_codes(const Tensor& blocks, const Tensor& codes, const std::string& format) {
  const Device device(blocks, "blocks");
  if (codes.dim() != 2) fail("codes has shape " + shape_text(codes) + "; it must have two dimensions");
  const int64_t n = codes.size(0), k = codes.size(1);
  const Weight w = read_blocks(device, blocks, format, n, k);
  require(device, codes, "codes", ScalarType::Byte, {n, k});
  Tensor out = torch::stable::clone(blocks);
  device.put_block_codes(
      {w.format, n, k, static_cast<const uint8_t*>(codes.const_data_ptr()), out.mutable_data_ptr(), nullptr});
  return out;
}

std::vector<Tensor> gptq_columns(const Tensor& weight, const Tensor& order, const Tensor& factor, int64_t begin,
                                 const Tensor& step, const Tensor& offset, const Tensor& group,
                                 std::optional<Tensor> table, int64_t low, int64_t high, std::optional<Tensor> behind,
                                 bool round) {
  const Device device(weight, "weight");
  if (weight.dim() != 2) fail("weight has shape " + shape_text(weight) + "; it must have two dimensions");
  if (factor.dim() != 2) fail("factor has shape " + shape_text(factor) + "; it must have two dimensions");
  const int64_t n = weight.size(0), c = weight.size(1), k = factor.size(0);
  require(device, weight, "weight", ScalarType::Float, {n, c});
  require(device, factor, "factor", ScalarType::Float, {k, k});
  if (begin < 0 || begin + c > k) {
    fail("begin is " + std::to_string(begin) + "; " + std::to_string(c) + " columns from there on must be within " +
         std::to_string(k));
  }
  const int64_t groups = step.dim() > 0 ? step.size(0) : 0;
  require(device, step, "step", ScalarType::Float, {groups, n});
  require(device, offset, "offset", ScalarType::Float, {groups, n});
  require_levels(device, table, low, high);
  if (behind) require(device, *behind, "behind", ScalarType::Float, {k - begin - c, n});
  else if (begin + c < k) fail("behind is None; it must hold the errors of the columns that were rounded before");
  Tensor codes = empty_beside(weight, {n, round ? c : 0}, ScalarType::Byte);
  Tensor errors = empty_beside(weight, {behind ? c : 0, n}, ScalarType::Float);
  Tensor loss = empty_beside(weight, {n}, ScalarType::Double);
  const GptqColumnsArgs args{
      .weight = {weight.const_data_ptr(), DType::F32, n, c, c, 1},
      .order = indices(device, order, "order", c, c),
      .group = indices(device, group, "group", c, groups),
      .factor = floats(factor),
      .k = k,
      .begin = begin,
      .behind = behind ? floats(*behind) : nullptr,
      .grid = {floats(step), floats(offset), groups, table ? floats(*table) : nullptr, low, high, round},
      .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
      .errors = behind ? static_cast<float*>(errors.mutable_data_ptr()) : nullptr,
      .loss = static_cast<double*>(loss.mutable_data_ptr()),
      .parallel_for = nullptr,
  };
  device.gptq_columns(args, weight);
  return {codes, errors, loss};
}

std::vector<Tensor> search_steps(const Tensor& weight, int64_t group, const Tensor& start, const Tensor& factors,
                                 ScalarType stored, std::optional<Tensor> zeros, std::optional<Tensor> importance,
                                 std::optional<Tensor> table, int64_t low, int64_t high) {
  const Device device(weight, "weight");
  if (weight.dim() != 2) fail("weight has shape " + shape_text(weight) + "; it must have two dimensions");
  if (factors.dim() != 1) fail("factors has shape " + shape_text(factors) + "; it must have one dimension");
  const int64_t n = weight.size(0), k = weight.size(1), tried = factors.size(0);
  require(device, weight, "weight", ScalarType::Float, {n, k});
  require(device, factors, "factors", ScalarType::Float, {tried});
  if (tried < 1 || tried > kMostTried) {
    fail("factors holds " + std::to_string(tried) + " numbers; it must hold 1 to " + std::to_string(kMostTried));
  }
  if (group < 1) fail("group is " + std::to_string(group) + "; it must be at least 1");
  const int64_t groups = ceil_div(k, group);
  require(device, start, "start", ScalarType::Float, {groups, n});
  if (zeros) require(device, *zeros, "zeros", ScalarType::Float, {groups, n});
  if (importance) require(device, *importance, "importance", ScalarType::Float, {k});
  require_levels(device, table, low, high);
  Tensor step = empty_beside(weight, {groups, n}, ScalarType::Float);
  Tensor cost = empty_beside(weight, {groups, n}, ScalarType::Float);
  device.search_steps({
      .weight = {weight.const_data_ptr(), DType::F32, n, k, k, 1},
      .group = group,
      .importance = importance ? floats(*importance) : nullptr,
      .start = floats(start),
      .zeros = zeros ? floats(*zeros) : nullptr,
      .factors = floats(factors),
      .tried = tried,
      .stored = stored_scale(stored),
      .table = table ? floats(*table) : nullptr,
      .low = low,
      .high = high,
      .step = static_cast<float*>(step.mutable_data_ptr()),
      .cost = static_cast<float*>(cost.mutable_data_ptr()),
      .parallel_for = nullptr,
  });
  return {step, cost};
}

}  // namespace bitfold::border
