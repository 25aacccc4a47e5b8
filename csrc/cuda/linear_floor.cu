// The floor: y = x W^T + b and dx = dy W for every format, layout, dtype and stride. float64 is computed in float64;
// everything else in fp32 with fused multiply-adds, of the decoded weights as they are.
//
// Forwards a warp has a row of the weight and a few tokens, and its lanes the runs of eight columns; a lane's sums are
// one after the other and the lanes' are added as a tree. Backwards a lane has a run of columns, the warps of a block
// share the rows of the weight, and their sums are added in order. Nothing depends on who comes first.
#include <bit>

#include "cuda/format_switch.hpp"
#include "cuda/kernels.hpp"
#include "cuda/matrix.hpp"
#include "cuda/runs.hpp"

namespace bitfold::cuda {
namespace {

struct FloorArgs {
  WeightRuns w;
  MatrixIn x;        // dy, backwards
  const void* bias;  // may be null
  void* y;           // dx, backwards
};

// ---- the decoded weight, whatever its format ----

// One function has all formats, and is called: in each of the kernels' loops they would be compiled again and again.
[[gnu::noinline]] __device__ void decode_any(const WeightRuns& w, int64_t row, int64_t column, int count,
                                             const Codebook& book, float* weights) {
  switch_row(w.w.format.row, RowsBetween<0, kRowCount>(), [&]<int Row>() {
    float values[kRun] = {};
    decode_run<Row>(w, row, column, count, book.values, values);
    for (int i = 0; i < kRun; ++i) weights[i] = values[i];
  });
}

BITFOLD_DEVICE float multiply_add(float a, float b, float c) { return ptx::fma(a, b, c); }
BITFOLD_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

BITFOLD_DEVICE float from_lane(float value, int mask) { return ptx::shuffle_xor(value, mask); }
BITFOLD_DEVICE double from_lane(double value, int mask) {
  const auto bits = std::bit_cast<uint64_t>(value);
  const uint32_t low = ptx::shuffle_xor(static_cast<uint32_t>(bits), mask);
  const uint32_t high = ptx::shuffle_xor(static_cast<uint32_t>(bits >> 32), mask);
  return std::bit_cast<double>(static_cast<uint64_t>(high) << 32 | low);
}

// ---- y = x W^T + b ----

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kForward = 8;  // tokens at a time

template <class T>
__global__ void __launch_bounds__(kThreads) linear_floor_kernel(FloorArgs a) {
  Codebook& book = shared<Codebook>();
  const Weight& w = a.w.w;
  fill_codebook(w.format.row, book);
  ptx::sync_block();
  const int64_t row = int64_t{blockIdx.x} * kWarps + ptx::warp_id();
  if (row >= w.n) return;
  for (int64_t first = int64_t{blockIdx.y} * kForward; first < a.x.rows; first += int64_t{gridDim.y} * kForward) {
    const int tokens = static_cast<int>(smaller<int64_t>(kForward, a.x.rows - first));
    T sums[kForward] = {};
    for (int64_t column = ptx::lane_id() * kRun; column < w.k; column += kWarp * kRun) {
      const int count = static_cast<int>(smaller<int64_t>(kRun, w.k - column));
      float weights[kRun] = {};
      decode_any(a.w, row, column, count, book, weights);
#pragma unroll
      for (int j = 0; j < kForward; ++j) {
        if (j >= tokens) break;
        T x[kRun];
        read_floats(a.x, (first + j) * a.x.row_stride + column * a.x.column_stride, a.x.column_stride, count, x);
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[j] = multiply_add(x[i], static_cast<T>(weights[i]), sums[j]);
      }
    }
    T bias[1] = {};
    if (a.bias != nullptr) read_floats({a.bias, a.x.dtype, 1, w.n, w.n, 1}, row, 1, 1, bias);
#pragma unroll
    for (int j = 0; j < kForward; ++j) {
      if (j >= tokens) break;
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sums[j] += from_lane(sums[j], mask);
      if (ptx::lane_id() == 0) write_number(a.y, a.x.dtype, (first + j) * w.n + row, sums[j] + bias[0]);
    }
  }
}

// ---- dx = dy W ----

constexpr int kGradThreads = 512, kGradWarps = kGradThreads / kWarp;
constexpr int kBackward = 4;            // tokens at a time
constexpr int kColumns = kWarp * kRun;  // of a block

template <class T>
struct GradRoom {
  Codebook book;
  alignas(16) T sums[kGradWarps][kColumns];  // of one token
};

template <class T>
__global__ void __launch_bounds__(kGradThreads) linear_grad_kernel(FloorArgs a) {
  auto& room = shared<GradRoom<T>>();
  const Weight& w = a.w.w;
  fill_codebook(w.format.row, room.book);
  ptx::sync_block();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t start = int64_t{blockIdx.x} * kColumns, column = start + ptx::lane_id() * kRun;
  const int count = static_cast<int>(smaller<int64_t>(kRun, w.k - column));  // below 1: none
  for (int64_t first = int64_t{blockIdx.y} * kBackward; first < a.x.rows; first += int64_t{gridDim.y} * kBackward) {
    const int tokens = static_cast<int>(smaller<int64_t>(kBackward, a.x.rows - first));
    T sums[kBackward][kRun] = {};
    for (int64_t row = ptx::warp_id(); row < w.n && count > 0; row += kGradWarps) {
      float weights[kRun] = {};
      decode_any(a.w, row, column, count, room.book, weights);
      T dy[kBackward];
      read_floats(a.x, first * a.x.row_stride + row * a.x.column_stride, a.x.row_stride, tokens, dy);
#pragma unroll
      for (int j = 0; j < kBackward; ++j) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[j][i] = multiply_add(dy[j], static_cast<T>(weights[i]), sums[j][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBackward; ++j) {
      if (j >= tokens) break;
      ptx::sync_block();
      for (int i = 0; i < kRun; ++i) room.sums[ptx::warp_id()][ptx::lane_id() * kRun + i] = sums[j][i];
      ptx::sync_block();
      if (thread < kColumns && start + thread < w.k) {
        T sum = 0;
        for (int warp = 0; warp < kGradWarps; ++warp) sum += room.sums[warp][thread];
        write_number(a.y, a.x.dtype, (first + j) * w.k + start + thread, sum);
      }
    }
  }
}

// ---- launchers ----

unsigned token_blocks(int64_t tokens, int64_t each) {
  return static_cast<unsigned>(smaller(ceil_div(tokens, each), kMostGridY));
}

}  // namespace

void linear_floor(const LinearArgs& args, Stream stream) {
  const Weight& w = args.w;
  if (w.n == 0 || args.x.rows == 0) return;
  const FloorArgs a{runs_of(w, w.k), args.x, args.bias, args.y};
  const Launch how{
      .grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(w.n, kWarps)), token_blocks(args.x.rows, kForward)),
      .block = dim3(kThreads),
      .shared_bytes = sizeof(Codebook),
      .name = "linear_floor",
      .stream = stream};
  if (args.x.dtype == DType::F64) launch(how, linear_floor_kernel<double>, a);
  else launch(how, linear_floor_kernel<float>, a);
}

template <class T>
static void start_grad(const FloorArgs& a, Stream stream) {
  const Launch how{
      .grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(a.w.w.k, kColumns)), token_blocks(a.x.rows, kBackward)),
      .block = dim3(kGradThreads),
      .shared_bytes = sizeof(GradRoom<T>),
      .name = "linear_grad_x",
      .stream = stream};
  launch(how, linear_grad_kernel<T>, a);
}

void linear_grad_x(const LinearGradArgs& args, Stream stream) {
  if (args.w.k == 0 || args.dy.rows == 0) return;
  const FloorArgs a{runs_of(args.w, args.w.k), args.dy, nullptr, args.dx};
  if (args.dy.dtype == DType::F64) start_grad<double>(a, stream);
  else start_grad<float>(a, stream);
}

}  // namespace bitfold::cuda
