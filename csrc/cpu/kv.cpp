// The drivers of the packed KV cache: packing blocks, and attention of few queries to them.
//
// Attention cuts the tokens of each key-value head into chunks, whose lengths don't depend on the number of threads.
// A chunk has its own largest score, sum of weights and weighted sum of values; the chunks are put together in their
// order. A block is read once for all queries that share its head, and no number of it is ever written down decoded.
#include "cpu/kv.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/buffer.hpp"

namespace bitfold::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // tokens, as whole blocks: whose scores stay in the second cache

// ---- packing ----

// Numbers that share a step, padded so that the padding changes no range, and their codes.
struct Row {
  Row(const KvShape& shape, int64_t longest) : shape(shape), x(longest), codes(longest) {}

  // x[0 .. count) become codes at `to`, as many as `padded`; those of the padding are 0.
  KvStep quantize(int64_t count, int64_t padded, uint8_t* to) {
    std::fill(x.data() + count, x.data() + padded, x[0]);
    const KvStep step = kernels().kv_quantize[static_cast<int>(shape.format)]({x.data(), padded, codes.data()});
    std::fill(codes.data() + count, codes.data() + padded, uint8_t{0});
    if (shape.info().bits == 8) {
      std::copy(codes.data(), codes.data() + padded, to);
    } else {
      for (int64_t i = 0; i < padded / 2; ++i) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    }
    return step;
  }

  KvShape shape;
  Buffer<float> x;
  Buffer<uint8_t> codes;
};

void write_step(const KvStep& step, float* steps, float* offsets, int64_t at) {
  steps[at] = step.step;
  if (offsets != nullptr) offsets[at] = step.offset;
}

// A block, whose tokens are in `keys` and `values`, [group, head].
void pack_block(const KvShape& shape, const float* keys, const float* values, Row* row, uint8_t* out) {
  const KvLayout at = kv_layout(shape);
  const auto floats = [&](int64_t byte) { return reinterpret_cast<float*>(out + byte); };
  const auto offsets = [&](int64_t byte) { return shape.info().offsets ? floats(byte) : nullptr; };
  for (int64_t d = 0; d < shape.head; ++d) {
    for (int64_t t = 0; t < shape.group; ++t) row->x[t] = keys[t * shape.head + d];
    const KvStep step = row->quantize(shape.group, shape.group, out + d * shape.group * shape.info().bits / 8);
    write_step(step, floats(at.key_steps), offsets(at.key_offsets), d);
  }
  for (int64_t t = 0; t < shape.group; ++t) {
    for (int64_t g = 0; g < shape.value_groups(); ++g) {
      const int64_t first = g * shape.value_group;
      const int64_t padded = shape.value_groups() == 1 ? shape.value_row() : shape.value_group;
      std::copy_n(values + t * shape.head + first, shape.value_group, row->x.data());
      uint8_t* to = out + at.value_codes + (t * shape.value_row() + first) * shape.info().bits / 8;
      write_step(row->quantize(shape.value_group, padded, to), floats(at.value_steps), offsets(at.value_offsets),
                 g * shape.group + t);
    }
  }
  const int64_t end = at.value_offsets + (shape.info().offsets ? 4 * shape.value_groups() * shape.group : 0);
  std::fill(out + end, out + at.bytes, uint8_t{0});
}

}  // namespace

void kv_pack(const KvPackArgs& args) {
  const KvShape& shape = args.shape;
  const int64_t size = shape.group * shape.head, bytes = kv_layout(shape).bytes;
  share(args.parallel_for, args.batch * args.heads * args.blocks, 1, [&](const auto& next) {
    Buffer<float> keys(size), values(size);
    Row row(shape, std::max(shape.group, shape.value_row()));
    for (int64_t i = 0, end = 0; next(&i, &end);) {
      const int64_t batch = i / args.blocks / args.heads, head = i / args.blocks % args.heads;
      for (int64_t t = 0; t < shape.group; ++t) {
        const int64_t token = i % args.blocks * shape.group + t;
        kernels().to_float(token_at(args.keys, batch, head, token), args.keys.dtype, shape.head,
                           keys.data() + t * shape.head);
        kernels().to_float(token_at(args.values, batch, head, token), args.values.dtype, shape.head,
                           values.data() + t * shape.head);
      }
      pack_block(shape, keys.data(), values.data(), &row, args.out + i * bytes);
    }
  });
}

// ---- attention ----

