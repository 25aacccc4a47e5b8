// x to rows of 8-bit codes: which columns are outliers, and the codes of all others.
//
// int8_mark: a block looks through a strip of columns of some hundred rows; each part of the rows has bits of its own,
// so that nobody has to clear them, and no order matters. int8_round: a block rounds a row; one more block makes the
// ascending list of outliers that have no copy.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStripWords = 8;
constexpr int kStrip = 32 * kStripWords;  // columns of a block of int8_mark

// ---- which columns reach the threshold, and of which there are copies ----

struct MarkMemory {
  uint32_t reached[kStripWords];
  uint32_t copied[kStripWords];
};

__global__ void __launch_bounds__(kThreads) int8_mark_kernel(const Int8Op op) {
  auto& memory = shared<MarkMemory>();
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * kStrip;
  if (thread < kStripWords) memory.reached[thread] = memory.copied[thread] = 0;
  ptx::sync_block();
  if (op.finds) {
    const int64_t begin = blockIdx.y * op.flag_rows, end = smaller(begin + op.flag_rows, op.x.rows);
    uint32_t mine = 0;  // bit i: column 32 i + lane
#pragma unroll 2
    for (int64_t row = begin + ptx::warp_id(); row < end; row += kWarps) {
#pragma unroll
      for (int i = 0; i < kStripWords; ++i) {
        const int64_t column = first + 32 * i + ptx::lane_id();
        if (column < op.k && reaches(op, int8_x(op, row, column))) mine |= 1u << i;
      }
    }
#pragma unroll
    for (int i = 0; i < kStripWords; ++i) {
      const uint32_t columns = ptx::ballot(mine >> i & 1u);
      if (ptx::lane_id() == 0) ptx::atomic_or(&memory.reached[i], columns);
    }
  }
  if (op.copied != nullptr && blockIdx.y == 0) {
    for (int i = thread; i < op.copies; i += kThreads) {
      const int64_t column = op.columns[i];
      if (column < 0 || column >= op.k || (i > 0 && column <= op.columns[i - 1])) ptx::trap();
      if (column < first || column >= first + kStrip) continue;
      const auto within = static_cast<int>(column - first);
      ptx::atomic_or(&memory.copied[within / 32], 1u << within % 32);
    }
  }
  ptx::sync_block();
  if (thread >= kStripWords) return;
  const int64_t word = int64_t{blockIdx.x} * kStripWords + thread;
  if (op.finds) op.reached[blockIdx.y * op.words + word] = memory.reached[thread];
  if (op.copied != nullptr && blockIdx.y == 0) op.copied[word] = memory.copied[thread];
}

// Columns [32 word, 32 word + 32) that have no codes: those with a copy, and unless a row has its own those that reach
// the threshold in any row.
BITFOLD_DEVICE uint32_t copied(const Int8Op& op, int64_t word) { return op.copied != nullptr ? op.copied[word] : 0u; }
BITFOLD_DEVICE uint32_t reached(const Int8Op& op, int64_t word) {
  uint32_t bits = 0;
  for (int part = 0; part < op.flag_parts; ++part) bits |= op.reached[part * op.words + word];
  return bits;
}

// ---- a row's codes ----

struct RoundMemory {
  uint32_t largest;  // magnitude of the columns with codes, as bits
  uint32_t all;      // of all columns
  int sum;
  int counts[kWarps + 1];
};

// Of four neighbouring columns, zeros behind k.
struct Four {
  float x[4];
  uint32_t outliers;  // bits
};
BITFOLD_DEVICE Four four_of(const Int8Op& op, int64_t row, int64_t column) {
  Four four{};
  const auto count = static_cast<int>(smaller<int64_t>(4, larger<int64_t>(op.k - column, 0)));
  read_floats<4>(op.x, row * op.x.row_stride + column * op.x.column_stride, op.x.column_stride, count, four.x);
  if (count == 0) return four;
  uint32_t bits = copied(op, column / 32);
  if (op.finds && !op.per_row) bits |= reached(op, column / 32);
  four.outliers = bits >> column % 32 & 15u;
  if (op.finds && op.per_row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.outliers |= (reaches(op, four.x[i]) ? 1u : 0u) << i;
  }
  return four;
}

