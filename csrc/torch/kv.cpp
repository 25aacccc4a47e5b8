#include "torch/kv.hpp"

#include <cmath>

#include "formats/kv.hpp"

namespace bitfold::border {
namespace {

constexpr int64_t kMostRows = 64;
constexpr uintptr_t kGpuAlignment = 16;  // of pages

// [batch, heads, tokens, head], the numbers of a token one after the other; `owner` keeps a copy that is.
KvTokens read_tokens(const Device& device, const Tensor& tensor, const std::string& what, Tensor* owner) {
  device.require(tensor, what);
  const DType dtype = float_dtype(tensor.scalar_type(), what);
  if (dtype == DType::F64) fail(what + " is float64; it must be float32, bfloat16 or float16");
  *owner = tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
  return {owner->const_data_ptr(), dtype, owner->stride(0), owner->stride(1), owner->stride(2)};
}

void require_four(const Tensor& tensor, const std::string& what) {
  if (tensor.dim() != 4)
    fail(what + " has shape " + shape_text(tensor) + "; it must have four dimensions: batch, heads, tokens, head size");
}

void require_same(const Tensor& values, const Tensor& keys, const std::string& number = "") {
  bool same = values.dim() == 4;
  for (int64_t i = 0; i < 4 && same; ++i) same = values.size(i) == keys.size(i);
  if (!same || values.scalar_type() != keys.scalar_type()) {
    fail("values" + number + " is a " + dtype_name(values.scalar_type()) + " of shape " + shape_text(values) +
         "; it must be a " + dtype_name(keys.scalar_type()) + " of shape " + shape_text(keys) + " like keys" + number);
  }
}

KvShape read_shape(const std::string& format, int64_t group, int64_t head, int64_t value_group) {
  const KvShape shape{parse_kv_format(format), group, head, value_group};
  check_kv_shape(shape);
  return shape;
}

std::vector<KvPage> read_pages(const Device& device, const std::vector<Tensor>& pages, int64_t blocks,
                               const Tensor& keys, int64_t bytes) {
  std::vector<KvPage> read;
  int64_t left = blocks;
  for (size_t i = 0; i < pages.size(); ++i) {
    const Tensor& page = pages[i];
    const std::string what = "pages[" + std::to_string(i) + "]";
    device.require(page, what);
    if (page.scalar_type() != ScalarType::Byte || page.dim() != 4 || page.size(0) != keys.size(0) ||
        page.size(1) != keys.size(1) || page.size(3) != bytes || !page.is_contiguous()) {
      fail(what + " is a " + dtype_name(page.scalar_type()) + " of shape " + shape_text(page) +
           "; it must be a contiguous uint8 of shape [" + std::to_string(keys.size(0)) + ", " +
           std::to_string(keys.size(1)) + ", blocks, " + std::to_string(bytes) + "]");
    }
    const auto* data = static_cast<const uint8_t*>(page.const_data_ptr());
    if (device.gpu() && reinterpret_cast<uintptr_t>(data) % kGpuAlignment != 0) {
      fail(what + " starts at byte " + std::to_string(reinterpret_cast<uintptr_t>(data)) +
           "; on a GPU it must start at a multiple of " + std::to_string(kGpuAlignment) + ", as a clone of it does");
    }
    const int64_t count = page.size(2) < left ? page.size(2) : left;
    if (count > 0) read.push_back({data, count, page.size(2) * bytes});
    left -= count;
  }
  if (blocks < 0 || left > 0) {
    fail("blocks is " + std::to_string(blocks) + "; it must be between 0 and the " + std::to_string(blocks - left) +
         " that the pages have");
  }
  return read;
}

void require_first(int64_t first, int64_t tokens) {
  if (first < 0 || first > tokens) {
    fail("first is " + std::to_string(first) + "; it must be between 0 and the " + std::to_string(tokens) +
         " tokens of the blocks");
  }
}

void read_mask(const Device& device, const Tensor& mask, const int64_t (&sizes)[4], KvAttentionArgs* args) {
  device.require(mask, "mask");
  bool fits = mask.dim() == 4;
  std::string wanted;
  for (int64_t i = 0; i < 4; ++i) {
    wanted += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    fits = fits && (mask.size(i) == sizes[i] || mask.size(i) == 1);
  }
  if (!fits) fail("mask has shape " + shape_text(mask) + "; it must be broadcast to [" + wanted + "]");
  args->mask = mask.scalar_type() == ScalarType::Bool ? KvMask::Bool : KvMask::Float;
  if (args->mask == KvMask::Float) {
    args->mask_dtype = float_dtype(mask.scalar_type(), "mask");
    if (args->mask_dtype == DType::F64) fail("mask is float64; it must be bool, float32, bfloat16 or float16");
  }
  args->mask_data = mask.const_data_ptr();
  for (int64_t i = 0; i < 4; ++i) args->mask_strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
}

}  // namespace

Tensor kv_pack(const Tensor& keys, const Tensor& values, const std::string& format, int64_t group,
               int64_t value_group) {
  require_four(keys, "keys");
  require_same(values, keys);
  const Device device(keys, "keys");
  const KvShape shape = read_shape(format, group, keys.size(3), value_group);
  if (keys.size(2) % group != 0) {
    fail("keys has " + std::to_string(keys.size(2)) + " tokens; it must have whole groups of " + std::to_string(group));
  }
  const int64_t blocks = keys.size(2) / group;
  Tensor key_owner = keys, value_owner = values;
  Tensor out = empty_beside(keys, {keys.size(0), keys.size(1), blocks, kv_layout(shape).bytes}, ScalarType::Byte);
  device.kv_pack({
      .shape = shape,
      .batch = keys.size(0),
      .heads = keys.size(1),
      .blocks = blocks,
      .keys = read_tokens(device, keys, "keys", &key_owner),
      .values = read_tokens(device, values, "values", &value_owner),
      .out = static_cast<uint8_t*>(out.mutable_data_ptr()),
      .parallel_for = nullptr,
  });
  return out;
}

std::vector<Tensor> kv_unpack(const std::vector<Tensor>& pages, int64_t blocks, int64_t first,
                              const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                              const std::string& format, int64_t group, int64_t value_group) {
  if (keys.empty() || keys.size() != values.size()) {
    fail("keys are " + std::to_string(keys.size()) + " tensors and values " + std::to_string(values.size()) +
         "; they must be equally many, and at least one");
  }
  require_four(keys[0], "keys[0]");
  const Device device(keys[0], "keys[0]");
  const int64_t batch = keys[0].size(0), heads = keys[0].size(1), head = keys[0].size(3);
  const KvShape shape = read_shape(format, group, head, value_group);
  const std::vector<KvPage> read = read_pages(device, pages, blocks, keys[0], kv_layout(shape).bytes);
  require_first(first, blocks * group);
  std::vector<Tensor> owners;
  std::vector<KvExact> exact;
  int64_t tokens = blocks * group - first;
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string number = "[" + std::to_string(i) + "]";
    require_four(keys[i], "keys" + number);
    if (keys[i].size(0) != batch || keys[i].size(1) != heads || keys[i].size(3) != head ||
        keys[i].scalar_type() != keys[0].scalar_type()) {
      fail("keys" + number + " is a " + dtype_name(keys[i].scalar_type()) + " of shape " + shape_text(keys[i]) +
           "; in all but the tokens it must be as keys[0], a " + dtype_name(keys[0].scalar_type()) + " of shape " +
           shape_text(keys[0]));
    }
    require_same(values[i], keys[i], number);
    const auto read_exact = [&](const Tensor& tensor, const std::string& what) {
      owners.push_back(tensor);
      return read_tokens(device, tensor, what, &owners.back());
    };
    exact.push_back({read_exact(keys[i], "keys" + number), read_exact(values[i], "values" + number), keys[i].size(2)});
    tokens += keys[i].size(2);
  }
  std::vector<Tensor> out;
  for (int i = 0; i < 2; ++i) out.push_back(empty_beside(keys[0], {batch, heads, tokens, head}, keys[0].scalar_type()));
  device.kv_unpack({
      .shape = shape,
      .batch = batch,
      .heads = heads,
      .pages = read.data(),
      .page_count = static_cast<int64_t>(read.size()),
      .first = first,
      .exact = exact.data(),
      .exact_count = static_cast<int64_t>(exact.size()),
      .dtype = float_dtype(keys[0].scalar_type(), "keys[0]"),
      .keys = out[0].mutable_data_ptr(),
      .values = out[1].mutable_data_ptr(),
      .parallel_for = nullptr,
  });
  return out;
}

