// Encoding to GGUF's blocks: rows are read as fp32 and given to the type's search, a few at a time, so that lanes can
// work on different blocks or rows. What a search does is part of the format: its bytes are those of llama.cpp
// (x86-64).
#include "cpu/encode_blocks.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/buffer.hpp"
#include "cpu/faults.hpp"
#include "search/misfit.hpp"

namespace bitfold::cpu {
namespace {

// The first of a row's blocks that misfits, or their count.
using MisfitFn = int64_t (*)(const uint8_t* blocks, const float* w, int64_t count, float row_largest);

template <int Row>
int64_t first_misfit(const uint8_t* blocks, const float* w, int64_t count, float row_largest) {
  const auto* b = reinterpret_cast<const Block<Row>*>(blocks);
  int64_t i = 0;
  while (i < count && !misfits(b[i], w + i * kFormats[Row].group, row_largest)) ++i;
  return i;
}
template <int... Rows>
constexpr std::array<MisfitFn, sizeof...(Rows)> misfit_table(std::integer_sequence<int, Rows...>) {
  return {first_misfit<kQ4_0 + Rows>...};
}
constexpr auto kFirstMisfit = misfit_table(std::make_integer_sequence<int, kRowCount - kQ4_0>());

// Of the blocks of a row, whose weights lie in a range.
EncodeStatus check_scales(const Format& format, const uint8_t* blocks, const float* w, int64_t k, int64_t row,
                          const GroupRange& range) {
  const int64_t count = k / format.group;
  const float row_largest = std::max(-range.low, range.high);
  const int64_t first = kFirstMisfit[static_cast<size_t>(format.row - kQ4_0)](blocks, w, count, row_largest);
  if (first == count) return {};
  const float largest = largest_magnitude(w + first * format.group, format.group);
  return {misfit(largest), row, first * format.group, largest, 0};
}

}  // namespace

EncodeStatus encode_blocks(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const int64_t n = args.w.rows, k = args.w.columns;
  const int64_t row_bytes = k / args.format.group * args.format.info().block_bytes;
  const EncodeBlocksFn weighted = kernels.encode_blocks_weighted[args.format.row];
  const bool by_importance = args.importance != nullptr && weighted != nullptr;
  const EncodeBlocksFn search = by_importance ? weighted : kernels.encode_blocks[args.format.row];
  const EncodeRangesFn at_once = by_importance ? nullptr : kernels.encode_ranges[args.format.row];
  const bool in_place = args.w.dtype == DType::F32 && args.w.column_stride == 1 && args.w.row_stride == k;
  Faults faults;
  cut(args.parallel_for, ceil_div(n, kEncodeRows), 1, [&](int64_t begin, int64_t end) {
    Buffer<float> read(in_place ? 0 : std::min(n, kEncodeRows) * k);
    for (int64_t first = begin * kEncodeRows; first < std::min(n, end * kEncodeRows); first += kEncodeRows) {
      const int64_t rows = std::min(kEncodeRows, n - first);
      const float* w = in_place ? static_cast<const float*>(args.w.data) + first * k : read.data();
      for (int64_t r = 0; !in_place && r < rows; ++r) read_row(kernels, args.w, first + r, read.data() + r * k);
      uint8_t* blocks = static_cast<uint8_t*>(args.out.codes) + first * row_bytes;
      const EncodeBlocksArgs batch{w, args.importance, rows, k, blocks};
      if (at_once != nullptr && at_once(batch)) continue;
      std::array<GroupRange, kEncodeRows> ranges;
      bool finite = true;
      for (int64_t r = 0; r < rows && finite; ++r) {
        GroupRange& range = ranges[static_cast<size_t>(r)];
        range = kernels.group_range(w + r * k, k);
        finite = range.finite;
        if (!finite) faults.add(not_finite(w + r * k, k, first + r));
      }
      if (!finite) continue;
      if (at_once == nullptr) search(batch);
      for (int64_t r = 0; r < rows && !args.clamp; ++r) {
        const EncodeStatus status =
            check_scales(args.format, blocks + r * row_bytes, w + r * k, k, first + r, ranges[static_cast<size_t>(r)]);
        if (status.fault != EncodeFault::None) {
          faults.add(status);
          break;
        }
      }
    }
  });
  return faults.first();
}

}  // namespace bitfold::cpu