namespace {

// The tokens of one head that are worked on at once: `blocks` packed blocks from `block` on, or `exact` exact tokens.
struct Chunk {
  int64_t block, blocks;
  int64_t token, exact;
};

class Attention {
 public:
  explicit Attention(const KvAttentionArgs& args)
      : args_(args),
        at_(kv_layout(args.shape)),
        shared_(args.query_heads / args.heads),
        rows_(shared_ * args.rows),
        row_(args.shape.value_row()),
        chunk_blocks_(std::max<int64_t>(1, kChunk / args.shape.group)),
        chunk_tokens_(std::max(chunk_blocks_ * args.shape.group, kChunk)),
        first_block_(args.first / args.shape.group),
        blocks_(kv_blocks(args.pages, args.page_count) - first_block_),
        packed_chunks_(ceil_div(blocks_, chunk_blocks_)),
        chunks_(packed_chunks_ + ceil_div(args.recent, kChunk)),
        query_(args.batch * args.heads * rows_ * args.shape.head),
        parts_(args.batch * args.heads * chunks_ * rows_ * (row_ + 2)) {}

  void run() {
    read_query();
    share(args_.parallel_for, args_.batch * args_.heads * chunks_, 1, [&](const auto& next) {
      Scratch scratch(*this);
      for (int64_t i = 0, end = 0; next(&i, &end);) attend(i / chunks_, i % chunks_, &scratch);
    });
    cut(args_.parallel_for, args_.batch * args_.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge(i);
    });
  }

 private:
  // What a thread needs.
  struct Scratch {
    explicit Scratch(const Attention& a)
        : scores(a.rows_ * a.chunk_tokens_),
          factors(a.rows_ * std::max(a.args_.shape.head, kChunk)),
          bias(a.chunk_tokens_),
          exact(kChunk * a.row_) {}
    Buffer<float> scores;   // [rows, chunk_tokens]: then weights
    Buffer<float> factors;  // [rows, .]: queries or weights times steps
    Buffer<float> bias;     // of the mask
    Buffer<float> exact;    // exact tokens as floats: keys [head, .], then values [., value_row]
  };
  // The result of a chunk for one row of queries.
  struct Part {
    float* most;
    float* sum;
    float* out;  // [value_row]
  };

  const uint8_t* block_at(int64_t head, int64_t block) const {
    return cpu::block_at(args_.pages, head, block, at_.bytes);
  }

  Part part(int64_t head, int64_t chunk, int64_t r) {
    float* at = parts_.data() + ((head * chunks_ + chunk) * rows_ + r) * (row_ + 2);
    return {at, at + 1, at + 2};
  }

  // Queries that share a key-value head lie together, times the scale: [batch, heads, rows, head size].
  void read_query() {
    const int64_t size = args_.shape.head;
    for (int64_t i = 0; i < args_.batch * args_.query_heads * args_.rows; ++i) {
      const int64_t batch = i / args_.rows / args_.query_heads, head = i / args_.rows % args_.query_heads;
      float* to = query_.data() + i * size;
      kernels().to_float(token_at(args_.query, batch, head, i % args_.rows), args_.query.dtype, size, to);
      for (int64_t d = 0; d < size; ++d) to[d] *= args_.scale;
    }
  }

  Chunk chunk_at(int64_t chunk) const {
    if (chunk < packed_chunks_) {
      const int64_t first = chunk * chunk_blocks_;
      return {first_block_ + first, std::min(chunk_blocks_, blocks_ - first), 0, 0};
    }
    const int64_t first = (chunk - packed_chunks_) * kChunk;
    return {0, 0, first, std::min(kChunk, args_.recent - first)};
  }

  void attend(int64_t head, int64_t number, Scratch* s) {
    const Chunk chunk = chunk_at(number);
    const int64_t group = args_.shape.group;
    const int64_t tokens = chunk.blocks > 0 ? chunk.blocks * group : ceil_div(chunk.exact, kKvAlign) * kKvAlign;
    for (int64_t b = 0; b < chunk.blocks; ++b) score_block(head, block_at(head, chunk.block + b), b * group, s);
    if (chunk.exact > 0) score_exact(head, chunk, tokens, s);
    add_mask(head, chunk, tokens, s);
    for (int64_t r = 0; r < rows_; ++r) {
      const Part to = part(head, number, r);
      const KvSoftmaxSum sum = kernels().kv_softmax({s->scores.data() + r * chunk_tokens_, tokens});
      *to.most = sum.most;
      *to.sum = sum.sum;
      std::fill(to.out, to.out + row_, 0.0f);
    }
    const Part first = part(head, number, 0);
    for (int64_t b = 0; b < chunk.blocks; ++b) {
      const int64_t skip = std::max<int64_t>(0, args_.first - (chunk.block + b) * group);
      sum_block(block_at(head, chunk.block + b), b * group, skip, first.out, s);
    }
    if (chunk.exact > 0) sum_exact(head, chunk, first.out, s);
  }

