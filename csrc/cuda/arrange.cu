// x for the tile kernel: fp16, in the order of a format's operands, with sums over sub-blocks where it has minima.
//
// bf16 becomes fp16 times a power of two for each token, so that its largest lies in [2^14, 2^15): all that is within
// 2^-31 of it stays exact. fp16 stays as it is. What lies beyond k, and tokens that aren't there, are zero.
//
// Two kernels: one looks for the largest of every row, in parts; one takes 256 columns of some tokens, converts them on
// their way to shared memory, and writes them from there in the order that is wanted. With wgmma a lane is a token, so
// that all lanes of a warp want the same column, of rows that lie an odd number of words apart, and a warp writes 512
// bytes on end. The second reads the rows backwards: the last of them are in the second cache.
#include "cuda/tile.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kColumns = 256;                            // of a block: some chunks
constexpr int kManyRows = 32, kFewRows = kManyRows / 2;  // tokens of a block: with wgmma, and without
constexpr int kStride = kColumns / 2 + 1;                // words from token to token

struct Args {
  const uint16_t* x;
  int64_t row_stride, column_stride;  // elements
  int64_t k;
  int m;
  bool bf16;
  bool aligned;  // rows are contiguous, on 16-byte boundaries
  Order order;
  bool wgmma;  // in whose order (wgmma.hpp)
  int chunks, groups;
  int chunks_each;  // of a block
  int parts;        // of a row that have a peak each
  uint32_t* peaks;  // [token][part]
  uint8_t* out;
  uint8_t* sums;
  float* factors;
  uint32_t* arrivals;
  int arrivals_count;
};

BITFOLD_DEVICE uint16_t element(const Args& args, int64_t token, int64_t column) {
  return ptx::load_fresh2(args.x + token * args.row_stride + column * args.column_stride);
}

// ---- the largest magnitudes ----

// Of the halves of words: each is the upper end of a word, whose lower end decides nothing.
struct Peak {
  uint32_t high = 0, low = 0;
  BITFOLD_DEVICE void see(uint32_t two) {
    high = larger(high, two & 0x7fffffffu);
    low = larger(low, two << 17);
  }
  BITFOLD_DEVICE void see(const uint4& eight) {
    see(eight.x);
    see(eight.y);
    see(eight.z);
    see(eight.w);
  }
  BITFOLD_DEVICE uint32_t value() const { return larger(high >> 16, low >> 17); }
};

__global__ void __launch_bounds__(kThreads) arrange_peaks_kernel(const Args args) {
  constexpr int kAhead = 8;  // loads of a thread on their way
  auto& peaks = shared<uint32_t[kWarps]>();
  const int64_t token = blockIdx.x, part = blockIdx.y;
  const uint16_t* x = args.x + token * args.row_stride;
  const auto thread = static_cast<int>(threadIdx.x);
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  Peak peak;
  const int64_t eights = args.aligned ? args.k / 8 : 0;
  const int64_t first = eights * part / args.parts, last = eights * (part + 1) / args.parts;
  for (int64_t i = first + thread; i < last; i += kAhead * kThreads) {
    uint4 loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j * kThreads < last) loaded[j] = ptx::load_fresh16(x + 8 * (i + j * kThreads));
      else loaded[j] = {0, 0, 0, 0};
    }
#pragma unroll
    for (const uint4& eight : loaded) peak.see(eight);
  }
  for (int64_t c = 8 * eights + part * kThreads + thread; c < args.k; c += int64_t{args.parts} * kThreads) {
    peak.see(uint32_t{element(args, token, c)});
  }
  uint32_t most = peak.value();
  for (int other = kWarp / 2; other > 0; other /= 2) most = larger(most, ptx::shuffle_xor(most, other));
  if (ptx::lane_id() == 0) peaks[ptx::warp_id()] = most;
  ptx::sync_block();
  if (thread > 0) return;
  for (const uint32_t other : peaks) most = larger(most, other);
  args.peaks[token * args.parts + part] = most;
}

