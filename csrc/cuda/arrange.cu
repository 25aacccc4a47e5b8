// x for the tile kernel: fp16, in the order of a format's operands, with sums over sub-blocks where it has minima.
//
// bf16 becomes fp16 times a power of two for each token, so that its largest lies in [2^14, 2^15): all that is within
// 2^-31 of it stays exact. fp16 stays as it is. What lies beyond k, and tokens that aren't there, are zero.
//
// A block has a range of chunks of a token: all of them where there are tokens enough. It brings its range to shared
// memory as it is, eight numbers a load and many loads on their way, and takes it from there in the order that is
// wanted. The largest it looks for in the whole row: the others' ranges are in the second cache by then.
#include "cuda/tile.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostColumns = 8192, kMostOfARow = 32768;  // of a block: 16 KB, and 64 KB where it has the whole row

struct Args {
  const uint16_t* x;
  int64_t row_stride, column_stride;  // elements
  int64_t k, m;
  bool bf16;
  bool aligned;  // rows are contiguous, on 16-byte boundaries
  Order order;
  bool wgmma;  // in whose order (wgmma.hpp)
  int chunks, groups;
  int chunks_each;  // of a block
  uint8_t* out;
  uint8_t* sums;
  float* factors;
  uint32_t* arrivals;
  int arrivals_count;
};

// Behind it lie the block's columns of x.
struct alignas(16) Memory {
  uint32_t peaks[kThreads / kWarp];
  uint8_t column[256];
};

// 14 - floor(log2) of a bf16's magnitude, within what a float's power of two can undo; 0 for zero, infinity and NaN.
BITFOLD_DEVICE int exponent_to_fp16(uint32_t magnitude) {
  const int field = static_cast<int>(magnitude >> 7);
  if (magnitude == 0 || field == 255) return 0;
  return smaller(14 - (field - 127), 126);
}
BITFOLD_DEVICE float power_of_two(int exponent) {
  return ptx::uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

BITFOLD_DEVICE uint32_t peak_of(uint32_t two) { return larger(two & 0x7fffu, two >> 16 & 0x7fffu); }

BITFOLD_DEVICE uint16_t element(const Args& args, int64_t token, int64_t column) {
  return ptx::load2(args.x + token * args.row_stride + column * args.column_stride);
}

BITFOLD_DEVICE uint32_t peak_of(const uint4& eight) {
  return larger(larger(peak_of(eight.x), peak_of(eight.y)), larger(peak_of(eight.z), peak_of(eight.w)));
}

// The token's exponent: its largest magnitude is looked for in the whole row, which `row` is where the block has it.
BITFOLD_DEVICE int find_exponent(const Args& args, Memory& memory, int64_t token, const uint16_t* row) {
  uint32_t peak = 0;
  const auto thread = static_cast<int>(threadIdx.x);
  if (gridDim.y == 1) {
    const int eights = args.chunks * args.order.columns / 8;
    for (int i = thread; i < eights; i += kThreads)
      peak = larger(peak, peak_of(reinterpret_cast<const uint4*>(row)[i]));
  } else {
    const int64_t eights = args.aligned ? args.k / 8 : 0;
    const uint16_t* x = args.x + token * args.row_stride;
#pragma unroll 8
    for (int64_t i = thread; i < eights; i += kThreads) peak = larger(peak, peak_of(ptx::load16(x + 8 * i)));
#pragma unroll 8
    for (int64_t c = 8 * eights + thread; c < args.k; c += kThreads) {
      peak = larger(peak, element(args, token, c) & 0x7fffu);
    }
  }
  for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
  if (ptx::lane_id() == 0) memory.peaks[ptx::warp_id()] = peak;
  ptx::sync_block();
  for (const uint32_t other : memory.peaks) peak = larger(peak, other);
  return exponent_to_fp16(peak);
}

// Columns [begin, begin + count) of the token; beyond k, and of a token that isn't there, zeros.
BITFOLD_DEVICE void copy_columns(const Args& args, int64_t token, int64_t begin, int count, uint16_t* row) {
  const int there = token < args.m ? static_cast<int>(smaller<int64_t>(count, args.k - begin)) : 0;
  const int eights = args.aligned ? there / 8 : 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < eights; i += kThreads) {
    reinterpret_cast<uint4*>(row)[i] = ptx::load16(args.x + token * args.row_stride + begin + 8 * i);
  }
#pragma unroll 4
  for (int i = 8 * eights + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    row[i] = i < there ? element(args, token, begin + i) : uint16_t{0};
  }
}

