// Keys and values of the packed KV cache as tensors, to the CPU's bits.
//
// A block of threads has a tile of a packed block's keys or values. Those of keys, whose codes lie channel by channel,
// cross over in shared memory, as bytes: a thread then has two channels, whose steps stay in its registers, and a warp
// writes whole lines of a token. Values lie as they are wanted: a thread decodes eight channels of a token.
// Exact tokens behind them are copied by a kernel of their own.
#include "cuda/kv.hpp"
#include "cuda/kv_blocks.hpp"
#include "cuda/matrix.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTile = 64;                          // tokens, and channels
constexpr int kWords = kTile / kKvWord;            // of a row of a tile
constexpr int kLoads = kTile * kWords / kThreads;  // of a thread, on their way together
// Bytes of a channel in shared memory: two threads' channels lie an odd number of banks apart.
constexpr int kPitch = kTile + 2;

struct Job {
  KvShape shape;
  KvLayout at;
  int64_t value_row;
  int64_t first;   // token
  int64_t tokens;  // of the output
  int64_t block_begin, blocks;
  int channel_tiles, tiles;  // of a block
  DType dtype;
  void *keys, *values;
  int run_count;
  KvRun runs[kKvPages];
};

BITFOLD_DEVICE float float_at(const uint8_t* block, int64_t byte) {
  return ptx::uint_as_float(ptx::load4(block + byte));
}

// code * step + offset as two operations, as anybody computes it.
template <KvFormat Format>
BITFOLD_DEVICE float number_of(float code, float step, float offset) {
  const float product = code * step;
  return kKvFormats[static_cast<int>(Format)].offsets ? ptx::add(product, offset) : product;
}

// The first `present` of Count numbers to out[at...); all of them at once where they lie so.
template <int Count>
BITFOLD_DEVICE void put(void* out, DType dtype, int64_t at, int present, const float (&x)[Count]) {
  if (present < Count || at % Count != 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (i < present) write_number(out, dtype, at + i, x[i]);
    }
    return;
  }
  if (dtype == DType::F32) {
    auto* to = static_cast<float*>(out) + at;
#pragma unroll
    for (int i = 0; i < Count; i += 2)
      ptx::store_streaming8(to + i, {ptx::float_as_uint(x[i]), ptx::float_as_uint(x[i + 1])});
    return;
  }
  uint32_t pairs[Count / 2];
#pragma unroll
  for (int i = 0; i < Count; i += 2)
    pairs[i / 2] = dtype == DType::F16 ? ptx::floats_to_halves(x[i], x[i + 1]) : ptx::floats_to_bf16s(x[i], x[i + 1]);
  auto* to = static_cast<uint16_t*>(out) + at;
  if constexpr (Count == 2) ptx::store_streaming4(to, pairs[0]);
  else ptx::store_streaming16(to, {pairs[0], pairs[1], pairs[2], pairs[3]});
}

// What a block of threads has: the tokens [token, token + kTile) and channels [channel, channel + kTile) of a packed
// block, as far as there are so many.
struct Tile {
  const uint8_t* block;
  int token, channel;
  int hidden;   // tokens of the block that don't count
  int64_t out;  // where number 0 of its token 0 lies, or would

  BITFOLD_DEVICE int64_t place(const Job& job, int t, int d) const { return out + t * job.shape.head + d; }
};

// ---- keys ----

// Codes of kKvWord tokens as bytes, to where they wait: two at a time, for that is how a channel lies.
template <KvFormat Format>
BITFOLD_DEVICE void keep(KvWord<Format> word, uint8_t* to) {
  uint2 bytes;
  if constexpr (Format == KvFormat::Int4) {
    const uint32_t low = word & 0x0f0f0f0fu, high = word >> 4 & 0x0f0f0f0fu;
    bytes = {ptx::prmt(low, high, 0x5140u), ptx::prmt(low, high, 0x7362u)};
  } else {
    bytes = word;
  }
  auto* pairs = reinterpret_cast<uint16_t*>(to);
  pairs[0] = static_cast<uint16_t>(bytes.x);
  pairs[1] = static_cast<uint16_t>(bytes.x >> 16);
  pairs[2] = static_cast<uint16_t>(bytes.y);
  pairs[3] = static_cast<uint16_t>(bytes.y >> 16);
}

