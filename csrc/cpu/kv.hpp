// The KV cache's leaf kernels (kernels/kv.inl), and its drivers (kv.cpp).
#pragma once

#include <cstdint>

#include "cpu/kernels.hpp"
#include "formats/kv.hpp"

namespace bitfold::cpu {

// What a product reads: codes of one of the formats, or floats.
inline constexpr int kKvFloats = kKvFormatCount;
static_assert(kKvKernels == kKvFormatCount + 1);

// sums[r, c] += sum over l < depth of factors[r, l] * codes[l, c], for c < columns, a multiple of kKvAlign. Scores are
// such sums, over keys [head, group], and so are outputs, over values [group, head].
struct KvProduct {
  const float* factors;  // [rows, factor_stride]
  int64_t factor_stride;
  int64_t rows;
  const void* codes;
  int64_t code_stride;  // bytes from one l to the next
  int64_t depth;
  int64_t columns;
  float* sums;  // [rows, sum_stride]
  int64_t sum_stride;
};

// out[i] = x[i] * steps[i]; the result is the sum of x[i] * offsets[i], 0 where offsets is null.
struct KvFold {
  const float* x;
  const float* steps;
  const float* offsets;
  int64_t count;
  float* out;
};

// x[i] becomes exp(x[i] - most), most the largest of them; count is a multiple of kKvAlign.
struct KvSoftmax {
  float* x;
  int64_t count;
};
struct KvSoftmaxSum {
  float most;  // not below the lowest float
  float sum;
};

// Codes, one in each byte, of numbers that share a step; count is a multiple of kKvAlign.
struct KvQuantize {
  const float* x;
  int64_t count;
  uint8_t* codes;
};
struct KvStep {
  float step;  // NaN where one of the numbers or their range is not finite
  float offset;
};

// Rows of codes that share a step, as numbers: out[r, c] = codes[r, c] * steps[r] + offsets[r], or out[c, r] where they
// are transposed. columns is a multiple of kKvAlign, and so is the room of a row of `out`.
struct KvDecode {
  const uint8_t* codes;
  int64_t code_stride;  // bytes from one row to the next
  const float* steps;
  const float* offsets;  // null where the format has none
  int64_t rows;
  int64_t columns;
  bool transposed;
  float* out;
  int64_t out_stride;
};

void kv_pack(const KvPackArgs& args);
void kv_unpack(const KvUnpackArgs& args);
void kv_attention(const KvAttentionArgs& args);

// ---- what the drivers share ----

inline const char* token_at(const KvTokens& tokens, int64_t batch, int64_t head, int64_t t) {
  return static_cast<const char*>(tokens.data) +
         (batch * tokens.batch_stride + head * tokens.head_stride + t * tokens.token_stride) *
             dtype_bits(tokens.dtype) / 8;
}

// A block of a head, counted over all batches and pages.
inline const uint8_t* block_at(const KvPage* page, int64_t head, int64_t block, int64_t bytes) {
  for (; block >= page->blocks; ++page) block -= page->blocks;
  return page->data + head * page->head_stride + block * bytes;
}

}  // namespace bitfold::cpu