__global__ void __launch_bounds__(kThreads) arrange_kernel(const Args args) {
  auto& memory = shared<Memory>();
  auto* row_of_block = reinterpret_cast<uint16_t*>(&memory + 1);
  const int64_t token = blockIdx.x;
  const auto thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.y) * args.chunks_each;
  const int chunks = smaller(args.chunks_each, args.chunks - first), columns = args.order.columns;
  memory.column[thread] = args.order.column[thread];
  copy_columns(args, token, int64_t{first} * columns, chunks * columns, row_of_block);
  ptx::sync_block();  // columns are there
  const int exponent = args.bf16 && token < args.m ? find_exponent(args, memory, token, row_of_block) : 0;
  const float scale = power_of_two(exponent);
  if (blockIdx.y == 0 && thread == 0) args.factors[token] = power_of_two(14 - exponent);
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = thread; i < args.arrivals_count; i += kThreads) args.arrivals[i] = 0;
  }
  const auto converted = [&](uint32_t two) -> uint32_t {
    if (!args.bf16) return two;
    const float2 numbers = ptx::bf16s_to_floats(two);
    return ptx::floats_to_halves(numbers.x * scale, numbers.y * scale);
  };

  // Two halves of b_r, in the order of the format.
  const auto pair_of = [&](const uint16_t* begin, int step, int t, int r) {
    const uint8_t* two = memory.column + step * 16 + t * 4 + 2 * r;
    return converted(begin[two[0]] | static_cast<uint32_t>(begin[two[1]]) << 16);
  };
  const int64_t group = token / 8;
  const int row = static_cast<int>(token % 8), units = columns / kUnit;
  // Pieces of 16 bytes: b0, b1 of an even step and of the next for a lane; or a step's b0 or b1 for four.
  const int pieces = columns / 8;
  for (int i = thread; i < chunks * pieces; i += kThreads) {
    const int chunk = i / pieces, two = i % pieces / 4, t = i % 4;
    const uint16_t* begin = row_of_block + chunk * columns;
    const int64_t unit = int64_t{first + chunk} * units + two / 2;
    uint8_t* to = args.out + (unit * args.groups + (args.wgmma ? group / 8 * 8 : group)) * kUnitBytes;
    uint32_t words[4];
    if (args.wgmma) {
      const int step = 2 * two + t / 2, r = t % 2;
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pair_of(begin, step, w, r);
      to += (step % kUnitSteps * 2 + r) * (kQuarter * 16) + token % kQuarter * 16;
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pair_of(begin, 2 * two + w / 2, t, w % 2);
      to += (two % 2 * kWarp + 4 * row + t) * 16;
    }
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
  }

  // Sums over sub-blocks, a 32nd of them, as a half and the rest: as the step for minima wants it.
  const int mins = args.order.mins;
  for (int i = thread; i < chunks * mins; i += kThreads) {
    const int chunk = i / mins, sub = i % mins, width = columns / mins;
    const auto* begin = reinterpret_cast<const uint32_t*>(row_of_block + chunk * columns + sub * width);
    float sum = 0.0f;
    for (int c = 0; c < width / 2; ++c) {
      const float2 two = ptx::halves_to_floats(converted(begin[c]));
      sum = ptx::add(ptx::add(sum, two.x), two.y);
    }
    sum *= 1.0f / 32.0f;
    const uint16_t high = ptx::float_to_half(sum);
    const uint16_t low = ptx::float_to_half(sum - ptx::half_to_float(high));
    auto* to = reinterpret_cast<uint16_t*>(args.sums) + int64_t{first + chunk} * args.groups * (kWarp * mins / 2);
    int to_low;        // halves from one to the other
    if (args.wgmma) {  // [quarter][high or low][8 sub-blocks][token][sub-block]
      to += group / 8 * (kQuarter * 2 * mins) + (sub / 8 * kQuarter + token % kQuarter) * 8 + sub % 8;
      to_low = kQuarter * mins;
    } else {  // [group][lane]
      to += group * (kWarp * mins / 2) + (4 * row + sub % 8 / 2) * (mins / 2) + sub / 8 * 2 + sub % 2;
      to_low = mins / 4;
    }
    to[0] = high;
    to[to_low] = low;
  }
}

// Two blocks for each multiprocessor where the chunks of all tokens are so many, and no more columns than shared memory
// is for.
int chunks_of_a_block(const Order& order, int64_t tokens, int64_t chunks) {
  const int64_t parts = larger<int64_t>(2 * gpu().multiprocessors / tokens, 1);
  if (parts == 1 && chunks * order.columns <= kMostOfARow) return static_cast<int>(larger<int64_t>(chunks, 1));
  return static_cast<int>(larger<int64_t>(smaller<int64_t>(ceil_div(chunks, parts), kMostColumns / order.columns), 1));
}

}  // namespace

void arrange(const MatrixIn& x, const Order& order, const TileParameter& p, Stream stream) {
  const int each = chunks_of_a_block(order, int64_t{8} * p.groups, p.chunks);
  const Args args{
      .x = static_cast<const uint16_t*>(x.data),
      .row_stride = x.row_stride,
      .column_stride = x.column_stride,
      .k = x.columns,
      .m = x.rows,
      .bf16 = x.dtype == DType::BF16,
      .aligned = x.column_stride == 1 && (x.row_stride % 8 == 0 || x.rows == 1) &&
                 reinterpret_cast<uintptr_t>(x.data) % 16 == 0,
      .order = order,
      .wgmma = p.shape.wgmma,
      .chunks = p.chunks,
      .groups = p.groups,
      .chunks_each = each,
      .out = const_cast<uint8_t*>(p.x),
      .sums = const_cast<uint8_t*>(p.sums),
      .factors = const_cast<float*>(p.factors),
      .arrivals = p.arrivals,
      .arrivals_count = p.shape.splits > 1 ? p.shape.row_blocks * p.shape.token_blocks : 0,
  };
  launch({.grid = {static_cast<unsigned>(8 * p.groups), static_cast<unsigned>(larger(ceil_div(p.chunks, each), 1))},
          .block = kThreads,
          .shared_bytes = static_cast<int64_t>(sizeof(Memory)) + int64_t{each} * order.columns * 2,
          .name = "arrange",
          .stream = stream},
         arrange_kernel, args);
}

}  // namespace bitfold::cuda
