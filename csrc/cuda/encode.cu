// Encoding on the GPU, to the CPU's bytes: the formats with planes, and the driver of all.
//
// Two passes over the weight. In the first a warp goes over a group and chooses its grid; in the second a thread makes
// the codes of eight columns, which are whole bytes of any stream, so that groups may begin anywhere. A scale per
// matrix is chosen from the ranges of its rows. Nothing waits, until the first fault is read back at the end.
#include "cuda/encode.hpp"
#include "cuda/format_switch.hpp"
#include "cuda/lane.hpp"
#include "cuda/ranges.hpp"
#include "formats/codec.hpp"
#include "search/codes.inl"
#include "search/misfit.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct PlanesArgs {
  MatrixIn w;
  FormatRow row;
  Format format;
  PlanesOut out;
  bool clamp;
  int64_t group;   // columns
  int64_t groups;  // of a row
  // Of the workspace.
  void* scales;        // those of the groups before any nesting: the plane itself, or fp32
  uint8_t* zeros;      // a byte for each group; null without
  GroupRange* ranges;  // of the rows, where all share one grid
  double* sums;        // of kNestedSum scales each
  const float* offset;
  Faults* faults;

  constexpr bool per_tensor() const { return format.group == kPerTensor; }
  // Rows that are looked at together: those that share scales, but of one for the matrix each alone.
  constexpr int64_t bands() const { return bitfold::ceil_div(w.rows, int64_t{1} << format.row_shift); }
  constexpr int64_t band_begin(int64_t band) const { return band << format.row_shift; }
  constexpr int64_t band_end(int64_t band) const { return smaller(w.rows, band_begin(band + 1)); }
  constexpr int64_t first_byte(int64_t r, int64_t entries) const {
    return r * bitfold::ceil_div(entries * row.bits, 8);
  }
};

// ---- grids ----

// Of `count` columns of row r from `first` on; a warp's work.
BITFOLD_DEVICE GroupRange range_of(const PlanesArgs& a, int64_t r, int64_t first, int64_t count) {
  constexpr int kTogether = 4;
  GroupRange range{0.0f, 0.0f, true};
  for (int64_t i = ptx::lane_id(); i < count; i += kTogether * kWarp) {
    const int present = static_cast<int>(smaller<int64_t>(kTogether, bitfold::ceil_div(count - i, kWarp)));
    float numbers[kTogether];
    read_floats(a.w, r * a.w.row_stride + (first + i) * a.w.column_stride, kWarp * a.w.column_stride, present, numbers);
    for (int j = 0; j < kTogether; ++j) {
      if (!is_finite(numbers[j])) {
        if (range.finite) add_fault(a.faults, true, a.w, r, first + i + j * kWarp);
        range.finite = false;
      }
      range.low = numbers[j] < range.low ? numbers[j] : range.low;
      range.high = numbers[j] > range.high ? numbers[j] : range.high;
    }
  }
  return over_warp(range);
}

// Group g of all becomes what `range` asks for; (r, first) is where it starts.
BITFOLD_DEVICE void set_grid(const PlanesArgs& a, int64_t g, const GroupRange& range, int64_t r, int64_t first) {
  const GroupGrid grid = choose_grid(a.row, a.format.zero, a.format.scale, range);
  if (scale_fault(a.row, grid) != EncodeFault::None) add_fault(a.faults, false, a.w, r, first);
  store_scale(a.scales, a.format.scale, g, grid.scale);
  if (a.zeros != nullptr) a.zeros[g] = static_cast<uint8_t>(grid.zero);
}