  const float* floats(const uint8_t* block, int64_t byte) const { return reinterpret_cast<const float*>(block + byte); }
  const float* offsets(const uint8_t* block, int64_t byte) const {
    return args_.shape.info().offsets ? floats(block, byte) : nullptr;
  }
  int source() const { return static_cast<int>(args_.shape.format); }

  // q (codes step + offset) = (q step) codes + q offset: the steps go into the queries, once for all tokens.
  void score_block(int64_t head, const uint8_t* block, int64_t token, Scratch* s) {
    const KvShape& shape = args_.shape;
    for (int64_t r = 0; r < rows_; ++r) {
      const float* query = query_.data() + (head * rows_ + r) * shape.head;
      float* scores = s->scores.data() + r * chunk_tokens_ + token;
      const float constant = kernels().kv_fold({query, floats(block, at_.key_steps), offsets(block, at_.key_offsets),
                                                shape.head, s->factors.data() + r * shape.head});
      std::fill(scores, scores + shape.group, constant);
    }
    kernels().kv_product[source()]({s->factors.data(), shape.head, rows_, block, shape.group * shape.info().bits / 8,
                                    shape.head, shape.group, s->scores.data() + token, chunk_tokens_});
  }

  // The same with values, whose steps go into the weights. Tokens before `skip` don't count, whatever they hold.
  void sum_block(const uint8_t* block, int64_t token, int64_t skip, float* out, Scratch* s) {
    const KvShape& shape = args_.shape;
    const int64_t bits = shape.info().bits, columns = shape.value_groups() == 1 ? row_ : shape.value_group;
    const int64_t count = shape.group - skip, row_bytes = row_ * bits / 8;
    for (int64_t g = 0; g < shape.value_groups(); ++g) {
      const int64_t steps = 4 * (g * shape.group + skip);
      for (int64_t r = 0; r < rows_; ++r) {
        const float constant = kernels().kv_fold(
            {s->scores.data() + r * chunk_tokens_ + token + skip, floats(block, at_.value_steps + steps),
             offsets(block, at_.value_offsets + steps), count, s->factors.data() + r * shape.group});
        float* to = out + r * (row_ + 2) + g * shape.value_group;
        for (int64_t c = 0; c < columns; ++c) to[c] += constant;
      }
      const uint8_t* codes = block + at_.value_codes + skip * row_bytes + g * shape.value_group * bits / 8;
      kernels().kv_product[source()]({s->factors.data(), shape.group, rows_, codes, row_bytes, count, columns,
                                      out + g * shape.value_group, row_ + 2});
    }
  }

  void score_exact(int64_t head, const Chunk& chunk, int64_t tokens, Scratch* s) {
    const int64_t size = args_.shape.head, batch = head / args_.heads;
    float* keys = s->exact.data();  // [size, tokens]
    for (int64_t t = 0; t < tokens; ++t) {
      float* row = s->factors.data();
      if (t < chunk.exact) {
        kernels().to_float(token_at(args_.keys, batch, head % args_.heads, chunk.token + t), args_.keys.dtype, size,
                           row);
      }
      for (int64_t d = 0; d < size; ++d) keys[d * tokens + t] = t < chunk.exact ? row[d] : 0.0f;
    }
    for (int64_t r = 0; r < rows_; ++r) std::fill_n(s->scores.data() + r * chunk_tokens_, tokens, 0.0f);
    kernels().kv_product[kKvFloats]({query_.data() + head * rows_ * size, size, rows_, keys, tokens * 4, size, tokens,
                                     s->scores.data(), chunk_tokens_});
  }

