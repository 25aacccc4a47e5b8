// Keys and values of the packed KV cache as tensors, for attention functions that don't read blocks.
//
// A block becomes floats in the caches, keys by way of a transposition, and from there the numbers that are asked for:
// its tokens lie one after the other in the output. As in decode.cpp a large output goes past the caches, unless its
// pages are new.
#include <algorithm>
#include <cstring>

#include "cpu/buffer.hpp"
#include "cpu/kv.hpp"
#include "cpu/pages.hpp"

namespace bitfold::cpu {
namespace {

class Unpack {
 public:
  explicit Unpack(const KvUnpackArgs& args)
      : args_(args),
        at_(kv_layout(args.shape)),
        row_(args.shape.value_row()),
        token_bytes_(args.shape.head * dtype_bytes(args.dtype)),
        first_block_(args.first / args.shape.group),
        blocks_(kv_blocks(args.pages, args.page_count) - first_block_),
        packed_(kv_blocks(args.pages, args.page_count) * args.shape.group - args.first),
        tokens_(packed_ + exact_tokens(args)),
        piece_(std::max<int64_t>(1, kPieceBytes / (args.shape.group * token_bytes_))),
        large_(2 * args.batch * args.heads * tokens_ * token_bytes_ >= kLargeBytes) {}

  // A piece is some blocks of a head's keys or values, or all of its exact tokens.
  void run() {
    const int64_t pieces = ceil_div(blocks_, piece_), of_head = pieces + (args_.exact_count > 0 ? 1 : 0);
    share(args_.parallel_for, 2 * args_.batch * args_.heads * of_head, 1, [&](const auto& next) {
      Buffer<float> numbers(args_.shape.group * row_);
      for (int64_t i = 0, end = 0; next(&i, &end);) {
        const int64_t head = i / of_head % (args_.batch * args_.heads), piece = i % of_head;
        const bool values = i / of_head >= args_.batch * args_.heads;
        char* out = static_cast<char*>(values ? args_.values : args_.keys) + head * tokens_ * token_bytes_;
        if (piece < pieces) unpack(head, values, piece * piece_, out, numbers.data());
        else copy(head, values, out + packed_ * token_bytes_);
      }
      if (large_) kernels().drain();
    });
  }

 private:
  static int64_t exact_tokens(const KvUnpackArgs& args) {
    int64_t count = 0;
    for (int64_t i = 0; i < args.exact_count; ++i) count += args.exact[i].tokens;
    return count;
  }

  // `out` is where the head begins; `begin` counts blocks from the first that has a token that counts.
  void unpack(int64_t head, bool values, int64_t begin, char* out, float* numbers) const {
    const int64_t group = args_.shape.group, end = std::min(blocks_, begin + piece_);
    const int64_t hidden = args_.first - first_block_ * group;  // tokens of the first block
    const auto place = [&](int64_t block) { return out + std::max<int64_t>(0, block * group - hidden) * token_bytes_; };
    const bool past = large_ && !fetch_pages(place(begin), place(end) - place(begin));
    const auto from_float = past ? kernels().stream_from_float : kernels().from_float;
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* block = block_at(args_.pages, head, first_block_ + b, at_.bytes);
      if (values) decode_values(block, numbers);
      else decode_keys(block, numbers);
      const int64_t skip = b == 0 ? hidden : 0;
      if (row_ == args_.shape.head) {
        from_float(numbers + skip * row_, (group - skip) * row_, args_.dtype, place(b));
      } else {
        for (int64_t t = skip; t < group; ++t)
          from_float(numbers + t * row_, args_.shape.head, args_.dtype, place(b) + (t - skip) * token_bytes_);
      }
    }
  }

  // numbers[group, value_row]: what is beyond the head size has no meaning.
  void decode_keys(const uint8_t* block, float* numbers) const {
    const KvShape& shape = args_.shape;
    kernel()({block, shape.group * shape.info().bits / 8, floats(block, at_.key_steps), offsets(block, at_.key_offsets),
              shape.head, shape.group, true, numbers, row_});
  }
  void decode_values(const uint8_t* block, float* numbers) const {
    const KvShape& shape = args_.shape;
    const int64_t bits = shape.info().bits, columns = shape.value_groups() == 1 ? row_ : shape.value_group;
    for (int64_t g = 0; g < shape.value_groups(); ++g) {
      const int64_t channel = g * shape.value_group, steps = 4 * g * shape.group;
      kernel()({block + at_.value_codes + channel * bits / 8, row_ * bits / 8, floats(block, at_.value_steps + steps),
                offsets(block, at_.value_offsets + steps), shape.group, columns, false, numbers + channel, row_});
    }
  }

  void copy(int64_t head, bool values, char* out) const {
    for (int64_t i = 0; i < args_.exact_count; ++i) {
      const KvTokens& from = values ? args_.exact[i].values : args_.exact[i].keys;
      for (int64_t t = 0; t < args_.exact[i].tokens; ++t, out += token_bytes_) {
        std::memcpy(out, token_at(from, head / args_.heads, head % args_.heads, t), static_cast<size_t>(token_bytes_));
      }
    }
  }

  void (*kernel() const)(const KvDecode&) { return kernels().kv_decode[static_cast<int>(args_.shape.format)]; }
  static const float* floats(const uint8_t* block, int64_t byte) {
    return reinterpret_cast<const float*>(block + byte);
  }
  const float* offsets(const uint8_t* block, int64_t byte) const {
    return args_.shape.info().offsets ? floats(block, byte) : nullptr;
  }

  const KvUnpackArgs& args_;
  const KvLayout at_;
  const int64_t row_;  // numbers of a padded value
  const int64_t token_bytes_;
  const int64_t first_block_, blocks_;  // from the first that has a token that counts
  const int64_t packed_, tokens_;       // that count
  const int64_t piece_;                 // blocks
  const bool large_;
};

}  // namespace

void kv_unpack(const KvUnpackArgs& args) { Unpack(args).run(); }

}  // namespace bitfold::cpu
