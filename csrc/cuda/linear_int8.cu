// y = x W^T + b with x rounded to 8 bits, row by row: the launches, two or three of them, whatever x holds.
#include "cuda/int8.hpp"
#include "cuda/linear_int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int64_t kStripWords = 8;   // of int8_mark's blocks
constexpr int64_t kFlagRows = 256;   // fewer aren't worth a part of their own
constexpr int64_t kFlagParts = 8;    // every thread that rounds looks at all of them
constexpr int64_t kTableShare = 64;  // of k: more outliers than k over this are right, and slow
constexpr int64_t kBoundary = 256;   // bytes
constexpr int64_t kPieceWords = kInt8Piece / 32;
static_assert(kStripWords % kPieceWords == 0);

// Where everything lies in the workspace.
class Layout8 {
 public:
  explicit Layout8(const LinearInt8Args& args) {
    const int64_t m = args.x.rows, k = args.w.k;
    words = ceil_div<int64_t>(k, 32 * kStripWords) * kStripWords;
    flag_parts = smaller(kFlagParts, larger<int64_t>(ceil_div<int64_t>(m, kFlagRows), 1));
    stride = ceil_div<int64_t>(k, kInt8Piece) * kInt8Piece;
    parts = ceil_div<int64_t>(k, kPartColumns);
    const bool finds = args.threshold > 0 && k > 0;
    reached = take(finds ? flag_parts * words * 4 : 0);
    copied = take(args.copies > 0 ? words * 4 : 0);
    outliers = take(finds ? k * 4 : 0);
    outlier_count = take(finds ? 4 : 0);
    const auto whole = [](int64_t count) { return ceil_div<int64_t>(count, kInt8Lines) * kInt8Lines; };
    const int64_t lines = whole(k / kTableShare + 1);
    table_rows = whole(args.w.n);
    table_tokens = whole(m);
    loose_huge = take(finds ? 4 : 0);
    found = take(finds ? words / kPieceWords * static_cast<int64_t>(sizeof(Int8Found)) : 0);
    loose = table(finds ? lines : 0);
    exact = table(smaller(lines, whole(args.copies)));
    codes = take(m * stride);
    steps = take(m * 4);
    sums = take(m * parts * 4);
    tiles = int8_tiles(m, args.w.n, k, gpu());
    const int64_t rest = m % tiles.tokens;
    const int64_t sums = larger(tiles.tokens * tiles.splits, rest * int8_tiles(rest, args.w.n, k, gpu()).splits);
    partial = take(tiles.count > 0 ? sums * table_rows * 4 : 0);
  }
  int64_t words, flag_parts, stride, parts, table_rows, table_tokens;
  int64_t reached, copied, outliers, outlier_count, loose_huge, found, codes, steps, sums, partial;
  struct Table {
    int64_t w, x, lines;
    Int8Table at(char* base) const {
      return {reinterpret_cast<float*>(base + w), reinterpret_cast<float*>(base + x), static_cast<int>(lines)};
    }
  };
  Table loose, exact;
  Int8Tiles tiles;
  int64_t bytes = 0;

 private:
  int64_t take(int64_t count) {
    const int64_t begin = bytes;
    bytes += ceil_div<int64_t>(count, kBoundary) * kBoundary;
    return begin;
  }
  Table table(int64_t lines) {
    const int64_t w = take(lines * table_rows * 4), x = take(lines * table_tokens * 4);
    return {w, x, lines};
  }
};

// The op for the tokens [first, end) alone, which have been rounded.
Int8Op tokens_of(Int8Op op, int64_t first, int64_t end) {
  const int64_t bytes = op.x.dtype == DType::F32 ? 4 : 2;
  op.x.data = static_cast<const char*>(op.x.data) + first * op.x.row_stride * bytes;
  op.x.rows = end - first;
  op.y = static_cast<char*>(op.y) + first * op.n * bytes;
  op.loose.x += first, op.exact.x += first;
  op.x_codes += first * op.stride;
  op.steps += first, op.sums += first * op.parts;
  op.tiles = int8_tiles(op.x.rows, op.n, op.k, gpu());
  return op;
}

bool empty(const LinearInt8Args& args) { return args.x.rows == 0 || args.w.n == 0; }

}  // namespace

int64_t linear_int8_workspace(const LinearInt8Args& args) { return empty(args) ? 0 : Layout8(args).bytes; }

void linear_int8(const LinearInt8Args& args, void* workspace, Stream stream) {
  if (empty(args)) return;
  const Layout8 at(args);
  auto* base = static_cast<char*>(workspace);
  const bool finds = args.threshold > 0 && args.w.k > 0;
  const Int8Op op{
      .codes = static_cast<const uint8_t*>(args.w.codes),
      .scales = args.w.scales,
      .scale_dtype = scale_dtype(args.w.format.scale),
      .one_scale = args.w.format.group == kPerTensor,
      .zeros = args.w.zeros,
      .n = args.w.n,
      .k = args.w.k,
      .x = args.x,
      .bias = args.bias,
      .y = args.y,
      .threshold = static_cast<float>(args.threshold),
      .finds = finds,
      .per_row = args.per_row,
      .x_scale = args.x_scale,
      .columns = args.columns,
      .copy = {args.copy, args.copy_dtype, args.w.n, args.copies, args.copies, 1},
      .copies = static_cast<int>(args.copies),
      .reached = reinterpret_cast<uint32_t*>(base + at.reached),
      .copied = args.copies > 0 ? reinterpret_cast<uint32_t*>(base + at.copied) : nullptr,
      .words = at.words,
      .flag_parts = static_cast<int>(at.flag_parts),
      .flag_rows = ceil_div<int64_t>(args.x.rows, at.flag_parts),
      .outliers = reinterpret_cast<int32_t*>(base + at.outliers),
      .outlier_count = finds ? reinterpret_cast<int32_t*>(base + at.outlier_count) : nullptr,
      .loose = at.loose.at(base),
      .exact = at.exact.at(base),
      .found = finds ? reinterpret_cast<Int8Found*>(base + at.found) : nullptr,
      .table_rows = at.table_rows,
      .table_tokens = at.table_tokens,
      .loose_huge = reinterpret_cast<uint32_t*>(base + at.loose_huge),
      .x_codes = reinterpret_cast<int8_t*>(base + at.codes),
      .stride = at.stride,
      .steps = reinterpret_cast<float*>(base + at.steps),
      .sums = reinterpret_cast<int32_t*>(base + at.sums),
      .parts = static_cast<int>(at.parts),
      .tiles = at.tiles,
      .partial = reinterpret_cast<int32_t*>(base + at.partial),
  };
  if (finds || args.copies > 0) int8_mark(op, stream);
  int8_round(op, stream);
  for (int64_t row = 0; row < args.x.rows; row += at.tiles.tokens) {
    const Int8Op some = tokens_of(op, row, smaller(args.x.rows, row + at.tiles.tokens));
    if (some.tiles.count == 0) {
      int8_rows(some, stream);
    } else {
      int8_tile(some, stream);
      int8_finish(some, stream);
    }
  }
}

}  // namespace bitfold::cuda
