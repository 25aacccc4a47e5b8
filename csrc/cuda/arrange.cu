// x for the tile kernel: fp16, in the order of a format's operands, with sums over sub-blocks where it has minima.
//
// bf16 becomes fp16 times a power of two for each token, so that its largest lies in [2^14, 2^15): all that is within
// 2^-31 of it stays exact. fp16 stays as it is. What lies beyond k, and tokens that aren't there, are zero.
#include "cuda/tile.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunksEach = 8;  // of a block

struct Args {
  const uint16_t* x;
  int64_t row_stride, column_stride;  // elements
  int64_t k, m;
  bool bf16;
  Order order;
  int chunks, groups;
  uint8_t* out;
  uint8_t* sums;
  float* factors;
  uint32_t* arrivals;
  int arrivals_count;
};

struct Memory {
  uint32_t peaks[kThreads / kWarp];
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

BITFOLD_DEVICE uint16_t element(const Args& args, int64_t token, int64_t column) {
  if (token >= args.m || column >= args.k) return 0;
  return ptx::load2(args.x + token * args.row_stride + column * args.column_stride);
}

// The token's exponent: its largest magnitude is looked for in the whole row.
BITFOLD_DEVICE int find_exponent(const Args& args, int64_t token) {
  auto& memory = shared<Memory>();
  uint32_t peak = 0;
  for (int64_t c = threadIdx.x; c < args.k; c += kThreads) peak = larger(peak, element(args, token, c) & 0x7fffu);
  for (int other = kWarp / 2; other > 0; other /= 2) peak = larger(peak, ptx::shuffle_xor(peak, other));
  if (ptx::lane_id() == 0) memory.peaks[ptx::warp_id()] = peak;
  ptx::sync_block();
  for (const uint32_t other : memory.peaks) peak = larger(peak, other);
  return exponent_to_fp16(peak);
}

__global__ void __launch_bounds__(kThreads) arrange_kernel(const Args args) {
  const int64_t token = blockIdx.x;
  const auto thread = static_cast<int>(threadIdx.x);
  const int exponent = args.bf16 ? find_exponent(args, token) : 0;
  const float scale = power_of_two(exponent);
  const auto converted = [&](int64_t column) -> uint32_t {
    const uint16_t bits = element(args, token, column);
    return args.bf16 ? ptx::float_to_half(ptx::bf16_to_float(bits) * scale) : bits;
  };
  if (blockIdx.y == 0 && thread == 0) args.factors[token] = power_of_two(14 - exponent);
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = thread; i < args.arrivals_count; i += kThreads) args.arrivals[i] = 0;
  }

  const int first = static_cast<int>(blockIdx.y) * kChunksEach, last = smaller(first + kChunksEach, args.chunks);
  const int64_t group = token / 8;
  const int row = static_cast<int>(token % 8), units = args.order.columns / kUnit;
  // A lane's 16 bytes: b0, b1 of an even step and of the next.
  const int quads = args.order.columns / 8;
  for (int i = thread; i < (last - first) * quads; i += kThreads) {
    const int chunk = first + i / quads, pair = i % quads / 4, t = i % 4;
    const int64_t begin = int64_t{chunk} * args.order.columns;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint8_t* columns = args.order.column + (2 * pair + w / 2) * 16 + t * 4 + w % 2 * 2;
      words[w] = converted(begin + columns[0]) | converted(begin + columns[1]) << 16;
    }
    const int64_t unit = int64_t{chunk} * units + pair / 2;
    auto* to = reinterpret_cast<uint4*>(args.out + (unit * args.groups + group) * kUnitBytes);
    to[pair % 2 * kWarp + 4 * row + t] = {words[0], words[1], words[2], words[3]};
  }

  // Sums over sub-blocks, a 32nd of them, as a half and the rest: [chunk][group][lane] as the step for minima wants it.
  const int mins = args.order.mins;
  for (int i = thread; i < (last - first) * mins; i += kThreads) {
    const int chunk = first + i / mins, sub = i % mins, columns = args.order.columns / mins;
    const int64_t begin = int64_t{chunk} * args.order.columns + sub * columns;
    float sum = 0.0f;
    for (int c = 0; c < columns; ++c) {
      sum = ptx::add(sum, ptx::half_to_float(static_cast<uint16_t>(converted(begin + c))));
    }
    sum *= 1.0f / 32.0f;
    const uint16_t high = ptx::float_to_half(sum);
    const uint16_t low = ptx::float_to_half(sum - ptx::half_to_float(high));
    auto* to = reinterpret_cast<uint16_t*>(args.sums) + (int64_t{chunk} * args.groups + group) * (kWarp * mins / 2) +
               (4 * row + sub % 8 / 2) * (mins / 2);
    const int place = sub / 8 * 2 + sub % 2;
    to[place] = high;
    to[mins / 4 + place] = low;
  }
}

}  // namespace

void arrange(const MatrixIn& x, const Order& order, const TileParameter& p, Stream stream) {
  const Args args{
      .x = static_cast<const uint16_t*>(x.data),
      .row_stride = x.row_stride,
      .column_stride = x.column_stride,
      .k = x.columns,
      .m = x.rows,
      .bf16 = x.dtype == DType::BF16,
      .order = order,
      .chunks = p.chunks,
      .groups = p.groups,
      .out = const_cast<uint8_t*>(p.x),
      .sums = const_cast<uint8_t*>(p.sums),
      .factors = const_cast<float*>(p.factors),
      .arrivals = p.arrivals,
      .arrivals_count = p.shape.splits > 1 ? p.shape.row_blocks * p.shape.token_blocks : 0,
  };
  launch(
      {.grid = {static_cast<unsigned>(8 * p.groups), static_cast<unsigned>(larger(ceil_div(p.chunks, kChunksEach), 1))},
       .block = kThreads,
       .shared_bytes = sizeof(Memory),
       .name = "arrange",
       .stream = stream},
      arrange_kernel, args);
}

}  // namespace bitfold::cuda