// A warp, a group.
__global__ void __launch_bounds__(kThreads) encode_grids(PlanesArgs a) {
  const int64_t count = a.bands() * a.groups;
  for (int64_t g = int64_t{blockIdx.x} * kWarps + ptx::warp_id(); g < count; g += int64_t{gridDim.x} * kWarps) {
    const int64_t band = g / a.groups, first = g % a.groups * a.group, row = a.band_begin(band);
    GroupRange range = range_of(a, row, first, smaller(a.w.columns - first, a.group));
    for (int64_t r = row + 1; r < a.band_end(band); ++r) {
      const GroupRange more = range_of(a, r, first, smaller(a.w.columns - first, a.group));
      range.low = more.low < range.low ? more.low : range.low;
      range.high = more.high > range.high ? more.high : range.high;
      range.finite = range.finite && more.finite;
    }
    if (ptx::lane_id() != 0) continue;
    if (a.per_tensor()) a.ranges[row] = range;
    else if (range.finite) set_grid(a, g, range, row, first);
  }
}

// One warp: the grid of all rows.
__global__ void __launch_bounds__(kWarp) encode_tensor_grid(PlanesArgs a) {
  GroupRange range{0.0f, 0.0f, true};
  for (int64_t r = ptx::lane_id(); r < a.w.rows; r += kWarp) {
    const GroupRange& row = a.ranges[r];
    range.low = row.low < range.low ? row.low : range.low;
    range.high = row.high > range.high ? row.high : range.high;
    range.finite = range.finite && row.finite;
  }
  range = over_warp(range);
  if (ptx::lane_id() == 0 && range.finite) set_grid(a, 0, range, 0, 0);
}

// ---- codes ----

constexpr int kPiece = 8;  // codes, which are as many bytes as a code has bits

// Codes of `Bits` bits, least significant first; of two in a byte the even one may be in the high nibble.
BITFOLD_DEVICE uint64_t place_code(uint32_t code, int i, int bits, bool high_first) {
  return static_cast<uint64_t>(code) << bits * (high_first ? i ^ 1 : i);
}
BITFOLD_DEVICE void store_piece(uint8_t* to, uint64_t codes, int64_t bytes) {
  if (bytes == 4 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(codes);
  } else if (bytes == 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint64_t*>(to) = codes;
  } else {
    for (int64_t i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(codes >> 8 * i);
  }
}

template <int Row>
BITFOLD_DEVICE void encode_codes_as(const PlanesArgs& a) {
  constexpr int kBits = kFormats[Row].bits;
  constexpr bool kHighFirst = kFormats[Row].high_first;
  const int64_t pieces = bitfold::ceil_div(a.w.columns, kPiece), count = a.w.rows * pieces;
  for (int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x; p < count; p += int64_t{gridDim.x} * kThreads) {
    const int64_t r = p / pieces, first = p % pieces * kPiece;
    const int present = static_cast<int>(smaller<int64_t>(kPiece, a.w.columns - first));
    float numbers[kPiece];
    read_floats(a.w, r * a.w.row_stride + first * a.w.column_stride, a.w.column_stride, present, numbers);
    int64_t group = a.per_tensor() ? 0 : scale_row(a.format, r) * a.groups + first / a.group;
    int64_t left = a.per_tensor() ? kPiece : a.group - first % a.group;  // columns of the group
    const auto codes_of = [&](int64_t g) {
      const float scale = read_scale(a.scales, a.format.scale == Scale::Nested ? Scale::F32 : a.format.scale, g);
      const int zero = a.zeros != nullptr ? a.zeros[g] : 1 << (kBits - 1);
      return search::Codes<Row>(scale == 0.0f ? 1.0f : scale, zero);  // of zeros alone: their signs remain
    };
    search::Codes<Row> codes = codes_of(group);
    uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i == left && i < present) {  // a group has more columns than a piece: it ends once at most
        codes = codes_of(++group);
      }
      const auto code = static_cast<uint8_t>(codes(search::F{numbers[i]}).v);
      if (i < present) word |= place_code(search::stored_code<Row>(code), i, kBits, kHighFirst);
    }
    store_piece(static_cast<uint8_t*>(a.out.codes) + a.first_byte(r, a.w.columns) + first / kPiece * kBits, word,
                bitfold::ceil_div(present * kBits, 8));
  }
}

