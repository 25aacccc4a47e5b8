// Decoding to a matrix of floats, whole or by row numbers (an embedding): the bytes of the CPU's.
//
// Bound by memory: a thread takes runs of eight columns, so that a warp reads and writes whole sectors and a thread
// stores 16 bytes at once, and four of them, far apart, whose loads are in flight together. A matrix whose rows are
// whole groups and bytes is one long row to it, so that nothing has to be divided.
#include "cuda/cuda.hpp"
#include "cuda/format_switch.hpp"
#include "cuda/runs.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRunsPerThread = 4;
constexpr int64_t kTileRuns = kThreads * kRunsPerThread;  // of a block

struct DecodeRuns {
  WeightRuns w;
  const int64_t* ids;
  int64_t matrix_rows;  // ids are below it
  DType dtype;
  void* out;
  int64_t rows, columns;  // of out
  int64_t row_runs;       // runs of a row of out; the last may be shorter
};

struct Place {
  int64_t row, run;
};
// 64-bit division is a hundred instructions; almost no matrix needs it.
BITFOLD_DEVICE Place place_of(const DecodeRuns& d, int64_t i) {
  if (d.rows == 1) return {0, i};
  if ((i | d.row_runs) >> 32 != 0) return {i / d.row_runs, i % d.row_runs};
  const auto row = static_cast<uint32_t>(i) / static_cast<uint32_t>(d.row_runs);
  return {row, static_cast<uint32_t>(i) - row * static_cast<uint32_t>(d.row_runs)};
}

// `count` values to out[at, at + count). All of a run that starts at a multiple of 16 bytes go at once.
BITFOLD_DEVICE void store_run(const DecodeRuns& d, int64_t at, int count, const float (&v)[kRun]) {
  const bool vector = count == kRun && at % kRun == 0;
  switch (d.dtype) {
    case DType::F16:
    case DType::BF16: {
      uint32_t pairs[kRun / 2];
#pragma unroll
      for (int j = 0; j < kRun; j += 2) {
        pairs[j / 2] =
            d.dtype == DType::F16 ? ptx::floats_to_halves(v[j], v[j + 1]) : ptx::floats_to_bf16s(v[j], v[j + 1]);
      }
      auto* out = static_cast<uint16_t*>(d.out) + at;
      if (vector) {
        *reinterpret_cast<uint4*>(out) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        return;
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j < count) out[j] = static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
      }
      return;
    }
    case DType::F32: {
      auto* out = static_cast<float*>(d.out) + at;
      if (vector) {
        reinterpret_cast<float4*>(out)[0] = {v[0], v[1], v[2], v[3]};
        reinterpret_cast<float4*>(out)[1] = {v[4], v[5], v[6], v[7]};
        return;
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j < count) out[j] = v[j];
      }
      return;
    }
    default: {
      auto* out = static_cast<double*>(d.out) + at;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j < count) out[j] = static_cast<double>(v[j]);
      }
    }
  }
}

// A run of out, and where its weights are.
struct Run {
  Place place;
  int64_t row;
  BITFOLD_DEVICE int64_t column() const { return place.run * kRun; }
};
BITFOLD_DEVICE Run run_of(const DecodeRuns& d, int64_t i) {
  const Place place = place_of(d, i);
  if (d.ids == nullptr) return {place, place.row};
  const int64_t row = d.ids[place.row];
  if (row < 0 || row >= d.matrix_rows) ptx::trap();
  return {place, row};
}

// A thread's runs of a tile: all of them are on their way before the first is looked at, so those beyond the end are
// the last once more, which isn't stored.
template <int Row>
BITFOLD_DEVICE void decode_whole_runs(const DecodeRuns& d, const Codebook& book) {
  const int64_t total = d.rows * d.row_runs;
  const int64_t first = blockIdx.x * kTileRuns + static_cast<int64_t>(threadIdx.x);
  const auto left = static_cast<int>(smaller(total - first, kTileRuns));
  LoadedRun loaded[kRunsPerThread];
  int64_t places[kRunsPerThread];  // in out
#pragma unroll
  for (int step = 0; step < kRunsPerThread; ++step) {
    const Run run = run_of(d, step * kThreads < left ? first + step * kThreads : total - 1);
    places[step] = run.place.row * d.columns + run.column();
    loaded[step] = load_run<Row>(d.w, run.row, run.column());
  }
#pragma unroll
  for (int step = 0; step < kRunsPerThread; ++step) {
    if (step * kThreads >= left) return;
    float values[kRun];
    finish_run<Row>(d.w, loaded[step], book.values, values);
    store_run(d, places[step], kRun, values);
  }
}

template <int Row>
BITFOLD_DEVICE void decode_runs(const DecodeRuns& d, const Codebook& book) {
  if constexpr (kLoadedAhead<Row>) {
    if (d.w.whole) return decode_whole_runs<Row>(d, book);
  }
  const int64_t total = d.rows * d.row_runs;
#pragma unroll(kLoadedAhead<Row> ? 1 : kRunsPerThread)
  for (int step = 0; step < kRunsPerThread; ++step) {
    const int64_t i = blockIdx.x * kTileRuns + step * kThreads + static_cast<int64_t>(threadIdx.x);
    if (i >= total) return;
    const Run run = run_of(d, i);
    const auto count = static_cast<int>(smaller<int64_t>(kRun, d.columns - run.column()));
    float values[kRun] = {};
    decode_run<Row>(d.w, run.row, run.column(), count, book.values, values);
    store_run(d, run.place.row * d.columns + run.column(), count, values);
  }
}

template <class Rows>
__global__ void __launch_bounds__(kThreads, 4) decode_kernel(const DecodeRuns d) {
  Codebook& book = shared<Codebook>();
  fill_codebook(d.w.w.format.row, book);
  switch_row(d.w.w.format.row, Rows(), [&]<int Row>() { decode_runs<Row>(d, book); });
}

template <class Rows>
bool launch_decode(const DecodeRuns& d, Stream stream) {
  if (!has_row(d.w.w.format.row, Rows())) return false;
  const int64_t blocks = ceil_div(d.rows * d.row_runs, kTileRuns);
  launch({.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(kThreads),
          .shared_bytes = sizeof(Codebook),
          .name = "decode",
          .stream = stream},
         decode_kernel<Rows>, d);
  return true;
}

// Formats that need about as many registers share a kernel.
template <class... Rows>
void launch_one_of(const DecodeRuns& d, Stream stream) {
  (void)(... || launch_decode<Rows>(d, stream));
}

}  // namespace

void decode(const DecodeArgs& args, Stream stream) {
  const Weight& w = args.w;
  if (args.rows == 0 || w.k == 0) return;
  // A flat matrix that is decoded whole is one long row, and so is one whose rows end as their groups and bytes do.
  const bool one_row = args.ids == nullptr && (w.layout == Layout::Flat || rows_are_one(w));
  const int64_t rows = one_row ? 1 : args.rows, columns = one_row ? args.rows * w.k : w.k;
  const DecodeRuns d{.w = runs_of(w, columns),
                     .ids = args.ids,
                     .matrix_rows = w.n,
                     .dtype = args.dtype,
                     .out = args.out,
                     .rows = rows,
                     .columns = columns,
                     .row_runs = ceil_div(columns, int64_t{kRun})};
  launch_one_of<CastRows, PlaneRows, SmallBlockRows, LargeBlockRows>(d, stream);
}

}  // namespace bitfold::cuda