  void sum_exact(int64_t head, const Chunk& chunk, float* out, Scratch* s) {
    const int64_t size = args_.shape.head, batch = head / args_.heads;
    for (int64_t t = 0; t < chunk.exact; ++t) {
      float* row = s->exact.data() + t * row_;
      kernels().to_float(token_at(args_.values, batch, head % args_.heads, chunk.token + t), args_.values.dtype, size,
                         row);
      std::fill(row + size, row + row_, 0.0f);
    }
    kernels().kv_product[kKvFloats](
        {s->scores.data(), chunk_tokens_, rows_, s->exact.data(), row_ * 4, chunk.exact, row_, out, row_ + 2});
  }

  // Minus infinity for tokens that don't count and those that the mask hides.
  void add_mask(int64_t head, const Chunk& chunk, int64_t tokens, Scratch* s) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    const int64_t group = args_.shape.group;
    const int64_t begin = chunk.blocks > 0 ? std::max<int64_t>(0, args_.first - chunk.block * group) : 0;
    const int64_t end = chunk.blocks > 0 ? tokens : chunk.exact;
    // Of the keys that count, which is the first of this chunk?
    const int64_t key = (chunk.blocks > 0 ? chunk.block : first_block_ + blocks_) * group + chunk.token - args_.first;
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = s->scores.data() + r * chunk_tokens_;
      std::fill(scores, scores + std::min(begin, tokens), kHidden);
      std::fill(scores + end, scores + tokens, kHidden);
    }
    if (args_.mask == KvMask::None) return;
    for (int64_t row = 0; row < args_.rows; ++row) {
      for (int64_t q = 0; q < shared_; ++q) {
        if (q == 0 || args_.mask_strides[1] != 0) {
          const int64_t query_head = head % args_.heads * shared_ + q;
          const int64_t at = head / args_.heads * args_.mask_strides[0] + query_head * args_.mask_strides[1] +
                             row * args_.mask_strides[2];
          for (int64_t t = begin; t < end; ++t) s->bias[t] = bias_at(at + (key + t) * args_.mask_strides[3]);
        }
        float* scores = s->scores.data() + (q * args_.rows + row) * chunk_tokens_;
        for (int64_t t = begin; t < end; ++t) scores[t] += s->bias[t];
      }
    }
  }

  float bias_at(int64_t at) const {
    if (args_.mask == KvMask::Bool)
      return static_cast<const bool*>(args_.mask_data)[at] ? 0.0f : -std::numeric_limits<float>::infinity();
    switch (args_.mask_dtype) {
      case DType::F32: return static_cast<const float*>(args_.mask_data)[at];
      case DType::BF16: return bf16_to_float(static_cast<const uint16_t*>(args_.mask_data)[at]);
      default: return half_to_float(static_cast<const uint16_t*>(args_.mask_data)[at]);
    }
  }

  // The chunks of a head, one after the other; a row that sees nothing is 0.
  void merge(int64_t head) {
    Buffer<float> sums(row_);
    const int64_t batch = head / args_.heads, size = args_.shape.head;
    for (int64_t r = 0; r < rows_; ++r) {
      float most = std::numeric_limits<float>::lowest(), total = 0.0f;
      for (int64_t c = 0; c < chunks_; ++c) most = std::max(most, *part(head, c, r).most);
      std::fill_n(sums.data(), row_, 0.0f);
      for (int64_t c = 0; c < chunks_; ++c) {
        const Part from = part(head, c, r);
        const float weight = std::exp(*from.most - most);
        total += *from.sum * weight;
        for (int64_t d = 0; d < size; ++d) sums[d] += from.out[d] * weight;
      }
      const float share = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t d = 0; d < size; ++d) sums[d] *= share;
      const int64_t query_head = head % args_.heads * shared_ + r / args_.rows;
      const int64_t at = ((batch * args_.rows + r % args_.rows) * args_.query_heads + query_head) * size;
      kernels().from_float(sums.data(), size, args_.query.dtype,
                           static_cast<char*>(args_.out) + at * dtype_bytes(args_.query.dtype));
    }
  }

  const KvAttentionArgs& args_;
  const KvLayout at_;
  const int64_t shared_;  // query heads of a key-value head
  const int64_t rows_;    // queries of a key-value head
  const int64_t row_;     // numbers of a padded value
  const int64_t chunk_blocks_, chunk_tokens_;
  const int64_t first_block_, blocks_;  // from the first that has a token that counts
  const int64_t packed_chunks_, chunks_;
  Buffer<float> query_;
  Buffer<float> parts_;  // [batch, heads, chunks, rows, value_row + 2]
};

}  // namespace

void kv_attention(const KvAttentionArgs& args) { Attention(args).run(); }

}  // namespace bitfold::cpu