// By eight lanes in a row, for a token.
BITFOLD_DEVICE int exponent_of(const Args& args, int token) {
  uint32_t most = 0;
  if (args.bf16 && token < args.m) {
#pragma unroll
    for (int j = 0; j < kMostPeaks; j += 8) {
      const int part = j + ptx::lane_id() % 8;
      if (part < args.parts) most = larger(most, ptx::load_fresh4(args.peaks + token * args.parts + part));
    }
  }
  for (int other = 4; other > 0; other /= 2) most = larger(most, ptx::shuffle_xor(most, other));
  return exponent_to_fp16(most, true);
}

// ---- the order ----

struct Memory {
  alignas(16) uint32_t places[kColumns];  // of an order's entries in a token's numbers, bytes
  float scales[kManyRows];
  uint32_t numbers[kManyRows * kStride];  // pairs of halves
};

class Block {
  const Args& args_;
  Memory& memory_;
  const int tokens_, chunks_, columns_, units_;
  const int first_token_, first_chunk_, first_column_;
  const int tokens_there_;

 public:
  BITFOLD_DEVICE Block(const Args& args, Memory& memory)
      : args_(args),
        memory_(memory),
        tokens_(args.wgmma ? kManyRows : kFewRows),
        chunks_(smaller(args.chunks_each, args.chunks - static_cast<int>(blockIdx.x) * args.chunks_each)),
        columns_(chunks_ * args.order.columns),
        units_(columns_ / kUnit),
        first_token_(static_cast<int>(gridDim.y - 1 - blockIdx.y) * tokens_),
        first_chunk_(static_cast<int>(blockIdx.x) * args.chunks_each),
        first_column_(first_chunk_ * args.order.columns),
        tokens_there_(smaller(tokens_, args.m - first_token_)) {}