BITFOLD_DEVICE void round_row(const Int8Op& op, RoundMemory& memory, int64_t row) {
  const auto thread = static_cast<int>(threadIdx.x);
  uint32_t largest = 0, all = 0;
#pragma unroll 2
  for (int64_t column = 4 * thread; column < op.k; column += 4 * kThreads) {
    const Four four = four_of(op, row, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = ptx::float_as_uint(magnitude(four.x[i]));
      all = larger(all, bits);
      if (!(four.outliers >> i & 1u)) largest = larger(largest, bits);
    }
  }
  ptx::atomic_max(&memory.largest, largest);
  ptx::atomic_max(&memory.all, all);
  ptx::sync_block();
  const float peak = ptx::uint_as_float(memory.largest);
  const bool number = memory.all < 0x7f800000u, fixed = op.x_scale != nullptr;
  const bool rounds = number && (fixed || peak >= kSmallestRow);
  const float step = fixed ? *op.x_scale : ptx::div(peak, 127.0f);
  const float inverse = !rounds ? 0.0f : fixed ? ptx::div(1.0f, step) : ptx::div(127.0f, peak);
  if (thread == 0) op.steps[row] = !number ? ptx::uint_as_float(0x7fc00000u) : rounds ? step : 0.0f;
  for (int part = 0; part < op.parts; ++part) {
    const int64_t begin = part * kPartColumns, end = smaller(begin + kPartColumns, op.stride);
    int sum = 0;
#pragma unroll 2
    for (int64_t column = begin + 4 * thread; column < end; column += 4 * kThreads) {
      const Four four = rounds ? four_of(op, row, column) : Four{};
      uint32_t codes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Clamped first, which gives the same; adding 1.5 2^23 rounds to even.
        const float clamped = smaller(larger(ptx::mul(four.x[i], inverse), -127.0f), 127.0f);
        const int even = ptx::float_as_int(ptx::add(clamped, 0x1.8p23f)) - 0x4b400000;
        const int code = four.outliers >> i & 1u ? 0 : even;
        sum += code;
        codes |= (static_cast<uint32_t>(code) & 255u) << 8 * i;
      }
      *reinterpret_cast<uint32_t*>(op.x_codes + row * op.stride + column) = codes;
    }
    ptx::atomic_add(&memory.sum, sum);
    ptx::sync_block();
    if (thread == 0) {
      op.sums[row * op.parts + part] = memory.sum;
      memory.sum = 0;
    }
    ptx::sync_block();
  }
}

// ---- the list of outliers ----

BITFOLD_DEVICE void list_outliers(const Int8Op& op, RoundMemory& memory) {
  const auto thread = static_cast<int>(threadIdx.x);
  int before = 0;  // this round of words
#pragma unroll 1
  for (int64_t first = 0; first < op.words; first += kThreads) {
    const int64_t word = first + thread;
    uint32_t bits = word < op.words ? reached(op, word) & ~copied(op, word) : 0u;
    int upto = ptx::popc(bits);  // of this warp's words up to this one
#pragma unroll
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const int other = ptx::shuffle_up(upto, delta);
      if (ptx::lane_id() >= delta) upto += other;
    }
    if (ptx::lane_id() == kWarp - 1) memory.counts[ptx::warp_id()] = upto;
    ptx::sync_block();
    int at = before + upto - ptx::popc(bits);
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < ptx::warp_id()) at += memory.counts[warp];
      before += memory.counts[warp];
    }
    for (; bits != 0; bits &= bits - 1) {
      const int bit = 31 - ptx::clz(bits & (0u - bits));
      op.outliers[at++] = static_cast<int32_t>(32 * word + bit);
    }
    ptx::sync_block();
  }
  if (thread == 0) *op.outlier_count = before;
}

__global__ void __launch_bounds__(kThreads) int8_round_kernel(const Int8Op op) {
  auto& memory = shared<RoundMemory>();
  if (threadIdx.x == 0) memory = {};
  if (blockIdx.x == 0 && op.tiles.splits > 1) {
    for (auto i = static_cast<int>(threadIdx.x); i < op.tiles.count; i += kThreads) op.arrivals[i] = 0;
  }
  ptx::sync_block();
  if (blockIdx.x < op.x.rows) round_row(op, memory, blockIdx.x);
  else list_outliers(op, memory);
}

}  // namespace

void int8_mark(const Int8Op& op, Stream stream) {
  launch({.grid = dim3(static_cast<unsigned>(op.words / kStripWords), static_cast<unsigned>(op.flag_parts)),
          .block = kThreads,
          .shared_bytes = sizeof(MarkMemory),
          .name = "int8_mark",
          .stream = stream},
         int8_mark_kernel, op);
}

void int8_round(const Int8Op& op, Stream stream) {
  launch({.grid = static_cast<unsigned>(op.x.rows + (op.finds ? 1 : 0)),
          .block = kThreads,
          .shared_bytes = sizeof(RoundMemory),
          .name = "int8_round",
          .stream = stream},
         int8_round_kernel, op);
}

}  // namespace bitfold::cuda
