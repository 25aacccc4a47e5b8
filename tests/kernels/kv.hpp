// The packed KV cache: blocks are the same bytes on every instruction set, and decoded they are what a product and a
// sum make of a code; attention is held against plain loops in double precision over what the blocks mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kv.hpp"
#include "numbers.hpp"

namespace bitfold::plain {

struct KvProblem {
  KvShape shape;
  int64_t heads, shared, rows, blocks, recent, first;
  Numbers keys, values, query;  // [heads, tokens, head] and [heads * shared, rows, head]

  KvProblem(KvFormat format, int64_t head, int64_t value_group, Engine& engine)
      : shape{format, 32, head, value_group}, heads(2), shared(3), rows(2), blocks(37), recent(21), first(40) {
    keys = gaussian(engine, heads * tokens() * head);
    values = gaussian(engine, heads * tokens() * head);
    query = gaussian(engine, heads * shared * rows * head);
    for (int64_t i = 0; i < heads * tokens(); ++i) keys[static_cast<size_t>(i * head)] += 9.0f;  // a channel apart
    keys[3] = std::numeric_limits<float>::infinity();  // among the tokens that no longer count
    values[static_cast<size_t>(35 * head)] = std::numeric_limits<float>::quiet_NaN();
    for (int64_t d = 0; d < head; ++d) values[static_cast<size_t>(50 * head + d)] = 0.0f;
  }
  int64_t tokens() const { return blocks * shape.group + recent; }
  int64_t block_bytes() const { return kv_layout(shape).bytes; }
  KvTokens view(const Numbers& of, int64_t from = 0) const {
    return {of.data() + from * shape.head, DType::F32, 0, tokens() * shape.head, shape.head};
  }
};

inline std::vector<uint8_t> kv_packed(const KvProblem& p, ParallelFor parallel_for) {
  std::vector<uint8_t> out(static_cast<size_t>(p.heads * p.blocks * p.block_bytes()));
  cpu::kv_pack({p.shape, 1, p.heads, p.blocks, p.view(p.keys), p.view(p.values), out.data(), parallel_for});
  return out;
}

inline double code_value(const KvShape& shape, const uint8_t* codes, int64_t i) {
  if (shape.info().bits == 4) return codes[i / 2] >> (i % 2 * 4) & 15;
  return shape.info().offsets ? codes[i] : static_cast<double>(minifloat_to_float<kFp8E4m3>(codes[i]));
}

// Number d of the key or the value of a token, computed in T.
template <class T>
T kv_number(const KvProblem& p, const std::vector<uint8_t>& packed, int64_t head, int64_t token, int64_t d,
            bool value) {
  const KvShape& shape = p.shape;
  if (token >= p.blocks * shape.group) {
    const Numbers& exact = value ? p.values : p.keys;
    return T{exact[static_cast<size_t>((head * p.tokens() + token) * shape.head + d)]};
  }
  const KvLayout at = kv_layout(shape);
  const uint8_t* block = packed.data() + (head * p.blocks + token / shape.group) * at.bytes;
  const int64_t t = token % shape.group;
  const auto number = [&](int64_t byte, int64_t i) {
    float out = 0.0f;
    std::memcpy(&out, block + byte + 4 * i, sizeof(out));
    return T{out};
  };
  const int64_t shares = value ? d / shape.value_group * shape.group + t : d;
  const double code = value ? code_value(shape, block + at.value_codes, t * shape.value_row() + d)
                            : code_value(shape, block, d * shape.group + t);
  const T product = static_cast<T>(code) * number(value ? at.value_steps : at.key_steps, shares);
  return shape.info().offsets ? product + number(value ? at.value_offsets : at.key_offsets, shares) : product;
}

// Whether kv_unpack gives those in float, to the bit.
inline bool kv_unpacks(const KvProblem& p, const std::vector<uint8_t>& packed, ParallelFor parallel_for) {
  const KvPage page{packed.data(), p.blocks, p.blocks * p.block_bytes()};
  const int64_t exact = p.blocks * p.shape.group, tokens = p.tokens() - p.first;
  const KvExact recent{p.view(p.keys, exact), p.view(p.values, exact), p.recent};
  Numbers keys(static_cast<size_t>(p.heads * tokens * p.shape.head)), values(keys.size());
  cpu::kv_unpack({.shape = p.shape,
                  .batch = 1,
                  .heads = p.heads,
                  .pages = &page,
                  .page_count = 1,
                  .first = p.first,
                  .exact = &recent,
                  .exact_count = 1,
                  .dtype = DType::F32,
                  .keys = keys.data(),
                  .values = values.data(),
                  .parallel_for = parallel_for});
  for (int64_t i = 0; i < p.heads * tokens * p.shape.head; ++i) {
    const int64_t d = i % p.shape.head, t = i / p.shape.head % tokens, head = i / p.shape.head / tokens;
    for (const bool value : {false, true}) {
      const float got = (value ? values : keys)[static_cast<size_t>(i)];
      const auto wanted = kv_number<float>(p, packed, head, p.first + t, d, value);
      if (std::memcmp(&got, &wanted, sizeof(got)) != 0 && !(std::isnan(got) && std::isnan(wanted))) return false;
    }
  }
  return true;
}

// The largest error of kv_attention, relative to the norm of an output's row.
inline double kv_error(const KvProblem& p, const std::vector<uint8_t>& packed, ParallelFor parallel_for) {
  const int64_t size = p.shape.head, queries = p.heads * p.shared;
  const KvPage page{packed.data(), p.blocks, p.blocks * p.block_bytes()};
  Numbers out(p.query.size());
  const int64_t exact = p.blocks * p.shape.group;
  cpu::kv_attention({.shape = p.shape,
                     .batch = 1,
                     .heads = p.heads,
                     .query_heads = queries,
                     .rows = p.rows,
                     .query = {p.query.data(), DType::F32, 0, p.rows * size, size},
                     .pages = &page,
                     .page_count = 1,
                     .first = p.first,
                     .keys = p.view(p.keys, exact),
                     .values = p.view(p.values, exact),
                     .recent = p.recent,
                     .mask = KvMask::None,
                     .mask_data = nullptr,
                     .mask_dtype = DType::F32,
                     .mask_strides = {},
                     .scale = 0.3f,
                     .out = out.data(),
                     .parallel_for = parallel_for});
  double worst = 0.0;
  for (int64_t q = 0; q < queries; ++q) {
    for (int64_t r = 0; r < p.rows; ++r) {
      std::vector<double> weights, sums(static_cast<size_t>(size));
      const float* query = p.query.data() + (q * p.rows + r) * size;
      double most = -1e300, total = 0.0;
      for (int64_t t = p.first; t < p.tokens(); ++t) {
        double score = 0.0;
        for (int64_t d = 0; d < size; ++d)
          score += double{query[d]} * kv_number<double>(p, packed, q / p.shared, t, d, false);
        weights.push_back(score * double{0.3f});
        most = std::max(most, weights.back());
      }
      for (int64_t t = p.first; t < p.tokens(); ++t) {
        const double weight = std::exp(weights[static_cast<size_t>(t - p.first)] - most);
        total += weight;
        for (int64_t d = 0; d < size; ++d)
          sums[static_cast<size_t>(d)] += weight * kv_number<double>(p, packed, q / p.shared, t, d, true);
      }
      double error = 0.0, norm = 0.0;
      for (int64_t d = 0; d < size; ++d) {
        const double wanted = sums[static_cast<size_t>(d)] / total;
        const double got = double{out[static_cast<size_t>((r * queries + q) * size + d)]};
        error += (got - wanted) * (got - wanted);
        norm += wanted * wanted;
      }
      worst = std::max(worst, std::sqrt(error / norm));
    }
  }
  return worst;
}

}  // namespace bitfold::plain