Tensor kv_attention(const Tensor& query, const std::vector<Tensor>& pages, int64_t blocks, int64_t first,
                    const Tensor& keys, const Tensor& values, const std::string& format, int64_t group,
                    int64_t value_group, std::optional<Tensor> mask, double scale) {
  require_four(query, "query");
  require_four(keys, "keys");
  require_same(values, keys);
  const Device device(query, "query");
  const int64_t batch = query.size(0), query_heads = query.size(1), rows = query.size(2), head = query.size(3);
  const int64_t heads = keys.size(1), recent = keys.size(2);
  const KvShape shape = read_shape(format, group, head, value_group);
  if (keys.size(0) != batch || keys.size(3) != head || heads < 1 || query_heads % heads != 0) {
    fail("keys has shape " + shape_text(keys) + " and query " + shape_text(query) +
         "; they must have the same batch and head size, and query heads a multiple of key heads");
  }
  if (rows > kMostRows) {
    fail("query has " + std::to_string(rows) + " rows; it must have at most " + std::to_string(kMostRows) +
         ", and more are for decoded keys and values");
  }
  const std::vector<KvPage> read = read_pages(device, pages, blocks, keys, kv_layout(shape).bytes);
  require_first(first, blocks * group);
  if (!std::isfinite(scale)) fail("scale is " + std::to_string(scale) + "; it must be finite");
  Tensor query_owner = query, key_owner = keys, value_owner = values;
  KvAttentionArgs args{
      .shape = shape,
      .batch = batch,
      .heads = heads,
      .query_heads = query_heads,
      .rows = rows,
      .query = read_tokens(device, query, "query", &query_owner),
      .pages = read.data(),
      .page_count = static_cast<int64_t>(read.size()),
      .first = first,
      .keys = read_tokens(device, keys, "keys", &key_owner),
      .values = read_tokens(device, values, "values", &value_owner),
      .recent = recent,
      .mask = KvMask::None,
      .mask_data = nullptr,
      .mask_dtype = DType::F32,
      .mask_strides = {},
      .scale = static_cast<float>(scale),
      .out = nullptr,
      .parallel_for = nullptr,
  };
  const int64_t sizes[4] = {batch, query_heads, rows, blocks * group - first + recent};
  if (mask) read_mask(device, *mask, sizes, &args);
  Tensor out = empty_beside(query, {batch, rows, query_heads, head}, query.scalar_type());
  args.out = out.mutable_data_ptr();
  device.kv_attention(args, query);
  return out;
}

}  // namespace bitfold::border
