// Attention's chunks, put together in their order.
#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {
namespace {

// A block has a query of a key-value head. A query that sees nothing is 0.
__global__ void __launch_bounds__(kKvThreads) kv_merge_kernel(KvMerge m) {
  const int64_t head = blockIdx.x / m.queries, r = blockIdx.x % m.queries, size = m.head + 2;
  const float* parts = m.parts + (head * m.chunks * m.queries + r) * size;
  float most = kKvLowest, total = 0.0f;
  for (int64_t c = 0; c < m.chunks; ++c) most = larger(parts[c * m.queries * size], most);
  for (int64_t c = 0; c < m.chunks; ++c) {
    const float* part = parts + c * m.queries * size;
    total = ptx::fma(part[1], expf(part[0] - most), total);
  }
  const float share = total == 0.0f ? 0.0f : ptx::div(1.0f, total);
  const int64_t query_head = head % m.heads * m.shared + r / m.rows;
  const int64_t to = ((head / m.heads * m.rows + r % m.rows) * m.heads * m.shared + query_head) * m.head;
  for (int64_t d = threadIdx.x; d < m.head; d += kKvThreads) {
    float sum = 0.0f;
    for (int64_t c = 0; c < m.chunks; ++c) {
      const float* part = parts + c * m.queries * size;
      sum = ptx::fma(part[2 + d], expf(part[0] - most), sum);
    }
    write_number(m.out, m.dtype, to + d, sum * share);
  }
}

}  // namespace

void kv_merge(const KvMerge& merge, Stream stream) {
  launch({.grid = dim3(kv_grid("kv_attention", merge.heads * merge.batch * merge.queries)),
          .block = dim3(kKvThreads),
          .shared_bytes = 0,
          .name = "kv_merge",
          .stream = stream},
         kv_merge_kernel, merge);
}

}  // namespace bitfold::cuda