__global__ void __launch_bounds__(kThreads) encode_codes(PlanesArgs a) {
  switch_row(a.format.row, PlaneRows(), [&]<int Row>() { encode_codes_as<Row>(a); });
}

// Zeros from a byte each to their stream; a thread, eight of them.
__global__ void __launch_bounds__(kThreads) encode_zeros(PlanesArgs a) {
  const int64_t rows = a.per_tensor() ? 1 : a.w.rows, pieces = bitfold::ceil_div(a.groups, kPiece);
  for (int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x; p < rows * pieces;
       p += int64_t{gridDim.x} * kThreads) {
    const int64_t r = p / pieces, first = p % pieces * kPiece;
    const int64_t present = smaller<int64_t>(kPiece, a.groups - first);
    uint64_t word = 0;
    for (int i = 0; i < present; ++i) word |= place_code(a.zeros[r * a.groups + first + i], i, a.row.bits, false);
    store_piece(a.out.zeros + a.first_byte(r, a.groups) + first / kPiece * a.row.bits, word,
                bitfold::ceil_div(present * a.row.bits, 8));
  }
}

// ---- nested scales: docs/formats.md, "dq" ----

// A thread, kNestedSum scales.
__global__ void __launch_bounds__(kThreads) sum_scales(PlanesArgs a) {
  const int64_t count = a.w.rows * a.groups, sums = bitfold::ceil_div(count, kNestedSum);
  const auto* scales = static_cast<const float*>(a.scales);
  for (int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x; s < sums; s += int64_t{gridDim.x} * kThreads) {
    double sum = 0.0;
    const int64_t end = smaller(count, (s + 1) * kNestedSum);
    for (int64_t i = s * kNestedSum; i < end; ++i) sum += static_cast<double>(scales[i]);
    a.sums[s] = sum;
  }
}

// What scales lie around: given, or their mean.
BITFOLD_DEVICE float offset_of_scales(const PlanesArgs& a) {
  const int64_t count = a.w.rows * a.groups;
  if (a.offset != nullptr) return *a.offset;
  if (count == 0) return 0.0f;
  double total = 0.0;
  for (int64_t s = 0; s < bitfold::ceil_div(count, kNestedSum); ++s) total += a.sums[s];
  return static_cast<float>(total / static_cast<double>(count));
}

// A warp, a group of scales. Every block adds up the same sums in the same order, while another kernel would have to
// begin for one that did.
__global__ void __launch_bounds__(kThreads) nest_scales(PlanesArgs a) {
  const int64_t count = a.w.rows * a.groups, groups = bitfold::ceil_div(count, kNestedGroup);
  const auto* scales = static_cast<const float*>(a.scales);
  auto& offset = shared<float>();
  if (threadIdx.x == 0) {
    offset = offset_of_scales(a);
    if (blockIdx.x == 0) *a.out.nested_offset = offset;
  }
  ptx::sync_block();
  for (int64_t g = int64_t{blockIdx.x} * kWarps + ptx::warp_id(); g < groups; g += int64_t{gridDim.x} * kWarps) {
    const int64_t first = g * kNestedGroup + ptx::lane_id(), end = smaller(count, (g + 1) * kNestedGroup);
    float absmax = 0.0f;
    for (int64_t i = first; i < end; i += kWarp) {
      const float magnitude = fabsf(scales[i] - offset);
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = ptx::shuffle_xor(absmax, mask);
      absmax = other > absmax ? other : absmax;
    }
    if (ptx::lane_id() == 0) a.out.nested_scales[g] = absmax;
    const float inverse = 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
    for (int64_t i = first; i < end; i += kWarp) {
      static_cast<uint8_t*>(a.out.scales)[i] =
          absmax > 0.0f ? nearest_dynamic((scales[i] - offset) * inverse) : uint8_t{0};
    }
  }
}

// ---- fp16 and bf16: a thread, eight columns ----

