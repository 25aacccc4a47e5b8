// y of int8_tile's whole sums: they become numbers, and outliers come to them, a chain of products and additions for
// each number, as the definition says, from the tables of their columns of W and x as fp32.
//
// A block has 128 rows of W and 64 tokens, a lane four neighbouring rows of eight tokens: 12 numbers from shared memory
// for 32 products. Where there are few tokens a lane has four or two of them, so that there are blocks for all
// multiprocessors. Lines of tables come by asynchronous copies while those before them are multiplied.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kOwnRows = 4, kRows = kOwnRows * kWarp;  // of a thread, and of a block
constexpr int kMostTokens = 8;                         // of a thread: 8, 4 or 2
constexpr int kColumns = 32;                           // of outliers, that come together
static_assert(kInt8Lines % kColumns == 0 && kInt8Lines % kRows == 0 && kInt8Lines % (kMostTokens * kWarps) == 0);

template <int OwnTokens>
class Block {
  static constexpr int kOwnTokens = OwnTokens, kTokens = kOwnTokens * kWarps;
  static constexpr int kUnrolled =
      2 * kMostTokens / kOwnTokens;  // columns, of whose products each waits for one before
  struct Table {
    float w[kColumns][kRows];
    float x[kColumns][kTokens];
  };

 public:
  struct alignas(16) Memory {
    union {
      Table tables[2];
      float y[kTokens][kRows];
    };
    Int8Row rows[kRows];
    float bias[kRows];
    Int8Token tokens[kTokens];
  };

  BITFOLD_DEVICE Block(const Int8Op& op, Memory& memory)
      : op_(op), memory_(memory), row0_(int64_t{blockIdx.x} * kRows), token0_(int64_t{blockIdx.y} * kTokens) {}

  BITFOLD_DEVICE void run() {
    // All that is waited for is asked for first: tables, sums, and what they are scaled by.
    const int loose = int8_outliers(op_);
    fetch<false>(0, loose, 0);
    int sums[kOwnTokens][kOwnRows];
    load_sums(sums);
    look_up();
    float y[kOwnTokens][kOwnRows] = {};
    // A product of 16 bits and 8 is exact: rounded once less, sums are the same.
    const bool exact = op_.x.dtype != DType::F32 && loose <= op_.loose.lines;
    if (loose > 0 && exact && *op_.loose_huge == 0) add_columns<false, true>(loose, y);
    else add_columns<false, false>(loose, y);
    add_sums(loose > 0, sums, y);
    if (op_.copies > 0) {
      float chains[kOwnTokens][kOwnRows] = {};
      fetch<true>(0, op_.copies, 0);
      add_columns<true, false>(op_.copies, chains);
      each([&](int j, int i) { y[j][i] = ptx::add(y[j][i], chains[j][i]); });
    }
    store(y);
  }

 private:
  BITFOLD_DEVICE static int row() { return kOwnRows * ptx::lane_id(); }
  BITFOLD_DEVICE static int token() { return kOwnTokens * ptx::warp_id(); }
  BITFOLD_DEVICE int64_t real_row(int row) const { return smaller(row0_ + row, op_.n - 1); }
  BITFOLD_DEVICE int64_t real_token(int token) const { return smaller(token0_ + token, op_.x.rows - 1); }

