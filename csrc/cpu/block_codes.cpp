// Scales out of GGUF's blocks, and codes into them.
#include "cpu/block_codes.hpp"

#include <utility>

#include "cpu/buffer.hpp"
#include "formats/block_codes.hpp"

namespace bitfold::cpu {
namespace {

// body.template run<Row>() of a type of blocks.
template <class Body>
void of_row(int row, Body body) {
  [&]<int... Rows>(std::integer_sequence<int, Rows...>) {
    (void)((row == kQ4_0 + Rows && (body.template operator()<kQ4_0 + Rows>(), true)) || ...);
  }(std::make_integer_sequence<int, kRowCount - kQ4_0>());
}

}  // namespace

BlockShape block_shape(const Format& format) {
  BlockShape shape{};
  of_row(format.row, [&]<int Row>() {
    shape.span = kSpanColumns<Row>;
    shape.levels = kLevels<Row>;
  });
  return shape;
}

void block_grid(const BlockGridArgs& args) {
  of_row(args.format.row, [&]<int Row>() {
    constexpr int kSpans = static_cast<int>(kFormats[Row].group) / kSpanColumns<Row>;
    const auto* blocks = static_cast<const Block<Row>*>(args.blocks);
    const int64_t in_row = args.k / kFormats[Row].group;
    for (int place = 0; place < kLevels<Row>; ++place) {
      args.levels[place] = level_value<Row>(place);
      args.codes[place] = level_code<Row>(place);
    }
    cut(args.parallel_for, args.n, grain_rows(args.k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t s = 0; s < in_row * kSpans; ++s) {
          const SpanScale scale = span_scale<Row>(blocks[r * in_row + s / kSpans], static_cast<int>(s % kSpans));
          args.step[s * args.n + r] = scale.step;
          args.offset[s * args.n + r] = scale.offset;
        }
      }
    });
  });
}

void put_block_codes(const BlockCodesArgs& args) {
  of_row(args.format.row, [&]<int Row>() {
    constexpr int64_t kColumns = kFormats[Row].group;
    auto* blocks = static_cast<Block<Row>*>(args.blocks);
    cut(args.parallel_for, args.n, grain_rows(args.k), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin * args.k / kColumns; b < end * args.k / kColumns; ++b) {
        for (int i = 0; i < kColumns; ++i) put_code<Row>(blocks[b], i, args.codes[b * kColumns + i]);
      }
    });
  });
}

}  // namespace bitfold::cpu