// What two codes mean before their step.
template <KvFormat Format>
BITFOLD_DEVICE float2 numbers_of(uint32_t codes) {
  if constexpr (Format == KvFormat::Fp8) {
    return ptx::halves_to_floats(ptx::e4m3s_to_halves(codes));
  } else {
    return {float_of_byte(codes, 0), float_of_byte(codes, 1)};
  }
}

template <KvFormat Format>
BITFOLD_DEVICE void unpack_keys(const Job& job, const Tile& tile) {
  constexpr int kBits = kKvFormats[static_cast<int>(Format)].bits;  // and bytes of a word
  constexpr bool kOffsets = kKvFormats[static_cast<int>(Format)].offsets;
  const int head = static_cast<int>(job.shape.head), group = static_cast<int>(job.shape.group);
  uint8_t* codes = &shared<uint8_t>();
  KvWord<Format> words[kLoads];
  const int word = static_cast<int>(threadIdx.x) % kWords, row = static_cast<int>(threadIdx.x) / kWords;
  const auto wanted = [&](int i) {
    return tile.channel + row + i * kThreads / kWords < head && tile.token + word * kKvWord < group;
  };
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int d = row + i * kThreads / kWords;
    if (wanted(i)) {
      const uint8_t* from = tile.block + int64_t{tile.channel + d} * group * kBits / 8 + tile.token * kBits / 8;
      words[i] = load_word<Format>(from + word * kBits);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (wanted(i)) keep<Format>(words[i], codes + (row + i * kThreads / kWords) * kPitch + word * kKvWord);
  }
  const int pair = 2 * ptx::lane_id(), d = tile.channel + pair, present = smaller(2, head - d);
  float steps[2] = {}, offsets[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i < present) {
      steps[i] = float_at(tile.block, job.at.key_steps + 4 * (d + i));
      offsets[i] = kOffsets ? float_at(tile.block, job.at.key_offsets + 4 * (d + i)) : 0.0f;
    }
  }
  ptx::sync_block();
  if (present <= 0) return;
  const auto* left = reinterpret_cast<const uint16_t*>(codes + pair * kPitch);
  const uint16_t* right = present == 2 ? left + kPitch / 2 : left;
  const int end = smaller(kTile, group - tile.token);
  for (int t = 2 * ptx::warp_id(); t < end; t += 2 * kWarps) {
    const float2 a = numbers_of<Format>(left[t / 2]), b = numbers_of<Format>(right[t / 2]);
    const float now[2] = {number_of<Format>(a.x, steps[0], offsets[0]), number_of<Format>(b.x, steps[1], offsets[1])};
    const float then[2] = {number_of<Format>(a.y, steps[0], offsets[0]), number_of<Format>(b.y, steps[1], offsets[1])};
    const int token = tile.token + t;
    if (token >= tile.hidden) put(job.keys, job.dtype, tile.place(job, token, d), present, now);
    if (token + 1 >= tile.hidden) put(job.keys, job.dtype, tile.place(job, token + 1, d), present, then);
  }
}

// ---- values ----

