// Blocks of the packed KV cache from keys and values, to the CPU's bytes.
//
// A block of threads has the keys or the values of one packed block. Keys share a step along the tokens: a thread has a
// channel, its neighbours the next, so that each token is read in a row. Values share one along the channels: a warp
// has a token's group of them. Both read their numbers twice, for the range and for the codes; the second time they
// come from the caches.
#include "cuda/kv.hpp"
#include "cuda/matrix.hpp"
#include "cuda/ranges.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTokens = 16, kPiece = 8;  // that a thread reads at once: of a channel, and channels of a value
constexpr float kNone = std::bit_cast<float>(0x7fc00000u), kMost = std::bit_cast<float>(0x7f7fffffu);
constexpr float kInfinity = std::bit_cast<float>(0x7f800000u);

struct Job {
  KvShape shape;
  KvLayout at;
  int64_t value_groups, value_row;
  int bits;
  bool offsets;
  float most;  // the largest code, or what it means
  MatrixIn keys, values;
  int64_t key_strides[3], value_strides[3];  // batch, head, token
  int64_t heads, blocks;
  uint8_t* out;
};

// Of numbers that share a step.
struct Range {
  float low = kInfinity, high = -kInfinity;
  bool finite = true;

  BITFOLD_DEVICE void widen(float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    finite = finite && fabsf(x) <= kMost;
  }
};

struct Step {
  float step, offset;
};

BITFOLD_DEVICE Step step_of(const Job& job, const Range& range) {
  const float largest = range.high > -range.low ? range.high : -range.low;
  const float spread = job.offsets ? ptx::add(range.high, -range.low) : largest;
  const float step = ptx::add(ptx::div(spread, job.most), 0.0f);  // here and in offset: no -0
  if (!range.finite || fabsf(step) > kMost) return {kNone, 0.0f};
  return {step, job.offsets ? ptx::add(range.low, 0.0f) : 0.0f};
}

BITFOLD_DEVICE uint32_t code_of(const Job& job, const Step& step, float x) {
  if (!(fabsf(step.step) > 0.0f)) return 0;  // nothing to tell apart, or NaN
  const float scaled = ptx::div(ptx::add(x, -step.offset), step.step);
  if (!job.offsets) return float_to_minifloat<kFp8E4m3, true>(scaled);
  return static_cast<uint32_t>(ptx::float_to_int(smaller(larger(rintf(scaled), 0.0f), job.most)));
}

BITFOLD_DEVICE float* float_at(uint8_t* block, int64_t byte) { return reinterpret_cast<float*>(block + byte); }

// The codes of Count numbers, as many as fill whole words, to `to`.
template <int Count>
BITFOLD_DEVICE void put_codes(const Job& job, const Step& step, const float (&x)[Count], int present, uint8_t* to) {
  const int each = 32 / job.bits;
#pragma unroll
  for (int first = 0; first < Count; first += 4) {
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = first + i < present ? code_of(job, step, x[first + i]) : 0;
    if (each == 4) {
      ptx::store_streaming4(to + first, codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24);
    } else {
      const uint32_t half = codes[0] | codes[1] << 4 | codes[2] << 8 | codes[3] << 12;
      *reinterpret_cast<uint16_t*>(to + first / 2) = static_cast<uint16_t>(half);
    }
  }
}

BITFOLD_DEVICE void pack_keys(const Job& job, int64_t from, uint8_t* block) {
  const int64_t stride = job.key_strides[2];
  for (int64_t d = threadIdx.x; d < job.shape.head; d += kThreads) {
    float x[kTokens];
    Range range;
    for (int64_t t = 0; t < job.shape.group; t += kTokens) {
      read_floats(job.keys, from + t * stride + d, stride, kTokens, x);
#pragma unroll
      for (const float number : x) range.widen(number);
    }
    const Step step = step_of(job, range);
    *float_at(block, job.at.key_steps + 4 * d) = step.step;
    if (job.offsets) *float_at(block, job.at.key_offsets + 4 * d) = step.offset;
    for (int64_t t = 0; t < job.shape.group; t += kTokens) {
      read_floats(job.keys, from + t * stride + d, stride, kTokens, x);
      put_codes(job, step, x, kTokens, block + (d * job.shape.group + t) * job.bits / 8);
    }
  }
}

