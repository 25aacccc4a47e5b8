// Attention of few queries to the packed KV cache: the launches.
//
// The tokens of a key-value head are cut into chunks, by their number, that of heads and queries, and the GPU. One
// kernel attends to chunks (kv_chunk.cu) and leaves what it found in a workspace, another puts chunks together in their
// order (kv_merge.cu). So nothing depends on which block of threads comes first.
#include "cuda/kv.hpp"
#include "cuda/kv_attention.hpp"

namespace bitfold::cuda {
namespace {

MatrixIn numbers_of(const KvTokens& tokens) { return {tokens.data, tokens.dtype, 0, 0, 0, 1}; }

bool is_packed(const KvShape& shape) {
  return shape.group == kKvPackedGroup && (shape.head == 64 || shape.head == 128) &&
         (shape.value_group == 64 || shape.value_group == shape.head);
}
// Whether exact tokens are words as kv_exact.hpp copies them: eight numbers of 16 bits at multiples of 16 bytes.
bool are_words(const KvTokens& tokens) {
  return (tokens.dtype == DType::F16 || tokens.dtype == DType::BF16) &&
         reinterpret_cast<uintptr_t>(tokens.data) % 16 == 0 &&
         (tokens.batch_stride | tokens.head_stride | tokens.token_stride) % kKvWord == 0;
}
int tile_of(const KvAttentionArgs& a) {
  if (is_packed(a.shape)) return kKvPackedTile;
  const int64_t queries = a.query_heads / a.heads * a.rows;
  return a.shape.head > kKvWide || queries == 1 ? 1 : queries == 2 ? 2 : 4;
}

// How the tokens are cut, whatever the batch: blocks from the first that has a token that counts.
struct Cut {
  int64_t first_block, blocks_end, chunk_blocks, exact_tokens, exact_chunks, chunks;
  explicit Cut(const KvAttentionArgs& a);
};

Cut::Cut(const KvAttentionArgs& a)
    : first_block(a.first / a.shape.group),
      blocks_end(kv_blocks(a.pages, a.page_count)),
      chunk_blocks(larger<int64_t>(1, kKvChunk / a.shape.group)),
      exact_tokens(kKvExact) {
  const int64_t blocks = blocks_end - first_block;
  if (is_packed(a.shape)) {  // one wave of blocks of threads, if there are no more sequences and turns
    const int64_t tiles = bitfold::ceil_div(a.query_heads / a.heads * a.rows, int64_t{kKvPackedTile});
    const int64_t beside = larger<int64_t>(1, smaller(kKvPackedBlocks, gpu().shared_bytes / kv_packed_bytes(a.shape)));
    const int64_t warps = beside * gpu().multiprocessors * kKvWarps;
    const int64_t turns = bitfold::ceil_div(blocks * a.heads * tiles, warps);
    chunk_blocks = kKvWarps * smaller(larger<int64_t>(turns, 1), kKvPackedTurns);
    // Exact tokens of the same wave: in fewer chunks, where there is no room for many.
    const auto fits = [&] {
      const int64_t of_head = bitfold::ceil_div(blocks, chunk_blocks) + bitfold::ceil_div(a.recent, exact_tokens);
      return of_head * a.heads * tiles <= warps / kKvWarps;
    };
    while (exact_tokens < kKvPackedGroup && !fits()) exact_tokens *= 2;
  }
  exact_chunks = bitfold::ceil_div(a.recent, exact_tokens);
  chunks = exact_chunks;
  while (!is_packed(a.shape) && blocks > kKvChunks * chunk_blocks) chunk_blocks *= 2;
  // A launch's chunks are its own.
  each_kv_launch(a.pages, a.page_count, first_block, [&](const KvRun*, int, int64_t begin, int64_t end) {
    chunks += bitfold::ceil_div(end - begin, chunk_blocks);
  });
}

KvJob job_of(const KvAttentionArgs& a, const Cut& cut, float* parts) {
  const int64_t shared = a.query_heads / a.heads, queries = shared * a.rows;
  const int tile = tile_of(a);
  return {.shape = a.shape,
          .at = kv_layout(a.shape),
          .value_groups = a.shape.value_groups(),
          .value_row = a.shape.value_row(),
          .heads = a.heads,
          .shared = shared,
          .rows = a.rows,
          .queries = queries,
          .tile = tile,
          .tiles = bitfold::ceil_div(queries, tile),
          .slices = bitfold::ceil_div(a.shape.head, kKvWide),
          .query = numbers_of(a.query),
          .keys = numbers_of(a.keys),
          .values = numbers_of(a.values),
          .query_strides = {a.query.batch_stride, a.query.head_stride, a.query.token_stride},
          .key_strides = {a.keys.batch_stride, a.keys.head_stride, a.keys.token_stride},
          .value_strides = {a.values.batch_stride, a.values.head_stride, a.values.token_stride},
          .first = a.first,
          .recent = a.recent,
          .mask = a.mask,
          .bias = {a.mask_data, a.mask_dtype, 0, 0, 0, 1},
          .mask_strides = {a.mask_strides[0], a.mask_strides[1], a.mask_strides[2], a.mask_strides[3]},
          .scale = a.scale,
          .block_begin = cut.first_block,
          .block_end = cut.first_block,
          .blocks_end = cut.blocks_end,
          .exact_tokens = cut.exact_tokens,
          .chunk_blocks = cut.chunk_blocks,
          .packed_chunks = 0,
          .chunk_begin = 0,
          .launch_chunks = 0,
          .chunks = cut.chunks,
          .parts = parts,
          .run_count = 0,
          .runs = {}};
}

}  // namespace

int64_t kv_attention_workspace(const KvAttentionArgs& args) {
  return 4 * args.batch * args.query_heads * args.rows * Cut(args).chunks * (args.shape.head + 2);
}

void kv_attention(const KvAttentionArgs& args, void* workspace, Stream stream) {
  const int64_t queries = args.batch * args.query_heads * args.rows;
  if (queries == 0) return;
  const Cut cut(args);
  KvJob job = job_of(args, cut, static_cast<float*>(workspace));
  const bool packed = is_packed(args.shape), words = are_words(args.keys) && are_words(args.values);
  const auto launch = [&](auto chunks, int64_t packed_chunks, int64_t exact_chunks) {
    job.packed_chunks = packed_chunks;
    job.launch_chunks = packed_chunks + exact_chunks;
    if (job.launch_chunks > 0) chunks(job, args.batch, stream);
    job.chunk_begin += job.launch_chunks;
  };
  const auto launch_chunks = [&](int64_t packed_chunks, int64_t exact_chunks) {
    if (!packed) return launch(kv_chunks, packed_chunks, exact_chunks);
    launch(kv_packed_chunks, packed_chunks, words ? exact_chunks : 0);
    launch(kv_chunks, 0, words ? 0 : exact_chunks);
  };
  each_kv_launch(
      args.pages, args.page_count, cut.first_block, [&](const KvRun* runs, int count, int64_t begin, int64_t end) {
        for (int i = 0; i < count; ++i) job.runs[i] = runs[i];
        job.run_count = count;
        job.block_begin = begin;
        job.block_end = end;
        launch_chunks(bitfold::ceil_div(end - begin, cut.chunk_blocks), end == cut.blocks_end ? cut.exact_chunks : 0);
      });
  if (job.chunk_begin < cut.chunks) launch_chunks(0, cut.exact_chunks);  // no packed token counts
  kv_merge({.parts = job.parts,
            .chunks = cut.chunks,
            .batch = args.batch,
            .heads = args.heads,
            .shared = job.shared,
            .rows = args.rows,
            .queries = job.queries,
            .head = args.shape.head,
            .out = args.out,
            .dtype = args.query.dtype},
           stream);
}

}  // namespace bitfold::cuda