__global__ void __launch_bounds__(kThreads) encode_cast(PlanesArgs a) {
  const bool half = a.format.row == kFp16;
  const float limit = cast_limit(half);
  const int64_t pieces = bitfold::ceil_div(a.w.columns, kPiece), count = a.w.rows * pieces;
  for (int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x; p < count; p += int64_t{gridDim.x} * kThreads) {
    const int64_t r = p / pieces, first = p % pieces * kPiece;
    const int present = static_cast<int>(smaller<int64_t>(kPiece, a.w.columns - first));
    float numbers[kPiece];
    read_floats(a.w, r * a.w.row_stride + first * a.w.column_stride, a.w.column_stride, present, numbers);
    auto* to = static_cast<uint16_t*>(a.out.codes) + r * a.w.columns + first;
    unsigned overflows = 0;
    for (int i = 0; i < present; ++i) {
      float number = numbers[i];
      if (!is_finite(number)) {
        add_fault(a.faults, true, a.w, r, first + i);
      } else if (fabsf(number) >= limit) {
        if (overflows++ == 0 && !a.clamp) add_fault(a.faults, false, a.w, r, first + i);
        number = number < 0.0f ? -a.row.grid_max : a.row.grid_max;
      }
      to[i] = half ? float_to_half(number) : float_to_bf16(number);
    }
    if (overflows > 0) ptx::atomic_add(&a.faults->overflows, static_cast<unsigned long long>(overflows));
  }
}

// ---- the first fault ----

// One thread, when there is one: what and how large it is.
__global__ void __launch_bounds__(1) explain_fault(PlanesArgs a) {
  const unsigned long long first = a.faults->first;
  const bool not_finite = first >> 63 == 0;
  const auto place = static_cast<int64_t>(first & ~(1ull << 63));
  const int64_t columns = a.w.columns > 0 ? a.w.columns : 1;
  EncodeStatus status{EncodeFault::NotFinite, place / columns, place % columns, 0.0, 0};
  const auto number = [&](int64_t i) {
    return read_float(a.w, status.row * a.w.row_stride + (status.column + i) * a.w.column_stride);
  };
  if (not_finite) {
    status.value = number(0);
  } else if (a.row.grid == Grid::Cast) {
    status.fault = EncodeFault::CastOverflow;
    status.value = number(0);
    status.count = static_cast<int64_t>(a.faults->overflows);
  } else if (a.row.grid == Grid::Block) {
    float largest = 0.0f;
    for (int64_t i = 0; i < a.row.group; ++i) largest = fabsf(number(i)) > largest ? fabsf(number(i)) : largest;
    status.fault = misfit(largest);
    status.value = largest;
  } else {
    GroupRange range{0.0f, 0.0f, true};
    const auto add = [&](float low, float high) {
      range.low = low < range.low ? low : range.low;
      range.high = high > range.high ? high : range.high;
    };
    if (a.per_tensor()) {
      for (int64_t r = 0; r < a.w.rows; ++r) add(a.ranges[r].low, a.ranges[r].high);
    } else {
      for (const int64_t end = a.band_end(status.row >> a.format.row_shift); status.row < end; ++status.row) {
        for (int64_t i = 0; i < smaller(a.w.columns - status.column, a.group); ++i) add(number(i), number(i));
      }
      status.row = place / columns;
    }
    const GroupGrid grid = choose_grid(a.row, a.format.zero, a.format.scale, range);
    status.fault = scale_fault(a.row, grid);
    status.value = grid.exact;
  }
  a.faults->status = status;
}

// ---- the driver ----

