// Blocks of the packed KV cache as kernels read them: pages that are arguments of a launch, and the numbers of a word
// of codes.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.hpp"
#include "formats/kv.hpp"

namespace bitfold::cuda {

inline constexpr int kKvWord = 8;    // numbers that a thread takes at once
inline constexpr int kKvPages = 96;  // of one launch, whose arguments have 4 KB

// The blocks of a page, counted over all that the call reads.
struct KvRun {
  const uint8_t* data;
  int64_t begin;
  int64_t head_stride;  // bytes
};

inline unsigned kv_grid(const char* op, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": there are more queries and tokens than a launch has blocks");
  return static_cast<unsigned>(blocks);
}

// Calls fn(runs, how many, first and last block) for each launch over the packed blocks from `first_block` on.
template <class Fn>
void each_kv_launch(const KvPage* pages, int64_t page_count, int64_t first_block, const Fn& fn) {
  KvRun runs[kKvPages];
  int count = 0;
  int64_t begin = 0, launch_begin = first_block;
  for (int64_t p = 0; p < page_count; ++p) {
    const int64_t end = begin + pages[p].blocks;
    if (end > first_block) {
      if (count == kKvPages) {
        fn(runs, count, launch_begin, begin);
        launch_begin = begin;
        count = 0;
      }
      runs[count++] = {pages[p].data, begin, pages[p].head_stride};
    }
    begin = end;
  }
  if (count > 0) fn(runs, count, launch_begin, begin);
}

// The last of a job's runs that begins at a block or before, as run `from` does: steps that double until they are too
// long, and halves of them.
template <class Job>
BITFOLD_DEVICE int kv_run(const Job& job, int64_t block, int from = 0) {
  const auto begins = [&](int run) { return run < job.run_count && job.runs[run].begin <= block; };
  int step = 1;
  for (; begins(from + step); step *= 2) from += step;
  while ((step /= 2) > 0) {
    if (begins(from + step)) from += step;
  }
  return from;
}
// A head's block, of that run.
template <class Job>
BITFOLD_DEVICE const uint8_t* kv_block(const Job& job, int64_t head, int64_t block, int run) {
  const KvRun& pages = job.runs[run];
  return pages.data + head * pages.head_stride + (block - pages.begin) * job.at.bytes;
}

// The codes of kKvWord numbers.
template <KvFormat Format>
using KvWord = std::conditional_t<Format == KvFormat::Int4, uint32_t, uint2>;

template <KvFormat Format>
BITFOLD_DEVICE KvWord<Format> load_word(const uint8_t* at) {
  if constexpr (Format == KvFormat::Int4) {
    return ptx::load_streaming4(at);
  } else {
    // Values of fp8 begin at a multiple of four where the head size is odd.
    if (Format == KvFormat::Fp8 && reinterpret_cast<uintptr_t>(at) % 8 != 0)
      return {ptx::load_streaming4(at), ptx::load_streaming4(at + 4)};
    return ptx::load_streaming8(at);
  }
}

// Byte i of four, 0 to 255, as a float: 2^23 and a byte is a float whose lowest bits are the byte.
BITFOLD_DEVICE float float_of_byte(uint32_t bytes, int i) {
  const float moved = ptx::uint_as_float(ptx::prmt(bytes, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i)));
  return ptx::add(moved, -8388608.0f);
}
BITFOLD_DEVICE void floats_of_bytes(uint32_t bytes, float (&out)[kKvWord], int first, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[first + i * step] = float_of_byte(bytes, i);
}

template <KvFormat Format>
BITFOLD_DEVICE void floats_of_word(KvWord<Format> word, float (&out)[kKvWord]) {
  if constexpr (Format == KvFormat::Int8) {
    floats_of_bytes(word.x, out, 0, 1);
    floats_of_bytes(word.y, out, 4, 1);
  } else if constexpr (Format == KvFormat::Int4) {
    floats_of_bytes(word & 0x0f0f0f0fu, out, 0, 2);
    floats_of_bytes(word >> 4 & 0x0f0f0f0fu, out, 1, 2);
  } else {
    const uint32_t pairs[4] = {word.x, word.x >> 16, word.y, word.y >> 16};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 numbers = ptx::halves_to_floats(ptx::e4m3s_to_halves(pairs[i] & 0xffffu));
      out[2 * i] = numbers.x;
      out[2 * i + 1] = numbers.y;
    }
  }
}

}  // namespace bitfold::cuda
