// Attention of few queries to a chunk of the packed KV cache.
//
// The tokens of a key-value head are cut into chunks (kv_attention.cu). A block of threads has a chunk and up to four
// of the queries that share the head. Blocks of 64 tokens and heads of 64 or 128 numbers have their own way
// (kv_packed.hpp); here are exact tokens and all other blocks, which are taken one after the other:
//
//     fold     the steps of the keys go into the queries, their offsets into one number for each query
//     score    a thread multiplies eight tokens of every channel that is its own; sums of threads meet in shared memory
//     weigh    a warp for each query: mask, the largest score so far, weights
//     sum      a thread adds up eight channels of every token that is its own, in registers
//
// Codes are read where they lie, each once for all queries of the tile; those that come next are on their way while a
// phase before them is at work. Sums of an earlier block shrink where a larger score is found. A chunk leaves its
// largest score, its sum of weights and its sums of values.
#include "cuda/kv_chunk.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kAhead = 4;  // words of a thread on their way together

// Shared memory, in floats: the queries times the scale and then also times steps, [head][tile], both as long as a head
// of even size, so that sums, which are written 16 bytes at a time, begin at a multiple of them; sums of threads,
// [thread of a column][tile][column]; weights, [token][tile]; offsets, [warp][tile]; what sums shrink by, [tile].
BITFOLD_HOST_DEVICE constexpr int64_t even(int64_t head) { return head + head % 2; }
class Room {
 public:
  BITFOLD_DEVICE Room(int head, int tokens, int tile)
      : folded_(static_cast<int>(even(head)) * tile),
        sums_(2 * folded_),
        weights_(sums_ + kKvSlots * tile),
        constants_(weights_ + tokens * tile),
        shrink_(constants_ + kKvWarps * tile) {}

  BITFOLD_DEVICE float* query() const { return at(0); }
  BITFOLD_DEVICE float* folded() const { return at(folded_); }
  BITFOLD_DEVICE float* sums() const { return at(sums_); }
  BITFOLD_DEVICE float* weights() const { return at(weights_); }
  BITFOLD_DEVICE float* constants() const { return at(constants_); }
  BITFOLD_DEVICE float* shrink() const { return at(shrink_); }

 private:
  BITFOLD_DEVICE static float* at(int place) { return &shared<float>() + place; }

  int folded_, sums_, weights_, constants_, shrink_;
};
BITFOLD_HOST_DEVICE constexpr int64_t tokens_at_once(const KvShape& shape) { return larger(shape.group, kKvExact); }
int64_t room_bytes(const KvShape& shape, int tile) {
  return 4 * tile * (2 * even(shape.head) + kKvSlots + tokens_at_once(shape) + kKvWarps + 1);
}

// Which words of a matrix of codes are a thread's: `word` of the rows `lane`, `lane` + `lanes`, ...
struct Share {
  int lanes, lane, word;
  bool any;

  BITFOLD_DEVICE explicit Share(int words)
      : lanes(kKvThreads / words),
        lane(static_cast<int>(threadIdx.x) / words),
        word(static_cast<int>(threadIdx.x) % words),
        any(lane < lanes) {}
};

template <KvFormat Format, int Tile>
class Attention {
 public:
  BITFOLD_DEVICE Attention(const KvJob& job, const KvPlace& place)
      : job_(job),
        place_(place),
        room_(static_cast<int>(job.shape.head), static_cast<int>(tokens_at_once(job.shape)), Tile),
        key_share_(static_cast<int>(job.shape.group / kKvWord)),
        value_share_(static_cast<int>(smaller(bitfold::ceil_div(job.shape.head, kKvWord), kKvWide / kKvWord))),
        blocks_(job, place.head) {
    channel_ = place.slice + value_share_.word * kKvWord;
    value_lane_ = value_share_.any && channel_ < job.shape.head ? value_share_.lane : group();
    group_ = job.value_groups == 1 ? 0 : channel_ / static_cast<int>(job.shape.value_group);
    for (int q = 0; q < Tile; ++q) {
      constant_[q] = 0.0f;
      for (int i = 0; i < kKvWord; ++i) sums_[q][i] = 0.0f;
    }
  }

  BITFOLD_DEVICE void run() {
    const bool exact = place_.chunk >= job_.packed_chunks;
    const int64_t token = exact ? (place_.chunk - job_.packed_chunks) * job_.exact_tokens : 0;
    const int count = exact ? static_cast<int>(smaller(job_.exact_tokens, job_.recent - token)) : 0;
    ask_for(token, count);
    read_query();
    ptx::sync_block();
    if (!exact) {
      const int64_t begin = job_.block_begin + place_.chunk * job_.chunk_blocks;
      const int64_t end = smaller(begin + job_.chunk_blocks, job_.block_end);
      const uint8_t* block = blocks_.at(begin);
      load_keys(block, 0);
      for (int64_t b = begin; b < end; ++b) {
        const uint8_t* next = b + 1 < end ? blocks_.at(b + 1) : nullptr;
        attend(b, block, next);
        block = next;
      }
    } else {
      attend_exactly(token, count);
    }
    write();
  }

