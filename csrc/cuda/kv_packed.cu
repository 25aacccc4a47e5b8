// Attention of few queries to a chunk of the packed KV cache whose blocks have 64 tokens and heads of 64 or 128
// numbers: what the cache makes by default, of most models. A block of threads has packed tokens or exact ones.
#include "cuda/kv_exact.hpp"
#include "cuda/kv_packed.hpp"

namespace bitfold::cuda {
namespace {

template <KvFormat Format, int Head>
BITFOLD_DEVICE void attend(const KvJob& job) {
  const KvPlace place(job);
  if (place.chunk < job.packed_chunks) PackedAttention<Format, Head>(job, place).run();
  else ExactAttention<Head>(job, place).run();
}

template <KvFormat Format>
__global__ void __launch_bounds__(kKvThreads, kKvPackedBlocks) kv_packed_kernel(KvJob job) {
  ptx::let_later_begin();  // kv_merge, which is ready then when the last chunk is
  if (job.shape.head == 64) attend<Format, 64>(job);
  else attend<Format, 128>(job);
}

template <KvFormat Format, int Head>
constexpr int64_t room_bytes() {
  return larger<int64_t>(sizeof(typename PackedAttention<Format, Head>::Room),
                         sizeof(typename ExactAttention<Head>::Room));
}
template <KvFormat Format>
int64_t room_bytes(const KvShape& shape) {
  return shape.head == 64 ? room_bytes<Format, 64>() : room_bytes<Format, 128>();
}
template <KvFormat Format>
void launch_chunks(const KvJob& job, int64_t batch, Stream stream) {
  launch({.grid = dim3(kv_chunk_blocks(job, batch)),
          .block = dim3(kKvThreads),
          .shared_bytes = room_bytes<Format>(job.shape),
          .name = "kv_attention",
          .stream = stream},
         kv_packed_kernel<Format>, job);
}

}  // namespace

int64_t kv_packed_bytes(const KvShape& shape) {
  switch (shape.format) {
    case KvFormat::Int8: return room_bytes<KvFormat::Int8>(shape);
    case KvFormat::Fp8: return room_bytes<KvFormat::Fp8>(shape);
    default: return room_bytes<KvFormat::Int4>(shape);
  }
}

void kv_packed_chunks(const KvJob& job, int64_t batch, Stream stream) {
  switch (job.shape.format) {
    case KvFormat::Int8: return launch_chunks<KvFormat::Int8>(job, batch, stream);
    case KvFormat::Fp8: return launch_chunks<KvFormat::Fp8>(job, batch, stream);
    default: return launch_chunks<KvFormat::Int4>(job, batch, stream);
  }
}

}  // namespace bitfold::cuda
