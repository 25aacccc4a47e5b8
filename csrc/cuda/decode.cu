// Decoding to a matrix of floats, whole or by row numbers (an embedding): the bytes of the CPU's.
//
// Bound by memory: a thread takes runs of eight columns, so that a warp reads and writes whole sectors and a thread
// stores 16 bytes at once, and four or eight of them, far apart, whose loads are in flight together. A matrix whose
// rows are whole groups and bytes is one long row to it: a thread's runs lie at constant distances.
#include "cuda/cuda.hpp"
#include "cuda/format_switch.hpp"
#include "cuda/whole_runs.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
// Formats with planes load more of a run that is on its way: nested scales wait for one load after another.
template <int Row>
constexpr int kRuns = kFormats[Row].grid == Grid::Block || kFormats[Row].grid == Grid::Cast ? 4 : 8;  // of a thread
template <int Row>
constexpr int64_t kTileRuns = kThreads * kRuns<Row>;  // of a block
constexpr int64_t kMostQuickRuns = (int64_t{1} << 31) - 8 * kThreads;

struct DecodeRuns {
  WeightRuns w;
  const int64_t* ids;
  int64_t matrix_rows;  // ids are below it
  DType dtype;
  void* out;
  int64_t rows, columns;     // of out
  int64_t row_runs;          // runs of a row of out; the last may be shorter
  bool quick;                // whole runs, few enough for 32 bits
  Divider by_row, by_group;  // of a run: where they are quick
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

// All of a run to `out`, which is on a boundary of 16 bytes.
template <DType To>
BITFOLD_DEVICE void store_whole_run(void* out, const float (&v)[kRun]) {
  if constexpr (To == DType::F16 || To == DType::BF16) {
    uint32_t pairs[kRun / 2];
#pragma unroll
    for (int j = 0; j < kRun; j += 2) {
      pairs[j / 2] = To == DType::F16 ? ptx::floats_to_halves(v[j], v[j + 1]) : ptx::floats_to_bf16s(v[j], v[j + 1]);
    }
    *static_cast<uint4*>(out) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  } else if constexpr (To == DType::F32) {
    static_cast<float4*>(out)[0] = {v[0], v[1], v[2], v[3]};
    static_cast<float4*>(out)[1] = {v[4], v[5], v[6], v[7]};
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) static_cast<double*>(out)[j] = static_cast<double>(v[j]);
  }
}

// f.operator()<dtype>().
template <class F>
BITFOLD_DEVICE void switch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::F16: return f.template operator()<DType::F16>();
    case DType::BF16: return f.template operator()<DType::BF16>();
    case DType::F32: return f.template operator()<DType::F32>();
    default: return f.template operator()<DType::F64>();
  }
}

// ---- whole runs: all of a thread's are on their way before the first is looked at ----

// Run `run` of row `row` of a matrix that is read row by row.
template <int Row>
BITFOLD_DEVICE RunPlace place_of_run(const DecodeRuns& d, uint32_t row, uint32_t run) {
  if (d.w.w.layout == Layout::Flat) {
    run += row * static_cast<uint32_t>(d.row_runs);
    row = 0;
  }
  constexpr bool kBlocks = kFormats[Row].grid == Grid::Block;
  const uint32_t group = kBlocks ? run % kRunsOfCodes<Row> : d.by_group(run);
  const auto scale_row = static_cast<uint32_t>(bitfold::scale_row(d.w.w.format, row));
  return {.codes = static_cast<const uint8_t*>(d.w.w.codes) +
                   static_cast<uint64_t>(row) * static_cast<uint32_t>(d.w.row_bytes) +
                   static_cast<uint64_t>(run / kRunsOfCodes<Row>) * kCodeBytes<Row>,
          .row = row,
          .group = group,
          .scale = scale_row * static_cast<uint32_t>(d.w.groups) + group};
}

// The places of a thread's runs, from run `first` of out on; those beyond the end are the last once more.
template <int Row>
BITFOLD_DEVICE void find_places(const DecodeRuns& d, uint32_t first, uint32_t total, RunPlace (&places)[kRuns<Row>]) {
  uint32_t rows[kRuns<Row>], runs[kRuns<Row>];
#pragma unroll
  for (int step = 0; step < kRuns<Row>; ++step) {
    const uint32_t i = smaller(first + static_cast<uint32_t>(step * kThreads), total - 1);
    rows[step] = d.by_row(i);
    runs[step] = i - rows[step] * static_cast<uint32_t>(d.row_runs);
  }
  if (d.ids != nullptr) {
    int64_t ids[kRuns<Row>];
    bool there = true;
#pragma unroll
    for (int step = 0; step < kRuns<Row>; ++step) ids[step] = d.ids[rows[step]];
#pragma unroll
    for (int step = 0; step < kRuns<Row>; ++step) {
      there &= ids[step] >= 0 && ids[step] < d.matrix_rows;
      rows[step] = static_cast<uint32_t>(ids[step]);
    }
    if (!there) ptx::trap();
  }
#pragma unroll
  for (int step = 0; step < kRuns<Row>; ++step) places[step] = place_of_run<Row>(d, rows[step], runs[step]);
}