template <KvFormat Format>
BITFOLD_DEVICE void unpack_values(const Job& job, const Tile& tile) {
  constexpr int kBits = kKvFormats[static_cast<int>(Format)].bits;
  constexpr bool kOffsets = kKvFormats[static_cast<int>(Format)].offsets;
  const int head = static_cast<int>(job.shape.head), group = static_cast<int>(job.shape.group);
  const int d = tile.channel + static_cast<int>(threadIdx.x) % kWords * kKvWord;
  if (d >= head) return;
  const int row = tile.token + static_cast<int>(threadIdx.x) / kWords;
  const int64_t shares = int64_t{d / static_cast<int>(job.shape.value_group)} * group;
  KvWord<Format> words[kLoads];
  float steps[kLoads], offsets[kLoads];
  const auto wanted = [&](int t) { return t >= tile.hidden && t < group; };
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int t = row + i * kThreads / kWords;
    if (wanted(t)) {
      words[i] = load_word<Format>(tile.block + job.at.value_codes + (t * job.value_row + d) * kBits / 8);
      steps[i] = float_at(tile.block, job.at.value_steps + 4 * (shares + t));
      offsets[i] = kOffsets ? float_at(tile.block, job.at.value_offsets + 4 * (shares + t)) : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int t = row + i * kThreads / kWords;
    if (wanted(t)) {
      float x[kKvWord];
      floats_of_word<Format>(words[i], x);
#pragma unroll
      for (float& number : x) number = number_of<Format>(number, steps[i], offsets[i]);
      put(job.values, job.dtype, tile.place(job, t, d), smaller(kKvWord, head - d), x);
    }
  }
}

template <KvFormat Format>
BITFOLD_DEVICE void unpack(const Job& job, const Tile& tile) {
  if (blockIdx.x % 2 == 0) unpack_keys<Format>(job, tile);
  else unpack_values<Format>(job, tile);
}

__global__ void __launch_bounds__(kThreads) kv_unpack_kernel(Job job) {
  const auto tiles = static_cast<unsigned>(job.tiles), blocks = static_cast<unsigned>(job.blocks);
  const unsigned item = blockIdx.x / 2 / tiles, tile_number = blockIdx.x / 2 % tiles;
  const int64_t head = item / blocks, block = job.block_begin + item % blocks, token = block * job.shape.group;
  const auto across = static_cast<unsigned>(job.channel_tiles);
  const Tile tile{kv_block(job, head, block, kv_run(job, block)), static_cast<int>(tile_number / across) * kTile,
                  static_cast<int>(tile_number % across) * kTile,
                  static_cast<int>(larger<int64_t>(0, job.first - token)),
                  (head * job.tokens + token - job.first) * job.shape.head};
  switch (job.shape.format) {
    case KvFormat::Int8: return unpack<KvFormat::Int8>(job, tile);
    case KvFormat::Fp8: return unpack<KvFormat::Fp8>(job, tile);
    default: return unpack<KvFormat::Int4>(job, tile);
  }
}

// ---- exact tokens ----

struct Copied {
  const char* from;
  int64_t strides[3];  // batch, head, token: in bytes
  char* to;            // where the first of these tokens lies
};
struct Copy {
  Copied keys, values;
  int64_t heads, tokens;
  int64_t token_bytes, head_bytes;  // of the output
  int width;                        // bytes that are moved at once
};

template <class T>
BITFOLD_DEVICE void copy(const char* from, char* to, int64_t bytes) {
  for (int64_t i = ptx::lane_id(); i < bytes / static_cast<int64_t>(sizeof(T)); i += kWarp)
    reinterpret_cast<T*>(to)[i] = reinterpret_cast<const T*>(from)[i];
}

BITFOLD_DEVICE void copy_token(const Copy& c, const Copied& what, unsigned head, unsigned t) {
  const auto heads = static_cast<unsigned>(c.heads);
  const char* from = what.from + head / heads * what.strides[0] + head % heads * what.strides[1] + t * what.strides[2];
  char* to = what.to + head * c.head_bytes + t * c.token_bytes;
  switch (c.width) {
    case 16: return copy<uint4>(from, to, c.token_bytes);
    case 4: return copy<uint32_t>(from, to, c.token_bytes);
    default: return copy<uint16_t>(from, to, c.token_bytes);
  }
}

