// Attention's chunks, put together in their order.
#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {
namespace {

struct Memory {
  float most[kKvWarps], total[kKvWarps];
  float shares[kKvThreads];  // of chunks
};

// A block has a query of a key-value head; every thread has some chunks, and a channel at a time of the sums of all. A
// query that sees nothing is 0.
__global__ void __launch_bounds__(kKvThreads) kv_merge_kernel(KvMerge m) {
  auto& memory = shared<Memory>();
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x / m.queries, r = blockIdx.x % m.queries, size = m.queries * (m.head + 2);
  const float* parts = m.parts + head * m.chunks * size + r * (m.head + 2);

  float most = kKvLowest;
  for (int64_t c = thread; c < m.chunks; c += kKvThreads) most = larger(parts[c * size], most);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) most = larger(ptx::shuffle_xor(most, mask), most);
  if (ptx::lane_id() == 0) memory.most[ptx::warp_id()] = most;
  ptx::sync_block();
  for (int w = 0; w < kKvWarps; ++w) most = larger(memory.most[w], most);

  float total = 0.0f;
  for (int64_t c = thread; c < m.chunks; c += kKvThreads)
    total = ptx::fma(parts[c * size + 1], expf(parts[c * size] - most), total);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) total += ptx::shuffle_xor(total, mask);
  if (ptx::lane_id() == 0) memory.total[ptx::warp_id()] = total;
  ptx::sync_block();
  total = 0.0f;
  for (int w = 0; w < kKvWarps; ++w) total += memory.total[w];
  const float share = total == 0.0f ? 0.0f : ptx::div(1.0f, total);

  const int64_t query_head = head % m.heads * m.shared + r / m.rows;
  const int64_t to = ((head / m.heads * m.rows + r % m.rows) * m.heads * m.shared + query_head) * m.head;
  for (int64_t first = 0; first < m.head; first += kKvThreads) {
    const int64_t d = first + thread;
    float sum = 0.0f;
    for (int64_t begin = 0; begin < m.chunks; begin += kKvThreads) {
      const auto count = static_cast<int>(smaller<int64_t>(m.chunks - begin, kKvThreads));
      if (thread < count) memory.shares[thread] = expf(parts[(begin + thread) * size] - most);
      ptx::sync_block();
      if (d < m.head) {
        const float* values = parts + begin * size + 2 + d;
#pragma unroll 16
        for (int c = 0; c < count; ++c) sum = ptx::fma(values[c * size], memory.shares[c], sum);
      }
      ptx::sync_block();
    }
    if (d < m.head) write_number(m.out, m.dtype, to + d, sum * share);
  }
}

}  // namespace

void kv_merge(const KvMerge& merge, Stream stream) {
  launch({.grid = dim3(kv_grid("kv_attention", merge.heads * merge.batch * merge.queries)),
          .block = dim3(kKvThreads),
          .shared_bytes = sizeof(Memory),
          .name = "kv_merge",
          .stream = stream,
          .early = gpu().early},
         kv_merge_kernel, merge);
}

}  // namespace bitfold::cuda
