// Where blocks of rows_kernel.hpp have slices of k rather than whole rows: y from the sums of slices, in their order. A
// thread has a number of y, and all of its sums on their way together.
#include "cuda/linear_rows.hpp"
#include "cuda/rows_sums.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rows_sums_kernel(RowsSums args) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x, token = blockIdx.y;
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  if (row >= args.n) return;
  const float* mine = args.partials + token * args.rows + row;
  float sum = 0.0f;
#pragma unroll 16
  for (int slice = 0; slice < args.slices; ++slice) sum += mine[slice * args.m * args.rows];
  write_sum(args.y, args.bias, args.bf16, token, row, args.n, sum);
}

}  // namespace

void rows_sums(const RowsSums& sums, Stream stream) {
  launch({.grid = {static_cast<unsigned>(ceil_div<int64_t>(sums.n, kThreads)), static_cast<unsigned>(sums.m)},
          .block = kThreads,
          .shared_bytes = 0,
          .name = "rows_sums",
          .stream = stream,
          .early = gpu().early},
         rows_sums_kernel, sums);
}

}  // namespace bitfold::cuda
