// Encoding to GGUF's blocks: rows are read as fp32 and given to the type's search, a few at a time, so that lanes can
// work on different blocks or rows. What a search does is part of the format: its bytes are those of llama.cpp
// (x86-64).
#include "cpu/encode_blocks.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/buffer.hpp"
#include "cpu/faults.hpp"
#include "formats/blocks.hpp"

namespace bitfold::cpu {
namespace {

// The largest multiple of its scale, or of a scale and a minimum of one size, that a type can mean.
constexpr float reach(int row) {
  switch (row) {
    case kQ4_0: return 8;
    case kQ4_1: return 15 + 1;
    case kQ5_0: return 16;
    case kQ5_1: return 31 + 1;
    case kQ8_0: return 127;
    case kQ2K: return 15 * 3;
    case kQ3K: return 32 * 4;
    case kQ4K: return 63 * 15;
    case kQ5K: return 63 * 31;
    case kQ6K: return 128 * 32;
    case kIq4Nl: return 127;
    case kIq4Xs: return 32 * 127;
    default: return 0;
  }
}
// Twice what a type reaches with the largest scale of binary16. Sums of a search leave binary32 far beyond that (3e14
// and more), and the scale that comes of them may be finite and mean nothing; nearer, the stored scale is infinite.
template <int Row>
inline constexpr float kFar = 2 * reach(Row) * 65504.0f;
// Where the largest weight of a block is smaller, MXFP4's exponent wraps: to 255, which means none, and for the
// smallest number of all, 2^-149, down to kMxfp4Wrapped. With steps so large all codes are 0.
inline constexpr float kNearMxfp4 = 0x1p-125f;

float largest_magnitude(const float* w, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(w[i]));
  return largest;
}

// Whether the block's scale is none for its weights; row_largest is at least the largest of them.
template <int Row>
bool misfits(const Block<Row>& b, const float* w, float row_largest) {
  constexpr int64_t kColumns = kFormats[Row].group;
  if (block_overflows(b)) return true;
  if constexpr (Row == kMxfp4) return b.e >= kMxfp4Wrapped && largest_magnitude(w, kColumns) < kNearMxfp4;
  else return row_largest > kFar<Row> && largest_magnitude(w, kColumns) > kFar<Row>;
}

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
  const EncodeFault fault = largest < kNearMxfp4 ? EncodeFault::ScaleUnderflow : EncodeFault::ScaleOverflow;
  return {fault, row, first * format.group, largest, 0};
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