  template <class Body>
  BITFOLD_DEVICE static void each(const Body& body) {
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) body(j, i);
    }
  }

  // ---- outliers ----

  // Adds `count` columns to the chains: those with a copy, or those without, of which the first are on their way.
  template <bool Copied, bool Fused>
  BITFOLD_DEVICE void add_columns(int count, float (&chains)[kOwnTokens][kOwnRows]) {
    int table = 0;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kColumns) {
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // all have read the table that is filled next
      fetch<Copied>(begin + kColumns, count, 1 - table);
      const int columns = smaller(count - begin, kColumns);
#pragma unroll kUnrolled
      for (int c = 0; c < columns; ++c) add_column<Fused>(memory_.tables[table], c, chains);
      table = 1 - table;
    }
    ptx::sync_block();  // all have read tables, and looked up
  }
  template <bool Fused>
  BITFOLD_DEVICE static void add_column(const Table& table, int c, float (&chains)[kOwnTokens][kOwnRows]) {
    const float4 four = *reinterpret_cast<const float4*>(&table.w[c][row()]);
    const float w[kOwnRows] = {four.x, four.y, four.z, four.w};
    float x[kOwnTokens];
#pragma unroll
    for (int j = 0; j < kOwnTokens; j += 2) {
      const float2 tokens = *reinterpret_cast<const float2*>(&table.x[c][token() + j]);
      x[j] = tokens.x, x[j + 1] = tokens.y;
    }
    each([&](int j, int i) {
      float& chain = chains[j][i];
      chain = Fused ? ptx::fma(x[j], w[i], chain) : ptx::add(chain, ptx::mul(x[j], w[i]));
    });
  }

  // Columns [begin, begin + kColumns) of a list of `count`: a group of copies, whatever there is of them.
  template <bool Copied>
  BITFOLD_DEVICE void fetch(int begin, int count, int number) {
    Table& table = memory_.tables[number];
    const Int8Table& lines = Copied ? op_.exact : op_.loose;
    const int columns = smaller(count - begin, kColumns);
    if (columns > 0 && begin >= lines.lines) {
      gather<Copied>(begin, columns, table);
    } else if (columns > 0) {
      copy<kRows>(&table.w[0][0], lines.w + begin * op_.table_rows + row0_, op_.table_rows, columns);
      copy<kTokens>(&table.x[0][0], lines.x + begin * op_.table_tokens + token0_, op_.table_tokens, columns);
    }
    ptx::cp_async_commit();
  }
  template <int Width>
  BITFOLD_DEVICE static void copy(float* to, const float* from, int64_t stride, int lines) {
    constexpr int kFours = Width / 4, kTogether = kThreads / kFours;  // lines
    const auto thread = static_cast<int>(threadIdx.x), line = thread / kFours;
    to += 4 * thread, from += line * stride + thread % kFours * 4;
#pragma unroll
    for (int i = 0; i < kColumns; i += kTogether) {
      if (i + line < lines) ptx::cp_async<16>(to + i * Width, from);
      from += kTogether * stride;
    }
  }
  template <bool Copied>
  BITFOLD_DEVICE void gather(int begin, int columns, Table& table) {
    const int32_t* list = Copied ? op_.columns : op_.outliers;
#pragma unroll 1
    for (auto i = static_cast<int>(threadIdx.x); i < columns * kRows; i += kThreads) {
      const int c = i / kRows, row = i % kRows;
      const int64_t real = real_row(row);
      table.w[c][row] = Copied ? read_float(op_.copy, real * op_.copies + begin + c)
                               : static_cast<float>(op_.codes[real * op_.k + list[begin + c]] - int8_zero(op_, real));
    }
#pragma unroll 1
    for (auto i = static_cast<int>(threadIdx.x); i < columns * kTokens; i += kThreads) {
      const int c = i / kTokens, token = i % kTokens;
      const int64_t real = real_token(token), column = list[begin + c];
      table.x[c][token] = Copied ? int8_x(op_, real, column) : int8_outlier(op_, real, column);
    }
  }

  // ---- whole sums ----

  BITFOLD_DEVICE void load_sums(int (&sums)[kOwnTokens][kOwnRows]) const {
    const int32_t* from = op_.partial + real_token(token()) * op_.table_rows + row0_ + row();
    const auto last = static_cast<int>(real_token(kTokens) - token0_);
    const auto load = [&](bool first) {
      const int32_t* line = from;
#pragma unroll
      for (int j = 0; j < kOwnTokens; ++j) {
        const uint4 four = ptx::load_fresh16(line);
        const uint32_t more[kOwnRows] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) sums[j][i] = static_cast<int>(more[i]) + (first ? 0 : sums[j][i]);
        line += token() + j < last ? op_.table_rows : 0;
      }
    };
    load(true);  // which nothing waits for
