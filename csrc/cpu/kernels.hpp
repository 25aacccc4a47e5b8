// The leaf kernels of one instruction set: what the drivers in this folder call. Everything here works on one thread
// and on plain memory; the drivers cut the work, own the buffers and report the errors.
#pragma once

#include <cstdint>

#include "formats/args.hpp"
#include "search/blocks.hpp"
#include "search/grid.hpp"

namespace bitfold::cpu {

// GPTQ's, in gptq.hpp.
struct PanelProduct;
struct PanelRound;
struct PanelFactor;
struct PanelSearch;
// Of x rounded to 8 bits row by row, in rows_int8.hpp.
struct RowsInt8Kernel;

// The KV cache's, in kv.hpp: for each of its formats, and of a product for floats too.
struct KvProduct;
struct KvFold;
struct KvSoftmax;
struct KvSoftmaxSum;
struct KvQuantize;
struct KvStep;
struct KvDecode;
inline constexpr int kKvKernels = 4;

// w / scale and zero decide the codes of one group: integer and minifloat divide, codebooks multiply by 1 / scale.
struct QuantizeArgs {
  const float* w;
  int64_t count;
  float scale;
  int zero;
  uint8_t* codes;
};

// Rows [row_begin, row_end) of the weight times the m <= kFusedRows rows of x; y[j * y_stride + row - row_begin]
// receives the sums. x and x_sums are what `arrange` made of fused_rows(m) rows, the ones past m zero; scratch has
// fused_scratch(k) floats.
struct FusedArgs {
  const Weight* w;
  const float* x;
  const float* x_sums;
  int m;
  int64_t row_begin;
  int64_t row_end;
  float* y;
  int64_t y_stride;
  float* scratch;
};
inline constexpr int kFusedRows = 8;
constexpr int fused_rows(int m) { return m <= 2 ? m : m <= 4 ? 4 : 8; }
// Rows of the weight whose scales and sums are held at a time: a scale and a zero point for at most every fourth
// column.
inline constexpr int64_t kFusedBlock = 32;
constexpr int64_t fused_scratch(int64_t k) { return 2 * kFusedBlock * (k / 4 + 64); }

// Vectors are at most 16 lanes, and two are under way: what tiles and padded rows are a multiple of.
inline constexpr int64_t kAlign = 32;

// sums[j * sum_stride + i] += w[i] . x[j] over `depth` columns, for kTileRows rows of the weight and the first x_rows
// of tile_x rows of x; both are interleaved, a vector of each row in turn.
template <class T>
struct TileArgs {
  const T* w;
  const T* x;
  int x_rows;
  int64_t depth;
  float* sums;
  int64_t sum_stride;
};
inline constexpr int kTileRows = 4;

// sums[j * sum_stride + c] += sum over i < rows of factors[j * factor_stride + i] * w[i * w_stride + c], c < columns
// (a multiple of kAlign); rows is a multiple of kAxpyRows.
struct AxpyArgs {
  const float* w;
  int64_t w_stride;
  int64_t rows;
  int64_t columns;
  const float* factors;
  int64_t factor_stride;
  int64_t m;
  float* sums;
  int64_t sum_stride;
};

inline constexpr int kAxpyRows = 4;

// Rows [row_begin, row_end) of the weight times m rows of x, which `quantize` made whole numbers of; y[j * y_stride +
// row - row_begin] receives the sums, and has room for rows up to a multiple of kInt8Rows.
struct Int8Args {
  const Weight* w;
  const void* x;
  int64_t m;
  int64_t row_begin;
  int64_t row_end;
  float* y;
  int64_t y_stride;
};
inline constexpr int64_t kInt8Rows = 32;

using QuantizeFn = void (*)(const QuantizeArgs&);
using EncodeBlocksFn = void (*)(const EncodeBlocksArgs&);
// The same without a search, in one pass over any w: false where a weight is not finite or a scale may not fit, and the
// caller looks for which. Where all are finite, all blocks are written.
using EncodeRangesFn = bool (*)(const EncodeBlocksArgs&);
// Where an output is to lie: in the caches, for who reads it at once, or past them, which spares reading each line
// before it is written. What is written so is seen by others only after Kernels::drain.
enum class Stores : uint8_t { Cached, PastCaches };
// Columns [begin, end) of plane row `row`, decoded to fp32.
using DecodeSpanFn = void (*)(const Weight& w, int64_t row, int64_t begin, int64_t end, float* out, Stores stores);

// How one family multiplies. It decodes columns in an order of its own, and x is arranged in the same.
struct LinearKernel {
  void (*fused)(const FusedArgs&);
  // Puts row j of `rows` of x into that order, a vector of each row in turn, padded with zeros to a multiple of `chunk`
  // columns: panel holds rows * round_up(k, chunk) floats, sums those of every `word` columns.
  void (*arrange)(const float* x, int64_t k, int j, int rows, float* panel, float* sums);
  // Columns [begin, end) of `rows` <= kTileRows rows as fp32 in the same order, a vector of each of kTileRows in turn,
  // the last chunk in full. begin is a multiple of kTileColumns, and end too unless it is k; the plan's fused_supports
  // holds. scratch has fused_scratch(kTileColumns) floats. Null: the columns are decoded in order, and then arranged.
  void (*decode)(const Weight& w, int64_t first, int rows, int64_t begin, int64_t end, float* tile, float* scratch);
  int chunk;
  int word;
};
inline constexpr int64_t kTileColumns = 1024;

// How a type of blocks is multiplied with activations of 8 bits, or of 16.
struct Int8Kernel {
  // Row j of the m rows of x. Each block of each row becomes `block_bytes` bytes, the blocks of the m rows side by
  // side.
  void (*quantize)(const float* x, int64_t k, int64_t j, int64_t m, void* to);
  void (*multiply)(const Int8Args&);
  int64_t block_bytes;
};

struct Kernels {
  const char* isa;
  void (*to_float)(const void* from, DType dtype, int64_t count, float* to);
  void (*from_float)(const float* from, int64_t count, DType dtype, void* to);
  void (*stream_from_float)(const float* from, int64_t count, DType dtype, void* to);  // Stores::PastCaches
  void (*drain)();
  GroupRange (*group_range)(const float* w, int64_t count);
  QuantizeFn quantize[kRowCount];  // null for cast families and blocks
  // Of blocks each type has one of the two; the others have none.
  EncodeBlocksFn encode_blocks[kRowCount];
  EncodeRangesFn encode_ranges[kRowCount];
  // Where importance asks for another search than the one without; null where one function does both.
  EncodeBlocksFn encode_blocks_weighted[kRowCount];
  DecodeSpanFn decode_span[kRowCount];
  LinearKernel linear[kRowCount];
  Int8Kernel int8[kRowCount];   // null for all but blocks
  Int8Kernel int16[kRowCount];  // null also where products of bytes are no faster than fp32
  const RowsInt8Kernel* rows_int8;
  int lanes;
  int tile_x;
  void (*tile)(const TileArgs<float>&);
  // With bf16 operands, where that is faster; both null where it isn't. The first rounds `columns` columns of `rows`
  // interleaved rows.
  void (*round_bf16)(const float* from, int64_t columns, int rows, uint16_t* to);
  void (*tile_bf16)(const TileArgs<uint16_t>&);
  void (*axpy)(const AxpyArgs&);
  void (*panel_product)(const PanelProduct&);
  void (*panel_round)(const PanelRound&);
  int64_t (*panel_factor)(const PanelFactor&);  // the column whose pivot is not positive, or -1
  void (*panel_search)(const PanelSearch&);
  void (*kv_product[kKvKernels])(const KvProduct&);
  KvStep (*kv_quantize[kKvKernels - 1])(const KvQuantize&);
  float (*kv_fold)(const KvFold&);
  KvSoftmaxSum (*kv_softmax)(const KvSoftmax&);
  void (*kv_decode[kKvKernels - 1])(const KvDecode&);
};

// The kernels of this process, chosen at first use: the best that the CPU has, or BITFOLD_ISA's.
const Kernels& kernels();

}  // namespace bitfold::cpu