  // A warp takes 64 columns of four tokens at a time, so that what it stores meets all banks.
  BITFOLD_DEVICE void bring() {
    constexpr int kMost = kManyRows / 4 * (kColumns / kUnit) / kWarps;
    constexpr int kApart = kWarps / (kColumns / kUnit) * 4;  // tokens
    const auto thread = static_cast<int>(threadIdx.x);
    const int token = ptx::warp_id() / 4 * 4 + ptx::lane_id() / 8;
    const int column = ptx::warp_id() % 4 * kUnit + 8 * (ptx::lane_id() % 8);
    const bool vectors = args_.aligned && first_column_ + columns_ <= args_.k;
    // Behind arrange_peaks x is there: that began after all that came before it.
    if (!args_.bf16) ptx::wait_for_earlier();
    uint4 loaded[kMost];
    const uint16_t* x = args_.x + int64_t{first_token_ + token} * args_.row_stride + (first_column_ + column);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      loaded[j] = {0, 0, 0, 0};
      if (vectors && column < columns_ && token + kApart * j < tokens_there_) loaded[j] = ptx::load_fresh16(x);
      x += kApart * args_.row_stride;
    }
    const int entry = thread & (args_.order.columns - 1);  // chunks are 64, 128 or 256 columns
    memory_.places[thread] = static_cast<uint32_t>(2 * (thread - entry + args_.order.column[entry]));
    ptx::wait_for_earlier();
    ptx::let_later_begin();
    const int exponent = exponent_of(args_, first_token_ + thread / 8);
    if (thread % 8 == 0 && thread / 8 < tokens_) {
      memory_.scales[thread / 8] = power_of_two(exponent);
      if (blockIdx.x == 0) args_.factors[first_token_ + thread / 8] = power_of_two(14 - exponent);
    }
    ptx::sync_block();
    if (vectors && column < columns_) {
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (token + kApart * j < tokens_) put(token + kApart * j, column, loaded[j]);
      }
    }
    if (!vectors && column < columns_) {
#pragma unroll 1
      for (int j = 0; j < kMost; ++j) {
        const int other = token + kApart * j;
        if (other < tokens_) put(other, column, eight_numbers(other, column));
      }
    }
    ptx::sync_block();
  }

  // [step][b0 or b1][token] 16 bytes: four pairs.
  BITFOLD_DEVICE void write_quarters() const {
    const int token = first_token_ + ptx::lane_id();
    const int group = token / kQuarter * (kQuarter / 8);
#pragma unroll 1
    for (int step = ptx::warp_id(); step < units_ * kUnitSteps; step += kWarps) {
      uint32_t b0[4], b1[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) pairs_of(ptx::lane_id(), 4 * step + t, b0[t], b1[t]);
      uint8_t* to = unit_of(step / kUnitSteps, group) + step % kUnitSteps * (2 * kQuarter * 16) + token % kQuarter * 16;
      *reinterpret_cast<uint4*>(to) = {b0[0], b0[1], b0[2], b0[3]};
      *reinterpret_cast<uint4*>(to + kQuarter * 16) = {b1[0], b1[1], b1[2], b1[3]};
    }
  }

  // [group of 8 tokens][pair of steps][lane] 16 bytes: b0 and b1 of both steps.
  BITFOLD_DEVICE void write_groups() const {
    const int pieces = units_ * (kUnitSteps / 2), lane = ptx::lane_id();
#pragma unroll 1
    for (int i = ptx::warp_id(); i < pieces * (tokens_ / 8); i += kWarps) {
      const int group = i / pieces, two = i % pieces, t = lane % 4;
      uint32_t words[4];
      pairs_of(8 * group + lane / 4, 4 * (2 * two) + t, words[0], words[1]);
      pairs_of(8 * group + lane / 4, 4 * (2 * two + 1) + t, words[2], words[3]);
      uint8_t* to = unit_of(two / 2, first_token_ / 8 + group) + (two % 2 * kWarp + lane) * 16;
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    }
  }

  // Sums over sub-blocks, a 32nd of them, as a half and the rest: as the step for minima wants it.
  BITFOLD_DEVICE void write_sums() const {
    const int mins = args_.order.mins, width = args_.order.columns / larger(mins, 1);
    for (int i = static_cast<int>(threadIdx.x); i < tokens_ * chunks_ * mins; i += kThreads) {
      const int row = i % tokens_, chunk = i / tokens_ / mins, sub = i / tokens_ % mins;
      const uint32_t* begin = memory_.numbers + row * kStride + (chunk * args_.order.columns + sub * width) / 2;
      float sum = 0.0f;
#pragma unroll 8
      for (int c = 0; c < width / 2; ++c) {
        const float2 two = ptx::halves_to_floats(begin[c]);
        sum = ptx::add(ptx::add(sum, two.x), two.y);
      }
      sum *= 1.0f / 32.0f;
      const uint16_t high = ptx::float_to_half(sum);
      const uint16_t low = ptx::float_to_half(sum - ptx::half_to_float(high));
      const int token = first_token_ + row, group = token / 8;
      auto* to =
          reinterpret_cast<uint16_t*>(args_.sums) + int64_t{first_chunk_ + chunk} * args_.groups * (kWarp * mins / 2);
      int to_low;         // halves from one to the other
      if (args_.wgmma) {  // [quarter][high or low][8 sub-blocks][token][sub-block]
        to += group / 8 * (kQuarter * 2 * mins) + (sub / 8 * kQuarter + token % kQuarter) * 8 + sub % 8;
        to_low = kQuarter * mins;
      } else {  // [group][lane]
        to += group * (kWarp * mins / 2) + (4 * (token % 8) + sub % 8 / 2) * (mins / 2) + sub / 8 * 2 + sub % 2;
        to_low = mins / 4;
      }
      to[0] = high;
      to[to_low] = low;
    }
  }

 private:
  // b0 and b1 of a token: entries 4 i to 4 i + 3 of the order.
  BITFOLD_DEVICE void pairs_of(int row, int i, uint32_t& b0, uint32_t& b1) const {
    const auto& at = reinterpret_cast<const uint4*>(memory_.places)[i];
    const auto* numbers = reinterpret_cast<const uint8_t*>(memory_.numbers + row * kStride);
    const auto half = [&](uint32_t place) -> uint32_t { return *reinterpret_cast<const uint16_t*>(numbers + place); };
    b0 = half(at.x) | half(at.y) << 16;
    b1 = half(at.z) | half(at.w) << 16;
  }

  // Eight columns of a token one by one; beyond k, and of a token that isn't there, zeros.
  BITFOLD_DEVICE uint4 eight_numbers(int token, int column) const {
    uint32_t words[4] = {0, 0, 0, 0};
    for (int j = 0; j < 8; ++j) {
      if (token >= tokens_there_ || first_column_ + column + j >= args_.k) break;
      const uint32_t one = element(args_, first_token_ + token, first_column_ + column + j);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] |= j / 2 == w ? one << 16 * (j % 2) : 0u;
    }
    return {words[0], words[1], words[2], words[3]};
  }

  BITFOLD_DEVICE void put(int token, int column, const uint4& eight) const {
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    uint32_t* to = memory_.numbers + token * kStride + column / 2;
    const float scale = memory_.scales[token];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 two = ptx::bf16s_to_floats(words[w]);
      to[w] = args_.bf16 ? ptx::floats_to_halves(two.x * scale, two.y * scale) : words[w];
    }
  }

  BITFOLD_DEVICE uint8_t* unit_of(int unit, int group) const {
    return args_.out + int64_t{(first_column_ / kUnit + unit) * args_.groups + group} * kUnitBytes;
  }
};