// A warp has a token of a head. 32 bits are enough for their number, as many as a launch has warps.
__global__ void __launch_bounds__(kThreads) kv_copy_kernel(Copy c, unsigned items) {
  const unsigned item = blockIdx.x / 2 * kWarps + static_cast<unsigned>(ptx::warp_id());
  if (item >= items) return;
  const auto tokens = static_cast<unsigned>(c.tokens), head = item / tokens, t = item % tokens;
  if (blockIdx.x % 2 == 0) copy_token(c, c.keys, head, t);
  else copy_token(c, c.values, head, t);
}

// ---- the host's side ----

void start(const Job& job, int64_t heads, Stream stream) {
  launch({.grid = dim3(kv_grid("kv_unpack", 2 * heads * job.blocks * job.tiles)),
          .block = dim3(kThreads),
          .shared_bytes = kTile * kPitch,
          .name = "kv_unpack",
          .stream = stream},
         kv_unpack_kernel, job);
}

// Behind the `before` tokens that the output has already, of `tokens` altogether.
void copy(const KvUnpackArgs& args, const KvExact& exact, int64_t before, int64_t tokens, Stream stream) {
  const int64_t size = dtype_bits(args.dtype) / 8, token_bytes = args.shape.head * size;
  auto all = static_cast<uint64_t>(token_bytes);  // what everything that is moved begins and ends at multiples of
  const auto copied = [&](const KvTokens& from, void* out) {
    const Copied what{static_cast<const char*>(from.data),
                      {from.batch_stride * size, from.head_stride * size, from.token_stride * size},
                      static_cast<char*>(out) + before * token_bytes};
    for (const int64_t stride : what.strides) all |= static_cast<uint64_t>(stride);
    all |= reinterpret_cast<uintptr_t>(what.from) | reinterpret_cast<uintptr_t>(what.to);
    return what;
  };
  Copy c{.keys = copied(exact.keys, args.keys),
         .values = copied(exact.values, args.values),
         .heads = args.heads,
         .tokens = exact.tokens,
         .token_bytes = token_bytes,
         .head_bytes = tokens * token_bytes,
         .width = 0};
  c.width = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
  const int64_t items = args.batch * args.heads * exact.tokens;
  launch({.grid = dim3(kv_grid("kv_unpack", 2 * bitfold::ceil_div(items, kWarps))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .name = "kv_copy",
          .stream = stream},
         kv_copy_kernel, c, static_cast<unsigned>(items));
}

}  // namespace

void kv_unpack(const KvUnpackArgs& args, Stream stream) {
  const int64_t heads = args.batch * args.heads, group = args.shape.group;
  const int64_t packed = kv_blocks(args.pages, args.page_count) * group - args.first;
  int64_t tokens = packed;
  for (int64_t i = 0; i < args.exact_count; ++i) tokens += args.exact[i].tokens;
  if (heads == 0 || tokens == 0) return;
  const int64_t channel_tiles = bitfold::ceil_div(args.shape.head, kTile);
  Job job{.shape = args.shape,
          .at = kv_layout(args.shape),
          .value_row = args.shape.value_row(),
          .first = args.first,
          .tokens = tokens,
          .block_begin = 0,
          .blocks = 0,
          .channel_tiles = static_cast<int>(channel_tiles),
          .tiles = static_cast<int>(channel_tiles * bitfold::ceil_div(group, kTile)),
          .dtype = args.dtype,
          .keys = args.keys,
          .values = args.values,
          .run_count = 0,
          .runs = {}};
  each_kv_launch(args.pages, args.page_count, args.first / group,
                 [&](const KvRun* runs, int count, int64_t begin, int64_t end) {
                   for (int i = 0; i < count; ++i) job.runs[i] = runs[i];
                   job.run_count = count;
                   job.block_begin = begin;
                   job.blocks = end - begin;
                   start(job, heads, stream);
                 });
  int64_t before = packed;
  for (int64_t i = 0; i < args.exact_count; ++i) {
    if (args.exact[i].tokens > 0) copy(args, args.exact[i], before, tokens, stream);
    before += args.exact[i].tokens;
  }
}

}  // namespace bitfold::cuda