 private:
  BITFOLD_DEVICE int head() const { return static_cast<int>(job_.shape.head); }
  BITFOLD_DEVICE int group() const { return static_cast<int>(job_.shape.group); }

  BITFOLD_DEVICE static float float_at(const uint8_t* block, int64_t byte) {
    return ptx::uint_as_float(ptx::load4(block + byte));
  }
  BITFOLD_DEVICE void read_query() {
    const int64_t head = job_.shape.head;
    for (int q = 0; q < Tile; ++q) {
      const int64_t r = place_.first_query + q, from = kv_query(job_, place_.head, r);
      for (int64_t d = threadIdx.x; d < head; d += kKvThreads)
        room_.query()[d * Tile + q] = r < job_.queries ? read_float(job_.query, from + d) * job_.scale : 0.0f;
    }
  }

  // ---- a packed block ----

  // A thread's next words, of rows from `row` of its own on.
  BITFOLD_DEVICE void load_keys(const uint8_t* block, int row) {
    if (!key_share_.any) return;
    const int row_bytes = group() * kBits / 8;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int d = row + key_share_.lane + i * key_share_.lanes;
      if (d < head()) words_[i] = load_word<Format>(block + d * row_bytes + key_share_.word * kBits);
    }
  }
  BITFOLD_DEVICE void load_values(const uint8_t* block, int row) {
    const int row_bytes = static_cast<int>(job_.value_row) * kBits / 8;
    const uint8_t* codes = block + job_.at.value_codes + channel_ * kBits / 8;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int t = row + value_lane_ + i * value_share_.lanes;
      if (t < group()) words_[i] = load_word<Format>(codes + t * row_bytes);
    }
  }

  BITFOLD_DEVICE void attend(int64_t number, const uint8_t* block, const uint8_t* next) {
    fold(block);
    ptx::sync_block();
    score(block);
    load_values(block, 0);
    ptx::sync_block();
    const int64_t token = number * job_.shape.group;
    const int hidden = static_cast<int>(larger<int64_t>(0, job_.first - token));
    weigh(group(), key_share_.lanes, kOffsets ? kKvWarps : 0, hidden, token - job_.first);
    ptx::sync_block();
    sum(block, hidden);
    if (next != nullptr) load_keys(next, 0);
  }

  BITFOLD_DEVICE void fold(const uint8_t* block) {
    float constants[Tile] = {};
    for (int64_t d = threadIdx.x; d < job_.shape.head; d += kKvThreads) {
      const float step = float_at(block, job_.at.key_steps + 4 * d);
      const float offset = kOffsets ? float_at(block, job_.at.key_offsets + 4 * d) : 0.0f;
#pragma unroll
      for (int q = 0; q < Tile; ++q) {
        const float x = room_.query()[d * Tile + q];
        room_.folded()[d * Tile + q] = x * step;
        constants[q] = ptx::fma(x, offset, constants[q]);
      }
    }
    if constexpr (kOffsets) {
#pragma unroll
      for (int q = 0; q < Tile; ++q) {
        const float of_warp = kv_sum_of_warp(constants[q]);
        if (ptx::lane_id() == 0) room_.constants()[ptx::warp_id() * Tile + q] = of_warp;
      }
    }
  }

  BITFOLD_DEVICE void score(const uint8_t* block) {
    if (!key_share_.any) return;
    float sums[Tile][kKvWord] = {};
    for (int row = 0; row < head(); row += kAhead * key_share_.lanes) {
      if (row > 0) load_keys(block, row);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int d = row + key_share_.lane + i * key_share_.lanes;
        if (d < head()) add_word(words_[i], room_.folded() + d * Tile, sums);
      }
    }
    float* to = room_.sums() + key_share_.lane * Tile * group() + key_share_.word * kKvWord;