BITFOLD_DEVICE void pack_values(const Job& job, int64_t from, uint8_t* block) {
  const int64_t count = job.shape.value_group, padded = job.value_groups == 1 ? job.value_row : count;
  for (int64_t i = ptx::warp_id(); i < job.shape.group * job.value_groups; i += kWarps) {
    const int64_t t = i / job.value_groups, g = i % job.value_groups, first = g * count;
    const auto read = [&](int64_t c, float (&x)[kPiece]) {
      const int present = static_cast<int>(smaller<int64_t>(kPiece, larger<int64_t>(0, count - c)));
      read_floats(job.values, from + t * job.value_strides[2] + first + c, 1, present, x);
      return present;
    };
    float x[kPiece];
    Range range;
    for (int64_t c = ptx::lane_id() * kPiece; c < count; c += kWarp * kPiece) {
      const int present = read(c, x);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        if (j < present) range.widen(x[j]);
      }
    }
    const Step step = step_of(job, over_warp(range));
    uint8_t* to = block + job.at.value_codes + (t * job.value_row + first) * job.bits / 8;
    for (int64_t c = ptx::lane_id() * kPiece; c < padded; c += kWarp * kPiece) {
      const int present = read(c, x);
      put_codes(job, step, x, present, to + c * job.bits / 8);
    }
    if (ptx::lane_id() == 0) {
      *float_at(block, job.at.value_steps + 4 * (g * job.shape.group + t)) = step.step;
      if (job.offsets) *float_at(block, job.at.value_offsets + 4 * (g * job.shape.group + t)) = step.offset;
    }
  }
}

__global__ void __launch_bounds__(kThreads) kv_pack_kernel(Job job) {
  const int64_t item = blockIdx.x / 2, head = item / job.blocks;
  const int64_t token = item % job.blocks * job.shape.group;
  uint8_t* block = job.out + item * job.at.bytes;
  const auto from = [&](const int64_t (&strides)[3]) {
    return head / job.heads * strides[0] + head % job.heads * strides[1] + token * strides[2];
  };
  if (blockIdx.x % 2 == 0) {
    pack_keys(job, from(job.key_strides), block);
    return;
  }
  pack_values(job, from(job.value_strides), block);
  const int64_t end = job.at.value_offsets + (job.offsets ? 4 * job.value_groups * job.shape.group : 0);
  for (int64_t i = end + threadIdx.x; i < job.at.bytes; i += kThreads) block[i] = 0;
}

MatrixIn numbers_of(const KvTokens& tokens) { return {tokens.data, tokens.dtype, 0, 0, 0, 1}; }

}  // namespace

void kv_pack(const KvPackArgs& args, Stream stream) {
  const int64_t items = args.batch * args.heads * args.blocks;
  if (items == 0) return;
  const KvFormatRow& row = args.shape.info();
  const Job job{.shape = args.shape,
                .at = kv_layout(args.shape),
                .value_groups = args.shape.value_groups(),
                .value_row = args.shape.value_row(),
                .bits = row.bits,
                .offsets = row.offsets,
                .most = row.most,
                .keys = numbers_of(args.keys),
                .values = numbers_of(args.values),
                .key_strides = {args.keys.batch_stride, args.keys.head_stride, args.keys.token_stride},
                .value_strides = {args.values.batch_stride, args.values.head_stride, args.values.token_stride},
                .heads = args.heads,
                .blocks = args.blocks,
                .out = args.out};
  launch({.grid = dim3(static_cast<unsigned>(2 * items)),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .name = "kv_pack",
          .stream = stream},
         kv_pack_kernel, job);
}

}  // namespace bitfold::cuda