// Consecutive parts of the workspace; without one, how large it is.
class Parts {
 public:
  explicit Parts(void* workspace) : base_(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += bitfold::ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

PlanesArgs take_parts(const EncodeArgs& args, Parts& parts, float** row_means) {
  const Format& format = args.format;
  const int64_t n = args.w.rows, k = args.w.columns;
  PlanesArgs a{.w = args.w,
               .row = format.info(),
               .format = format,
               .out = args.out,
               .clamp = args.clamp,
               .group = format.group > 0 ? format.group : k,
               .groups = groups_in_row(format, k),
               .scales = args.out.scales,
               .zeros = nullptr,
               .ranges = nullptr,
               .sums = nullptr,
               .offset = args.nested_offset,
               .faults = parts.take<Faults>(1)};
  if (a.group == 0) a.group = 1;  // of no columns
  if (format.is_block()) {
    if (block_row_means(args)) *row_means = parts.take<float>(n);
    return a;
  }
  if (format.zero == Zero::Integer) a.zeros = parts.take<uint8_t>(a.per_tensor() ? 1 : n * a.groups);
  if (a.per_tensor()) a.ranges = parts.take<GroupRange>(n);
  if (format.scale == Scale::Nested) {
    a.scales = parts.take<float>(n * a.groups);
    a.sums = parts.take<double>(bitfold::ceil_div(n * a.groups, kNestedSum));
  }
  return a;
}

using Kernel = void (*)(PlanesArgs);

// `count` pieces of work, `each` to a block; a kernel of one warp or thread says so by `threads`.
void start(const char* name, Kernel kernel, const PlanesArgs& a, int64_t count, int64_t each, Stream stream,
           unsigned threads = kThreads) {
  if (count > 0) launch({grid_for(count, each), threads, 0, name, stream}, kernel, a);
}

void encode_planes(const PlanesArgs& a, Stream stream) {
  const int64_t rows = a.w.rows, pieces = rows * bitfold::ceil_div(a.w.columns, kPiece);
  const int64_t groups = a.bands() * a.groups;
  if (a.row.grid == Grid::Cast) return start("encode_cast", encode_cast, a, pieces, kThreads, stream);
  start("encode_grids", encode_grids, a, groups, kWarps, stream);
  if (a.per_tensor()) start("encode_tensor_grid", encode_tensor_grid, a, 1, 1, stream, kWarp);
  start("encode_codes", encode_codes, a, pieces, kThreads, stream);
  if (a.zeros != nullptr) {
    const int64_t zero_rows = a.per_tensor() ? 1 : rows;
    start("encode_zeros", encode_zeros, a, zero_rows * bitfold::ceil_div(a.groups, kPiece), kThreads, stream);
  }
  if (a.format.scale != Scale::Nested) return;
  if (a.offset == nullptr) start("sum_scales", sum_scales, a, bitfold::ceil_div(groups, kNestedSum), kThreads, stream);
  const int64_t nests = larger<int64_t>(1, bitfold::ceil_div(groups, kNestedGroup));  // of none there is an offset, too
  launch({grid_for(nests, kWarps), kThreads, sizeof(float), "nest_scales", stream}, nest_scales, a);
}

}  // namespace

int64_t encode_workspace(const EncodeArgs& args) {
  Parts parts(nullptr);
  float* row_means = nullptr;
  take_parts(args, parts, &row_means);
  return parts.bytes();
}

EncodeStatus encode(const EncodeArgs& args, void* workspace, Stream stream) {
  Parts parts(workspace);
  float* row_means = nullptr;
  const PlanesArgs a = take_parts(args, parts, &row_means);
  fill(&a.faults->first, 0xff, sizeof(a.faults->first), stream);
  clear(&a.faults->overflows, sizeof(a.faults->overflows), stream);
  if (args.format.is_block()) encode_blocks(args, row_means, a.faults, stream);
  else encode_planes(a, stream);
  unsigned long long first = 0;
  read_back(&first, &a.faults->first, sizeof(first), stream);
  EncodeStatus status;
  if (first == ~0ull) return status;
  start("explain_fault", explain_fault, a, 1, 1, stream, 1);
  read_back(&status, &a.faults->status, sizeof(status), stream);
  return status;
}

}  // namespace bitfold::cuda