#pragma unroll 1
    for (int split = 1; split < op_.tiles.splits; ++split) {
      from += op_.x.rows * op_.table_rows;
      load(false);
    }
  }

  // What all of a block's rows and tokens are made of, a thread one of them.
  BITFOLD_DEVICE void look_up() {
    static_assert(kRows + kTokens <= kThreads);
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread < kRows) {
      const int64_t row = real_row(thread);
      memory_.rows[thread] = int8_row(op_, row);
      if (op_.bias != nullptr) memory_.bias[thread] = read_float({op_.bias, op_.x.dtype, 1, 1, 1, 1}, row);
    } else if (thread < kRows + kTokens) {
      memory_.tokens[thread - kRows] = int8_token(op_, real_token(thread - kRows), 0);
    }
  }

  // y of the sums, to which the chains of outliers without a copy come, if there are any.
  BITFOLD_DEVICE void add_sums(bool loose, const int (&sums)[kOwnTokens][kOwnRows],
                               float (&y)[kOwnTokens][kOwnRows]) const {
    Int8Row rows[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) rows[i] = memory_.rows[row() + i];
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j) {
      const Int8Token what = memory_.tokens[token() + j];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const float number = ptx::add(0.0f, int8_part(sums[j][i], op_.tiles.wide ? 0 : 128, rows[i], what));
        y[j][i] = loose ? ptx::add(number, ptx::mul(rows[i].scale, y[j][i])) : number;
      }
    }
  }

  // ---- y ----

  BITFOLD_DEVICE void store(float (&y)[kOwnTokens][kOwnRows]) {
    if (op_.bias != nullptr) {
      const float4 four = *reinterpret_cast<const float4*>(&memory_.bias[row()]);
      const float bias[kOwnRows] = {four.x, four.y, four.z, four.w};
      each([&](int j, int i) { y[j][i] = ptx::add(y[j][i], bias[i]); });
    }
    const auto tokens = static_cast<int>(smaller<int64_t>(op_.x.rows - token0_, kTokens));
    const uintptr_t four_bytes = op_.x.dtype == DType::F32 ? 16 : 8;
    if (op_.n % kOwnRows != 0 || reinterpret_cast<uintptr_t>(op_.y) % four_bytes != 0) {
      store_numbers(tokens, y);
    } else if (op_.x.dtype == DType::F32) {
      store_fours<float4>(tokens, y, [](const float (&y)[kOwnRows]) { return float4{y[0], y[1], y[2], y[3]}; });
    } else if (op_.x.dtype == DType::F16) {
      store_fours<uint2>(tokens, y, [](const float (&y)[kOwnRows]) {
        return uint2{ptx::floats_to_halves(y[0], y[1]), ptx::floats_to_halves(y[2], y[3])};
      });
    } else {
      store_fours<uint2>(tokens, y, [](const float (&y)[kOwnRows]) {
        return uint2{ptx::floats_to_bf16s(y[0], y[1]), ptx::floats_to_bf16s(y[2], y[3])};
      });
    }
  }

  // Where a lane's four rows lie together: all of them are there, or none.
  template <class Four, class Pack>
  BITFOLD_DEVICE void store_fours(int tokens, const float (&y)[kOwnTokens][kOwnRows], const Pack& pack) const {
    if (row0_ + row() >= op_.n) return;
    const int64_t line = op_.n / kOwnRows;
    Four* to = static_cast<Four*>(op_.y) + (token0_ + token()) * line + (row0_ + row()) / kOwnRows;
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j, to += line) {
      if (token() + j < tokens) *to = pack(y[j]);
    }
  }

  // Anywhere, by way of shared memory, which nobody looks at any more: a short loop, in which neighbours are written
  // together.
  BITFOLD_DEVICE void store_numbers(int tokens, const float (&y)[kOwnTokens][kOwnRows]) {
#pragma unroll
    for (int j = 0; j < kOwnTokens; ++j) {
      *reinterpret_cast<float4*>(&memory_.y[token() + j][row()]) = {y[j][0], y[j][1], y[j][2], y[j][3]};
    }
    ptx::sync_block();
    static_assert(kThreads % kRows == 0);
    const int thread = static_cast<int>(threadIdx.x), row = thread % kRows;
    if (row0_ + row >= op_.n) return;
#pragma unroll 4
    for (int token = thread / kRows; token < tokens; token += kThreads / kRows)
      write_number(op_.y, op_.x.dtype, (token0_ + token) * op_.n + row0_ + row, memory_.y[token][row]);
  }

  const Int8Op& op_;
  Memory& memory_;
  const int64_t row0_, token0_;
};

__global__ void __launch_bounds__(kThreads, 2) int8_finish_kernel(const Int8Op op, int own_tokens) {
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  const auto run = [&]<class Block>() { Block(op, shared<typename Block::Memory>()).run(); };
  switch (own_tokens) {
    case 2: return run.template operator()<Block<2>>();
    case 4: return run.template operator()<Block<4>>();
    default: return run.template operator()<Block<kMostTokens>>();
  }
}

}  // namespace

void int8_finish(const Int8Op& op, Stream stream) {
  const int64_t row_blocks = ceil_div<int64_t>(op.n, kRows);
  const auto blocks = [&](int own) { return row_blocks * ceil_div<int64_t>(op.x.rows, own * kWarps); };
  int own = kMostTokens;
  while (own > 2 && 2 * blocks(own) < 3 * gpu().multiprocessors) own /= 2;  // two blocks have room on each
  launch({.grid = dim3(static_cast<unsigned>(row_blocks),
                       static_cast<unsigned>(ceil_div<int64_t>(op.x.rows, own * kWarps))),
          .block = kThreads,
          .shared_bytes = sizeof(Block<kMostTokens>::Memory),
          .name = "int8_finish",
          .stream = stream,
          .early = gpu().early},
         int8_finish_kernel, op, own);
}

}  // namespace bitfold::cuda