template <int Row>
BITFOLD_DEVICE void decode_whole_runs(const DecodeRuns& d, const Codebook& book) {
  const auto total = static_cast<uint32_t>(d.rows * d.row_runs);
  const uint32_t tile = blockIdx.x * static_cast<uint32_t>(kTileRuns<Row>), first = tile + threadIdx.x;
  RunPlace places[kRuns<Row>];
  WholeRuns<Row, kRuns<Row>> runs;
  if (d.rows == 1 && d.ids == nullptr && tile + kTileRuns<Row> <= total) {
    static_assert(kThreads % kRunsOfCodes<Row> == 0);
    constexpr int kApart = kThreads / kRunsOfCodes<Row> * kCodeBytes<Row>;
    const auto* codes =
        static_cast<const uint8_t*>(d.w.w.codes) + static_cast<uint64_t>(first / kRunsOfCodes<Row>) * kCodeBytes<Row>;
#pragma unroll
    for (int step = 0; step < kRuns<Row>; ++step) {
      const uint32_t group = kFormats[Row].grid == Grid::Block
                                 ? threadIdx.x % kRunsOfCodes<Row>
                                 : d.by_group(first + static_cast<uint32_t>(step * kThreads));
      places[step] = {.codes = codes + step * kApart, .row = 0, .group = group, .scale = group};
    }
    runs.load(d.w, places);
  } else {
    find_places<Row>(d, first, total, places);
    runs.load(d.w, places);
  }
  switch_dtype(d.dtype, [&]<DType To>() {
    constexpr int kBytes = kRun * static_cast<int>(dtype_bits(To)) / 8;
    char* out = static_cast<char*>(d.out) + static_cast<uint64_t>(first) * kBytes;
#pragma unroll
    for (int step = 0; step < kRuns<Row>; ++step) {
      if (first + static_cast<uint32_t>(step * kThreads) >= total) return;
      float values[kRun];
      runs.values(step, book.values, values);
      store_whole_run<To>(out + step * kThreads * kBytes, values);
    }
  });
}

// ---- any runs ----

// `count` values to out[at, at + count).
BITFOLD_DEVICE void store_run(const DecodeRuns& d, int64_t at, int count, const float (&v)[kRun]) {
  switch_dtype(d.dtype, [&]<DType To>() {
    constexpr int kBytes = static_cast<int>(dtype_bits(To)) / 8;
    char* out = static_cast<char*>(d.out) + at * kBytes;
    if (count == kRun && at % kRun == 0) return store_whole_run<To>(out, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= count) return;
      if constexpr (To == DType::F16) reinterpret_cast<uint16_t*>(out)[j] = ptx::float_to_half(v[j]);
      else if constexpr (To == DType::BF16) reinterpret_cast<uint16_t*>(out)[j] = ptx::float_to_bf16(v[j]);
      else if constexpr (To == DType::F32) reinterpret_cast<float*>(out)[j] = v[j];
      else reinterpret_cast<double*>(out)[j] = static_cast<double>(v[j]);
    }
  });
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

template <int Row>
BITFOLD_DEVICE void decode_runs(const DecodeRuns& d, const Codebook& book) {
  if constexpr (kHasCodebook<Row>) ptx::sync_block();  // others don't wait before they load
  if (d.quick) return decode_whole_runs<Row>(d, book);
  const int64_t total = d.rows * d.row_runs;
  for (int step = 0; step < kRuns<Row>; ++step) {
    const int64_t i = blockIdx.x * kTileRuns<Row> + step * kThreads + static_cast<int64_t>(threadIdx.x);
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

// Formats of a kernel have equally many runs.
template <int Row, int... More>
constexpr int64_t tile_runs(std::integer_sequence<int, Row, More...>) {
  static_assert((true && ... && (kRuns<More> == kRuns<Row>)));
  return kTileRuns<Row>;
}

template <class Rows>
bool launch_decode(const DecodeRuns& d, Stream stream) {
  if (!has_row(d.w.w.format.row, Rows())) return false;
  const int64_t blocks = ceil_div(d.rows * d.row_runs, tile_runs(Rows()));
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
  const int64_t row_runs = ceil_div(columns, int64_t{kRun});
  const WeightRuns runs = runs_of(w, columns);
  const bool quick = runs.whole && row_runs > 1 &&
                     larger(rows * row_runs, w.n * ceil_div(w.k, int64_t{kRun})) < kMostQuickRuns &&
                     runs.row_bytes <= UINT32_MAX;
  const bool by_group = w.format.group > 0 && !w.format.is_block();
  const DecodeRuns d{.w = runs,
                     .ids = args.ids,
                     .matrix_rows = w.n,
                     .dtype = args.dtype,
                     .out = args.out,
                     .rows = rows,
                     .columns = columns,
                     .row_runs = row_runs,
                     .quick = quick,
                     .by_row = quick ? divider_of(row_runs) : kAlwaysZero,
                     .by_group = quick && by_group ? divider_of(w.format.group / kRun) : kAlwaysZero};
  launch_one_of<CastRows, PlaneRows, SmallBlockRows, LargeBlockRows>(d, stream);
}

}  // namespace bitfold::cuda
