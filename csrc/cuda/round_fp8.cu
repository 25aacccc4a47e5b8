// Rows of x to e4m3 and a scale each, to the CPU's bytes: a block, a row.
//
// A row is read twice, for its largest magnitude and for its codes; the second time it comes from the caches. With a
// given scale the first pass only looks for NaN.
#include "cuda/fp8.hpp"
#include "cuda/lane.hpp"
#include "cuda/matrix.hpp"
#include "search/codes.inl"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kPiece = 8;
constexpr float kNone = std::bit_cast<float>(0x7fc00000u), kMost = std::bit_cast<float>(0x7f7fffffu);

// The largest magnitude of a row, and whether it has a NaN.
struct Extreme {
  float magnitude;
  bool nan;
};

struct Largest {
  float of_warp[kWarps];
};

// Calls fn(first, present, numbers) for each kPiece columns of row r.
template <class Fn>
BITFOLD_DEVICE void each_piece(const RoundFp8Args& a, int64_t r, const Fn& fn) {
  for (int64_t first = int64_t{threadIdx.x} * kPiece; first < a.x.columns; first += kThreads * kPiece) {
    const int present = static_cast<int>(smaller<int64_t>(kPiece, a.x.columns - first));
    float numbers[kPiece];
    read_floats(a.x, r * a.x.row_stride + first * a.x.column_stride, a.x.column_stride, present, numbers);
    fn(first, present, numbers);
  }
}

// By all threads of the block, which get the same.
BITFOLD_DEVICE Extreme extreme_of_row(const RoundFp8Args& a, int64_t r) {
  float magnitude = 0.0f;
  bool nan = false;
  each_piece(a, r, [&](int64_t, int, const float (&numbers)[kPiece]) {
    for (const float number : numbers) {
      nan = nan || number != number;
      magnitude = fabsf(number) > magnitude ? fabsf(number) : magnitude;
    }
  });
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = ptx::shuffle_xor(magnitude, mask);
    magnitude = other > magnitude ? other : magnitude;
  }
  if (!ptx::all(!nan)) magnitude = kNone;
  float (&largest)[kWarps] = shared<Largest>().of_warp;
  if (ptx::lane_id() == 0) largest[ptx::warp_id()] = magnitude;
  ptx::sync_block();
  Extreme row{0.0f, false};
  for (int i = 0; i < kWarps; ++i) {
    const float other = largest[i];
    row.nan = row.nan || other != other;
    row.magnitude = other > row.magnitude ? other : row.magnitude;
  }
  ptx::sync_block();
  return row;
}

BITFOLD_DEVICE float scale_of_row(const RoundFp8Args& a, const Extreme& row) {
  if (row.nan) return kNone;
  if (a.x_scale != nullptr) return *a.x_scale;
  return row.magnitude > kMost ? kNone : ptx::div(row.magnitude, kFp8Largest);
}

__global__ void __launch_bounds__(kThreads) round_rows(RoundFp8Args a) {
  for (int64_t r = blockIdx.x; r < a.x.rows; r += gridDim.x) {
    const float scale = scale_of_row(a, extreme_of_row(a, r));
    const search::Codes<kE4m3> codes(scale == 0.0f ? 1.0f : scale, 0);
    each_piece(a, r, [&](int64_t first, int present, const float (&numbers)[kPiece]) {
      for (int i = 0; i < present; ++i) {
        const float number = fabsf(numbers[i]) > kMost ? (numbers[i] < 0.0f ? -kMost : kMost) : numbers[i];
        const auto code = scale == scale ? static_cast<uint8_t>(codes(search::F{number}).v) : kFp8Nan;
        a.codes[r * a.x.columns + first + i] = code;
      }
    });
    if (threadIdx.x == 0) a.scales[r] = scale;
  }
}

}  // namespace

void round_fp8(const RoundFp8Args& args, Stream stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  if (args.x.rows == 0) return;
  launch({.grid = dim3(static_cast<unsigned>(smaller(args.x.rows, kMostBlocks))),
          .block = dim3(kThreads),
          .shared_bytes = sizeof(Largest),
          .name = "round_fp8",
          .stream = stream},
         round_rows, args);
}

}  // namespace bitfold::cuda
