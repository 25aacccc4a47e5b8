// The packed KV cache: how keys and values of a model's past lie in memory (docs/kv-cache.md), and what its ops are
// told, on any device.
//
// A block is `group` tokens of one key-value head, keys and values one after the other, with all that belongs to them:
//
//     key codes       [head][group]                 a row for each channel: keys share a step along the tokens (KIVI)
//     key steps       [head] fp32, then as many offsets
//     value codes     [group][value_row]            a row for each token: values share a step along the channels
//     value steps     [value_groups][group] fp32, then as many offsets
//
// A number is code * step + offset; fp8 (e4m3) has no offsets. Codes of 4 bits lie two in a byte, the first one low.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "formats/args.hpp"
#include "formats/format.hpp"

namespace bitfold {

enum class KvFormat : uint8_t { Int8, Fp8, Int4 };
struct KvFormatRow {
  const char* name;
  int bits;
  bool offsets;
  float most;  // the largest code, or the largest number that one means
};
inline constexpr KvFormatRow kKvFormats[] = {
    {"int8", 8, true, 255.0f}, {"fp8", 8, false, 448.0f}, {"int4", 4, true, 15.0f}};
inline constexpr int kKvFormatCount = 3;

inline KvFormat parse_kv_format(const std::string& name) {
  std::string known;
  for (int i = 0; i < kKvFormatCount; ++i) {
    if (name == kKvFormats[i].name) return static_cast<KvFormat>(i);
    known += (i > 0 ? ", " : "") + std::string(kKvFormats[i].name);
  }
  throw std::invalid_argument("the format of the KV cache is '" + name + "'; it must be one of " + known);
}

// Rows of codes are whole vectors of every instruction set.
inline constexpr int64_t kKvAlign = 16;

// group: tokens of a block; head: numbers of a key and of a value; value_group: channels of a value with a step of
// their own, `head` or a divisor of it that is a multiple of kKvAlign.
struct KvShape {
  KvFormat format;
  int64_t group;
  int64_t head;
  int64_t value_group;

  constexpr const KvFormatRow& info() const { return kKvFormats[static_cast<int>(format)]; }
  constexpr int64_t value_groups() const { return head / value_group; }
  constexpr int64_t value_row() const { return ceil_div(head, kKvAlign) * kKvAlign; }
};

// Where the parts of a block begin, in bytes; where there are no offsets, they have no room.
struct KvLayout {
  int64_t key_steps;
  int64_t key_offsets;
  int64_t value_codes;
  int64_t value_steps;
  int64_t value_offsets;
  int64_t bytes;  // a multiple of a cache line
};

constexpr KvLayout kv_layout(const KvShape& shape) {
  constexpr int64_t kLine = 64, kFloat = sizeof(float);
  const int64_t offsets = shape.info().offsets ? 1 : 0, bits = shape.info().bits;
  KvLayout at{};
  at.key_steps = shape.head * shape.group * bits / 8;
  at.key_offsets = at.key_steps + shape.head * kFloat;
  at.value_codes = at.key_offsets + offsets * shape.head * kFloat;
  at.value_steps = at.value_codes + shape.group * shape.value_row() * bits / 8;
  at.value_offsets = at.value_steps + shape.value_groups() * shape.group * kFloat;
  at.bytes = ceil_div(at.value_offsets + offsets * shape.value_groups() * shape.group * kFloat, kLine) * kLine;
  return at;
}
static_assert(kv_layout({KvFormat::Int8, 64, 128, 128}).bytes == 2 * 64 * 128 + 8 * 128 + 8 * 64);
static_assert(kv_layout({KvFormat::Int4, 64, 128, 64}).bytes == 64 * 128 + 8 * 128 + 16 * 64);

inline void check_kv_shape(const KvShape& shape) {
  const auto fail = [](const std::string& what, int64_t is, const std::string& must) {
    throw std::invalid_argument(what + " is " + std::to_string(is) + "; it must be " + must);
  };
  if (shape.group < kKvAlign || shape.group > 1024 || shape.group % kKvAlign != 0)
    fail("group", shape.group, "a multiple of 16 from 16 to 1024 tokens");
  if (shape.head < 1 || shape.head > 4096) fail("the head size", shape.head, "from 1 to 4096");
  const bool whole = shape.value_group == shape.head;
  if (!whole && (shape.value_group < 1 || shape.head % shape.value_group != 0 || shape.value_group % kKvAlign != 0))
    fail("value_group", shape.value_group,
         "the head size, " + std::to_string(shape.head) + ", or a divisor of it that is a multiple of 16");
}

// Tokens [0, blocks * group) of keys and values, [batch, heads, tokens, head] with strides in elements, head contiguous
// -> blocks [batch, heads, blocks, bytes].
struct KvTokens {
  const void* data;
  DType dtype;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
};
struct KvPackArgs {
  KvShape shape;
  int64_t batch;
  int64_t heads;
  int64_t blocks;
  KvTokens keys;
  KvTokens values;
  uint8_t* out;
  ParallelFor parallel_for;
};

// A run of blocks [batch, heads, blocks, bytes], of which the first `blocks` count.
struct KvPage {
  const uint8_t* data;
  int64_t blocks;
  int64_t head_stride;  // bytes
};

inline int64_t kv_blocks(const KvPage* pages, int64_t page_count) {
  int64_t count = 0;
  for (int64_t p = 0; p < page_count; ++p) count += pages[p].blocks;
  return count;
}

// Keys and values [batch, heads, tokens, head], contiguous and both of `dtype`: those of the pages from token `first`
// on, decoded, and then those of `exact`, one after the other.
struct KvExact {
  KvTokens keys;
  KvTokens values;
  int64_t tokens;
};
struct KvUnpackArgs {
  KvShape shape;
  int64_t batch;
  int64_t heads;
  const KvPage* pages;
  int64_t page_count;
  int64_t first;
  const KvExact* exact;  // of `dtype`
  int64_t exact_count;
  DType dtype;
  void* keys;
  void* values;
  ParallelFor parallel_for;
};

// What the mask adds to the scores: a number for each key or, of a bool mask, 0 and minus infinity. Strides in
// elements.
enum class KvMask : uint8_t { None, Bool, Float };

// out[batch, rows, query heads, head] = softmax(scale * query keys^T + mask) values, for few rows of queries. The keys
// are those of the pages from token `first` on, and then `recent` exact ones.
struct KvAttentionArgs {
  KvShape shape;
  int64_t batch;
  int64_t heads;        // of keys and values
  int64_t query_heads;  // a multiple of that; neighbours share a key-value head
  int64_t rows;
  KvTokens query;  // head_stride is that of query heads, token_stride that of rows
  const KvPage* pages;
  int64_t page_count;
  int64_t first;
  KvTokens keys;
  KvTokens values;
  int64_t recent;
  KvMask mask;
  const void* mask_data;
  DType mask_dtype;
  int64_t mask_strides[4];  // batch, query head, row, token; 0 where it is shared
  float scale;
  void* out;  // of the query's dtype
  ParallelFor parallel_for;
};

}  // namespace bitfold
