// Attention's chunks, put together in their order.
#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kMergeWarps = 16, kMergeThreads = kMergeWarps * kWarp;
constexpr int kEach = 4, kMergeChannels = kEach * kWarp;  // of a lane, and of a block of threads
constexpr int kAtOnce = 5;                                // chunks of a warp, all of which are on their way together

struct Memory {
  float most[kMergeWarps], total[kMergeWarps], sums[kMergeWarps][kMergeChannels];
};

// A block of threads has some channels of a query of a key-value head. A warp has every sixteenth chunk, and what the
// warps found is put together as chunks are. A query that sees nothing is 0.
__global__ void __launch_bounds__(kMergeThreads) kv_merge_kernel(KvMerge m) {
  auto& memory = shared<Memory>();
  const auto slices = static_cast<unsigned>(bitfold::ceil_div(m.head, int64_t{kMergeChannels}));
  const auto queries = static_cast<unsigned>(m.queries), heads = static_cast<unsigned>(m.heads);
  const auto rows = static_cast<unsigned>(m.rows);
  const unsigned place = blockIdx.x / slices, head = place / queries, r = place % queries;
  const int64_t channel = int64_t{blockIdx.x % slices} * kMergeChannels;
  const int64_t size = m.queries * (m.head + 2);
  const float* parts = m.parts + head * m.chunks * size + r * (m.head + 2);
  const int warp = ptx::warp_id(), lane = ptx::lane_id();
  ptx::wait_for_earlier();
  ptx::let_later_begin();

  float most = kKvLowest, total = 0.0f, sums[kEach] = {};
#pragma unroll 1
  for (int64_t begin = warp; begin < m.chunks; begin += kMergeWarps * kAtOnce) {
    float mosts[kAtOnce], totals[kAtOnce], values[kAtOnce][kEach];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t chunk = begin + i * kMergeWarps;
      const float* part = parts + chunk * size;
      const bool any = chunk < m.chunks;
      mosts[i] = any ? ptx::uint_as_float(ptx::load_fresh4(part)) : kKvLowest;
      totals[i] = any ? ptx::uint_as_float(ptx::load_fresh4(part + 1)) : 0.0f;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t d = channel + j * kWarp + lane;
        values[i][j] = any && d < m.head ? ptx::uint_as_float(ptx::load_fresh4(part + 2 + d)) : 0.0f;
      }
    }
    float now = most;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) now = larger(mosts[i], now);
    const float shrunk = expf(most - now);
    most = now;
    total *= shrunk;
#pragma unroll
    for (int j = 0; j < kEach; ++j) sums[j] *= shrunk;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float share = expf(mosts[i] - now);
      total = ptx::fma(totals[i], share, total);
#pragma unroll
      for (int j = 0; j < kEach; ++j) sums[j] = ptx::fma(values[i][j], share, sums[j]);
    }
  }
  if (lane == 0) memory.most[warp] = most, memory.total[warp] = total;
#pragma unroll
  for (int j = 0; j < kEach; ++j) memory.sums[warp][j * kWarp + lane] = sums[j];
  ptx::sync_block();

  const auto d = static_cast<int>(threadIdx.x);
  if (d >= kMergeChannels || channel + d >= m.head) return;
  most = kKvLowest;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) most = larger(memory.most[w], most);
  total = 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) {
    const float share = expf(memory.most[w] - most);
    total = ptx::fma(memory.total[w], share, total);
    sum = ptx::fma(memory.sums[w][d], share, sum);
  }
  const int64_t query_head = head % heads * m.shared + r / rows;
  const int64_t to = ((int64_t{head / heads} * m.rows + r % rows) * m.heads * m.shared + query_head) * m.head;
  write_number(m.out, m.dtype, to + channel + d, total == 0.0f ? 0.0f : ptx::div(sum, total));
}

}  // namespace

void kv_merge(const KvMerge& merge, Stream stream) {
  const int64_t slices = bitfold::ceil_div(merge.head, int64_t{kMergeChannels});
  launch({.grid = dim3(kv_grid("kv_attention", merge.heads * merge.batch * merge.queries * slices)),
          .block = dim3(kMergeThreads),
          .shared_bytes = sizeof(Memory),
          .name = "kv_merge",
          .stream = stream,
          .early = gpu().early},
         kv_merge_kernel, merge);
}

}  // namespace bitfold::cuda