#pragma unroll
    for (int q = 0; q < Tile; ++q) kv_put(sums[q], to + q * group());
  }

  BITFOLD_DEVICE static void add_word(KvWord<Format> word, const float* factors, float (&sums)[Tile][kKvWord]) {
    float numbers[kKvWord], factor[Tile];
    floats_of_word<Format>(word, numbers);
    get(factors, factor);
#pragma unroll
    for (int q = 0; q < Tile; ++q) {
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) sums[q][i] = ptx::fma(factor[q], numbers[i], sums[q][i]);
    }
  }

  // Tokens that are hidden don't count, whatever they hold.
  BITFOLD_DEVICE void sum(const uint8_t* block, int hidden) {
    shrink();
    const int64_t steps = job_.at.value_steps + int64_t{4} * group_ * group();
    const int64_t offsets = job_.at.value_offsets + int64_t{4} * group_ * group();
    for (int row = 0; row < group(); row += kAhead * value_share_.lanes) {
      if (row > 0) load_values(block, row);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int t = row + value_lane_ + i * value_share_.lanes;
        if (t >= hidden && t < group()) {
          const float step = float_at(block, steps + 4 * t);
          const float offset = kOffsets ? float_at(block, offsets + 4 * t) : 0.0f;
          float weights[Tile];
          get(room_.weights() + t * Tile, weights);
#pragma unroll
          for (int q = 0; q < Tile; ++q) {
            if (kOffsets) constant_[q] = ptx::fma(weights[q], offset, constant_[q]);
            weights[q] *= step;
          }
          add_word(words_[i], weights, sums_);
        }
      }
    }
  }

  // ---- exact tokens ----

  // Threads take rows one after the other, which are all on their way to the second cache by then.
  BITFOLD_DEVICE void ask_for(int64_t token, int count) {
    for (auto i = static_cast<int>(threadIdx.x); i < 2 * count; i += kKvThreads) {
      const bool key = i < count;
      const MatrixIn& in = key ? job_.keys : job_.values;
      const int bytes = in.dtype == DType::F64 ? 8 : in.dtype == DType::F32 ? 4 : 2;
      const int64_t at =
          kv_number(job_, place_.head, key ? job_.key_strides : job_.value_strides, token + (key ? i : i - count));
      ptx::prefetch(static_cast<const char*>(in.data) + at * bytes, head() * bytes);
    }
  }

  BITFOLD_DEVICE void attend_exactly(int64_t token, int count) {
    const int64_t head = job_.shape.head;
    for (int t = ptx::warp_id(); t < count; t += kKvWarps) {
      float sums[Tile] = {}, numbers[kKvWord];
      for (int64_t d = ptx::lane_id() * kKvWord; d < head; d += kWarp * kKvWord) {
        const int present = static_cast<int>(smaller<int64_t>(kKvWord, head - d));
        read_floats(job_.keys, kv_number(job_, place_.head, job_.key_strides, token + t) + d, 1, present, numbers);
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) {
          if (i < present) {
#pragma unroll
            for (int q = 0; q < Tile; ++q) sums[q] = ptx::fma(room_.query()[(d + i) * Tile + q], numbers[i], sums[q]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < Tile; ++q) {
        const float of_warp = kv_sum_of_warp(sums[q]);
        if (ptx::lane_id() == 0) room_.sums()[q * count + t] = of_warp;
      }
    }
    ptx::sync_block();
    weigh(count, 1, 0, 0, job_.blocks_end * job_.shape.group - job_.first + token);
    ptx::sync_block();
    shrink();
    if (!value_share_.any || channel_ >= head) return;
    const int present = static_cast<int>(smaller<int64_t>(kKvWord, head - channel_));
    for (int t = value_share_.lane; t < count; t += value_share_.lanes) {
      float numbers[kKvWord], weights[Tile];
      read_floats(job_.values, kv_number(job_, place_.head, job_.value_strides, token + t) + channel_, 1, present,
                  numbers);
      get(room_.weights() + t * Tile, weights);
#pragma unroll
      for (int q = 0; q < Tile; ++q) {
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) sums_[q][i] = ptx::fma(weights[q], numbers[i], sums_[q][i]);
      }
    }
  }

  // ---- softmax ----

  // Scores of `count` tokens, sums of `lanes` threads and `constants` warps, become weights; the first `hidden` of them
  // don't count. `key` is the place of the first among the tokens that count. A warp has a query.
  BITFOLD_DEVICE void weigh(int count, int lanes, int constants, int hidden, int64_t key) {
    const int q = ptx::warp_id();
    if (q >= Tile) return;
    float constant = 0.0f;
    for (int w = 0; w < constants; ++w) constant += room_.constants()[w * Tile + q];
    float most = most_;
    for (int t = ptx::lane_id(); t < count; t += kWarp) {
      float score = constant;
      for (int l = 0; l < lanes; ++l) score += room_.sums()[(l * Tile + q) * count + t];
      score = t < hidden ? kKvHidden : score + kv_bias(job_, place_.head, place_.first_query + q, key + t);
      room_.weights()[t * Tile + q] = score;
      most = score > most ? score : most;
    }
    most = kv_most_of_warp(most);
    float sum = 0.0f;
    for (int t = ptx::lane_id(); t < count; t += kWarp) {
      const float weight = expf(room_.weights()[t * Tile + q] - most);
      room_.weights()[t * Tile + q] = weight;
      sum += weight;
    }
    const float shrunk = expf(most_ - most);
    sum_ = ptx::fma(sum_, shrunk, kv_sum_of_warp(sum));
    most_ = most;
    if (ptx::lane_id() == 0) room_.shrink()[q] = shrunk;
  }

  BITFOLD_DEVICE void shrink() {
    float shrunk[Tile];
    get(room_.shrink(), shrunk);
#pragma unroll
    for (int q = 0; q < Tile; ++q) {
      constant_[q] *= shrunk[q];
#pragma unroll
      for (int i = 0; i < kKvWord; ++i) sums_[q][i] *= shrunk[q];
    }
  }

  // ---- results ----

  // Sums of the threads that share channels meet in their order.
  BITFOLD_DEVICE void write() {
    const int64_t head = job_.shape.head;
    const int width = static_cast<int>(smaller(bitfold::ceil_div(head, kKvWord) * kKvWord, kKvWide));
    if (value_share_.any) {
      float* to = room_.sums() + value_share_.lane * Tile * width + value_share_.word * kKvWord;
#pragma unroll
      for (int q = 0; q < Tile; ++q) {
#pragma unroll
        for (int i = 0; i < kKvWord; ++i) sums_[q][i] += constant_[q];
        kv_put(sums_[q], to + q * width);
      }
    }
    ptx::sync_block();
    const auto part = [&](int q) { return kv_part(job_, place_, place_.first_query + q); };
    const int64_t present = smaller<int64_t>(width, head - place_.slice);
    for (int q = 0; q < Tile && place_.first_query + q < job_.queries; ++q) {
      for (int64_t c = threadIdx.x; c < present; c += kKvThreads) {
        float sum = 0.0f;
        for (int l = 0; l < value_share_.lanes; ++l) sum += room_.sums()[(l * Tile + q) * width + c];
        part(q)[2 + place_.slice + c] = sum;
      }
    }
    const int q = ptx::warp_id();
    if (q < Tile && place_.first_query + q < job_.queries && place_.slice == 0 && ptx::lane_id() == 0) {
      part(q)[0] = most_;
      part(q)[1] = sum_;
    }
  }

  // ---- numbers ----

  template <int Count>
  BITFOLD_DEVICE static void get(const float* from, float (&to)[Count]) {
    if constexpr (Count == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
      for (int i = 0; i < Count; ++i) to[i] = from[i];
    }
  }
  static constexpr int kBits = kKvFormats[static_cast<int>(Format)].bits;  // and bytes of a word
  static constexpr bool kOffsets = kKvFormats[static_cast<int>(Format)].offsets;

  const KvJob& job_;
  const KvPlace& place_;
  const Room room_;
  const Share key_share_, value_share_;
  KvBlocks blocks_;
  int channel_, group_;           // this thread's of the values
  int value_lane_;                // its first token; where it has none, as many as there are
  KvWord<Format> words_[kAhead];  // of keys, then of values
  float sums_[Tile][kKvWord], constant_[Tile];
  float most_ = kKvLowest, sum_ = 0.0f;  // of the query of this warp
};

template <KvFormat Format>
BITFOLD_DEVICE void attend(const KvJob& job) {
  const KvPlace place(job);
  switch (job.tile) {
    case 1: return Attention<Format, 1>(job, place).run();
    case 2: return Attention<Format, 2>(job, place).run();
    default: return Attention<Format, 4>(job, place).run();
  }
}

__global__ void __launch_bounds__(kKvThreads) kv_chunk_kernel(KvJob job) {
  ptx::let_later_begin();  // kv_merge, which is ready then when the last chunk is
  switch (job.shape.format) {
    case KvFormat::Int8: return attend<KvFormat::Int8>(job);
    case KvFormat::Fp8: return attend<KvFormat::Fp8>(job);
    default: return attend<KvFormat::Int4>(job);
  }
}

}  // namespace

void kv_chunks(const KvJob& job, int64_t batch, Stream stream) {
  launch({.grid = dim3(kv_chunk_blocks(job, batch)),
          .block = dim3(kKvThreads),
          .shared_bytes = room_bytes(job.shape, job.tile),
          .name = "kv_attention",
          .stream = stream},
         kv_chunk_kernel, job);
}

}  // namespace bitfold::cuda