__global__ void __launch_bounds__(kThreads, 6) arrange_kernel(const Args args) {
  Block block(args, shared<Memory>());
  block.bring();
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < args.arrivals_count; i += kThreads) args.arrivals[i] = 0;
  }
  if (args.wgmma) block.write_quarters();
  else block.write_groups();
  block.write_sums();
}

// So that there are two blocks for each multiprocessor, and a thread has something to do.
int parts_of_a_row(int64_t tokens, int64_t k) {
  const int64_t most = smaller<int64_t>(kMostPeaks, ceil_div<int64_t>(k, 8 * kThreads));
  return static_cast<int>(larger<int64_t>(smaller<int64_t>(2 * gpu().multiprocessors / tokens, most), 1));
}

}  // namespace

void arrange(const MatrixIn& x, const Order& order, const TileParameter& p, Stream stream) {
  const int each = kColumns / order.columns;
  const Args args{
      .x = static_cast<const uint16_t*>(x.data),
      .row_stride = x.row_stride,
      .column_stride = x.column_stride,
      .k = x.columns,
      .m = static_cast<int>(x.rows),
      .bf16 = x.dtype == DType::BF16,
      .aligned = x.column_stride == 1 && (x.row_stride % 8 == 0 || x.rows == 1) &&
                 reinterpret_cast<uintptr_t>(x.data) % 16 == 0,
      .order = order,
      .wgmma = p.shape.wgmma,
      .chunks = p.chunks,
      .groups = p.groups,
      .chunks_each = each,
      .parts = parts_of_a_row(x.rows, x.columns),
      .peaks = p.peaks,
      .out = const_cast<uint8_t*>(p.x),
      .sums = const_cast<uint8_t*>(p.sums),
      .factors = const_cast<float*>(p.factors),
      .arrivals = p.arrivals,
      .arrivals_count = p.shape.splits > 1 ? p.shape.row_blocks * p.shape.token_blocks : 0,
  };
  if (args.bf16) {
    launch({.grid = {static_cast<unsigned>(x.rows), static_cast<unsigned>(args.parts)},
            .block = kThreads,
            .shared_bytes = kWarps * 4,
            .name = "arrange_peaks",
            .stream = stream,
            .early = gpu().early},
           arrange_peaks_kernel, args);
  }
  const int tokens = args.wgmma ? kManyRows : kFewRows;
  launch({.grid = {static_cast<unsigned>(larger(ceil_div(p.chunks, each), 1)),
                   static_cast<unsigned>(8 * p.groups / tokens)},
          .block = kThreads,
          .shared_bytes = sizeof(Memory),
          .name = "arrange",
          .stream = stream,
          .early = gpu().early},
         arrange_kernel, args);
}

}  // namespace bitfold::cuda
