// The packed KV cache: what kv_cases.py has cases of.
#include <vector>

#include "cuda/device.hpp"
#include "cuda/kv.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {
namespace {

KvShape kv_shape(const CaseFile& file) {
  return {parse_kv_format(file.text("format")), file.number("group"), file.number("k"), file.number("value_group")};
}

// Of [batch, heads, tokens, head size], contiguous.
KvTokens kv_tokens(const CaseFile& file, const char* name, const char* heads, int64_t tokens) {
  const int64_t head = file.number("k");
  return {file.data(name), file.dtype("dtype"), file.number(heads) * tokens * head, tokens * head, head};
}

std::vector<KvPage> kv_pages(const CaseFile& file) {
  std::vector<KvPage> pages;
  for (int64_t i = 0; i < file.number("pages"); ++i) {
    const Memory& page = file.tensor("page" + std::to_string(i));
    const int64_t of_head = static_cast<int64_t>(page.bytes()) / (file.number("batch") * file.number("heads"));
    pages.push_back({page.as<uint8_t>(), of_head / file.number("block_bytes"), of_head});
  }
  return pages;
}

}  // namespace

Outputs kv_pack(const CaseFile& file) {
  const int64_t tokens = file.number("n"), blocks = tokens / file.number("group");
  const int64_t count = file.number("batch") * file.number("heads") * blocks;
  Memory out(static_cast<size_t>(count * file.number("block_bytes")), kUnwritten);
  cuda::kv_pack({.shape = kv_shape(file),
                 .batch = file.number("batch"),
                 .heads = file.number("heads"),
                 .blocks = blocks,
                 .keys = kv_tokens(file, "keys", "heads", tokens),
                 .values = kv_tokens(file, "values", "heads", tokens),
                 .out = out.as<uint8_t>(),
                 .parallel_for = nullptr},
                nullptr);
  Outputs outputs;
  outputs["out"] = std::move(out);
  return outputs;
}

Outputs kv_unpack(const CaseFile& file) {
  const int64_t recent = file.number("recent"), tokens = file.number("n") - file.number("first") + recent;
  const std::vector<KvPage> pages = kv_pages(file);
  const DType dtype = file.dtype("dtype");
  const size_t bytes = bytes_of(dtype, file.number("batch") * file.number("heads") * tokens * file.number("k"));
  Memory keys(bytes, kUnwritten), values(bytes, kUnwritten);
  const KvExact exact{kv_tokens(file, "keys", "heads", recent), kv_tokens(file, "values", "heads", recent), recent};
  cuda::kv_unpack({.shape = kv_shape(file),
                   .batch = file.number("batch"),
                   .heads = file.number("heads"),
                   .pages = pages.data(),
                   .page_count = static_cast<int64_t>(pages.size()),
                   .first = file.number("first"),
                   .exact = &exact,
                   .exact_count = 1,
                   .dtype = dtype,
                   .keys = keys.data(),
                   .values = values.data(),
                   .parallel_for = nullptr},
                  nullptr);
  Outputs outputs;
  outputs["out keys"] = std::move(keys);
  outputs["out values"] = std::move(values);
  return outputs;
}

Outputs kv_attention(const CaseFile& file) {
  const int64_t batch = file.number("batch"), heads = file.number("heads"), rows = file.number("rows");
  const int64_t recent = file.number("recent"), seen = file.number("n") - file.number("first") + recent;
  const std::vector<KvPage> pages = kv_pages(file);
  KvAttentionArgs args{.shape = kv_shape(file),
                       .batch = batch,
                       .heads = heads,
                       .query_heads = file.number("query_heads"),
                       .rows = rows,
                       .query = kv_tokens(file, "query", "query_heads", rows),
                       .pages = pages.data(),
                       .page_count = static_cast<int64_t>(pages.size()),
                       .first = file.number("first"),
                       .keys = kv_tokens(file, "keys", "heads", recent),
                       .values = kv_tokens(file, "values", "heads", recent),
                       .recent = recent,
                       .mask = static_cast<KvMask>(file.number("mask")),
                       .mask_data = file.data("mask"),
                       .mask_dtype = file.dtype("dtype"),
                       .mask_strides = {rows * seen, 0, seen, 1},
                       .scale = *file.tensor("scale").as<float>(),
                       .out = nullptr,
                       .parallel_for = nullptr};
  Memory out(bytes_of(file.dtype("dtype"), batch * rows * args.query_heads * args.shape.head), kUnwritten);
  args.out = out.data();
  const Memory workspace(static_cast<size_t>(cuda::kv_attention_workspace(args)), kUnwritten);
  cuda::kv_attention(args, workspace.data(), nullptr);
  emulator::synchronize();
  Outputs outputs;
  outputs["y"] = std::move(out);
  return outputs;
}

}  // namespace bitfold::cuda::test
