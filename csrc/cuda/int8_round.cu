// x to rows of 8-bit codes: which columns are outliers, and the codes of all others.
//
// int8_mark: a block looks through a strip of columns of some hundred rows; each part of the rows has bits of its own,
// so that nobody has to clear them, and no order matters. int8_round: a block rounds a row; others have a strip each of
// the ascending list of outliers that have no copy, and put their columns of W and x where neighbours are beside one
// another.
#include "cuda/int8.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kMarkThreads = 256;
constexpr int kMarkWarps = kMarkThreads / kWarp;
constexpr int kThreads = 512;  // of int8_round
constexpr int kListers = 2;    // blocks that share a strip of the list
constexpr int kStripWords = 8;
constexpr int kStrip = 32 * kStripWords;  // columns of a block of int8_mark

// ---- numbers of x ----

// Four neighbouring numbers of a row, zeros behind k, of columns from `first` on: where they are a load of 8 bytes, and
// anywhere. kAhead: loads of a thread that are on their way together. look() keeps the largest magnitudes, of all
// numbers and of those that are no outliers, as bits() tells them. Of four outliers each has the sign of a byte.
// see() keeps what reached() needs: which of four columns have reached the threshold.
template <bool Half>
struct Vectors {
  static constexpr int kAhead = 8;
  using Loaded = uint2;
  using Seen = uint2;
  const uint16_t* row;

  BITFOLD_DEVICE Vectors(const Int8Op& op, int64_t row, int64_t first)
      : row(static_cast<const uint16_t*>(op.x.data) + row * op.x.row_stride + first) {}
  BITFOLD_DEVICE Loaded load(const Int8Op&, int column) const { return ptx::load_fresh8(row + column); }
  BITFOLD_DEVICE static void numbers(Loaded loaded, float (&x)[4]) {
    const float2 low = Half ? ptx::halves_to_floats(loaded.x) : ptx::bf16s_to_floats(loaded.x);
    const float2 high = Half ? ptx::halves_to_floats(loaded.y) : ptx::bf16s_to_floats(loaded.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
  // Two magnitudes of 16 bits in each: their bits are in the order of the numbers, with infinity and NaNs behind.
  BITFOLD_DEVICE static void look(Loaded loaded, uint32_t outliers, uint32_t& all, uint32_t& largest) {
    const uint32_t low = ptx::habs2(loaded.x), high = ptx::habs2(loaded.y);
    all = ptx::max_u16x2(ptx::max_u16x2(all, low), high);
    largest = ptx::max_u16x2(largest, low & ~ptx::prmt(outliers, 0, 0x9988));
    largest = ptx::max_u16x2(largest, high & ~ptx::prmt(outliers, 0, 0xbbaa));
  }
  BITFOLD_DEVICE static uint32_t bits(uint32_t pair) {
    return ptx::float_as_uint(number_of(larger(pair >> 16, pair & 0xffffu)));
  }
  // Each column's largest finite magnitude: with a sign and less infinity it is above 0, what isn't finite is below. (0
  // is where nothing is finite, which is infinity again.)
  BITFOLD_DEVICE static void see(const Int8Op&, Loaded loaded, Seen& seen) {
    const auto less = [](uint32_t two) { return (two | 0x80008000u) - kInfinity * 0x10001u; };
    seen.x = ptx::max_s16x2(seen.x, less(loaded.x));
    seen.y = ptx::max_s16x2(seen.y, less(loaded.y));
  }
  BITFOLD_DEVICE static uint32_t reached(const Int8Op& op, Seen seen) {
    uint32_t columns = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t less = (i < 2 ? seen.x : seen.y) >> 16 * (i % 2);
      columns |= (reaches(op, number_of(less + kInfinity)) ? 1u : 0u) << i;
    }
    return columns;
  }

 private:
  static constexpr uint32_t kInfinity = Half ? 0x7c00 : 0x7f80;
  BITFOLD_DEVICE static float number_of(uint32_t bits) {
    const auto number = static_cast<uint16_t>(bits);
    return Half ? ptx::half_to_float(number) : ptx::bf16_to_float(number);
  }
};
struct Numbers {
  static constexpr int kAhead = 2;
  using Loaded = float4;
  using Seen = uint32_t;
  int64_t begin, first;

  BITFOLD_DEVICE Numbers(const Int8Op& op, int64_t row, int64_t first) : begin(row * op.x.row_stride), first(first) {}
  BITFOLD_DEVICE Loaded load(const Int8Op& op, int column) const {
    float x[4];
    read_floats<4>(op.x, begin + (first + column) * op.x.column_stride, op.x.column_stride,
                   static_cast<int>(smaller<int64_t>(4, op.k - first - column)), x);
    return {x[0], x[1], x[2], x[3]};
  }
  BITFOLD_DEVICE static void numbers(const Loaded& loaded, float (&x)[4]) {
    x[0] = loaded.x, x[1] = loaded.y, x[2] = loaded.z, x[3] = loaded.w;
  }
  BITFOLD_DEVICE static void look(const Loaded& loaded, uint32_t outliers, uint32_t& all, uint32_t& largest) {
    float x[4];
    numbers(loaded, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = ptx::float_as_uint(magnitude(x[i]));
      all = larger(all, bits);
      if (!(outliers >> (8 * i + 7) & 1u)) largest = larger(largest, bits);
    }
  }
  BITFOLD_DEVICE static uint32_t bits(uint32_t largest) { return largest; }
  BITFOLD_DEVICE static void see(const Int8Op& op, const Loaded& loaded, Seen& seen) {
    float x[4];
    numbers(loaded, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) seen |= (reaches(op, x[i]) ? 1u : 0u) << i;
  }
  BITFOLD_DEVICE static uint32_t reached(const Int8Op&, Seen seen) { return seen; }
};

// fn(a source), of x.
template <class Fn>
BITFOLD_DEVICE void with_source(const Int8Op& op, const Fn& fn) {
  const bool half = op.x.dtype == DType::F16;
  const bool vectors = (half || op.x.dtype == DType::BF16) && op.x.column_stride == 1 && op.x.row_stride % 4 == 0 &&
                       op.k % 4 == 0 && reinterpret_cast<uintptr_t>(op.x.data) % 8 == 0;
  if (!vectors) fn.template operator()<Numbers>();
  else if (half) fn.template operator()<Vectors<true>>();
  else fn.template operator()<Vectors<false>>();
}

// ---- which columns reach the threshold, and of which there are copies ----

struct MarkMemory {
  uint32_t reached[kStripWords];
  uint32_t copied[kStripWords];
};

template <class Source>
BITFOLD_DEVICE void mark_strip(const Int8Op& op, MarkMemory& memory) {
  constexpr int kFours = kStrip / (4 * kWarp), kRows = Source::kAhead / kFours;
  const int64_t begin = blockIdx.y * op.flag_rows;
  const auto rows = static_cast<int>(smaller(begin + op.flag_rows, op.x.rows) - begin);
  const int64_t first = int64_t{blockIdx.x} * kStrip + 4 * ptx::lane_id();
  typename Source::Seen seen[kFours] = {};  // of columns from first + 4 * kWarp * i on
#pragma unroll 1
  for (int row = ptx::warp_id(); row < rows; row += kMarkWarps * kRows) {
    typename Source::Loaded loaded[kRows][kFours];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Source source(op, begin + row + kMarkWarps * r, first);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const int column = 4 * kWarp * i;
        const bool there = column < op.k - first && row + kMarkWarps * r < rows;
        loaded[r][i] = there ? source.load(op, column) : typename Source::Loaded{};
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) Source::see(op, loaded[r][i], seen[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const uint32_t columns = Source::reached(op, seen[i]);
    if (columns != 0) ptx::atomic_or(&memory.reached[4 * i + ptx::lane_id() / 8], columns << ptx::lane_id() % 8 * 4);
  }
}

BITFOLD_DEVICE void mark(const Int8Op& op) {
  auto& memory = shared<MarkMemory>();
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * kStrip;
  if (thread < kStripWords) memory.reached[thread] = memory.copied[thread] = 0;
  if (op.finds && thread == 0 && blockIdx.x == 0 && blockIdx.y == 0) *op.loose_huge = 0;
  ptx::sync_block();
  if (op.finds) with_source(op, [&]<class Source>() { mark_strip<Source>(op, memory); });
  if (op.copied != nullptr && blockIdx.y == 0) {
    for (int i = thread; i < op.copies; i += kMarkThreads) {
      const int64_t column = op.columns[i];
      if (column < 0 || column >= op.k || (i > 0 && column <= op.columns[i - 1])) ptx::trap();
      if (column < first || column >= first + kStrip) continue;
      const auto within = static_cast<int>(column - first);
      ptx::atomic_or(&memory.copied[within / 32], 1u << within % 32);
    }
  }
  ptx::sync_block();
  if (thread >= kStripWords) return;
  const int64_t word = int64_t{blockIdx.x} * kStripWords + thread;
  if (op.finds) op.reached[blockIdx.y * op.words + word] = memory.reached[thread];
  if (op.copied != nullptr && blockIdx.y == 0) op.copied[word] = memory.copied[thread];
}

// Columns [32 word, 32 word + 32) that have no codes: those with a copy, and unless a row has its own those that reach
// the threshold in any row.
BITFOLD_DEVICE uint32_t copied(const Int8Op& op, int64_t word) { return op.copied != nullptr ? op.copied[word] : 0u; }
BITFOLD_DEVICE uint32_t reached(const Int8Op& op, int64_t word) {
  uint32_t bits = 0;
  for (int part = 0; part < op.flag_parts; ++part) bits |= op.reached[part * op.words + word];
  return bits;
}

// ---- a row's codes ----

constexpr int kPartWords = kPartColumns / 32;

struct alignas(16) RoundMemory {
  uint32_t without[kPartWords];  // a part's columns that have no codes, but for those of one row
  uint32_t largest;              // magnitude of the columns with codes, as bits
  uint32_t all;                  // of all columns
  int sum;
};

template <class Source, bool ByRow>
class Row {
 public:
  BITFOLD_DEVICE Row(const Int8Op& op, RoundMemory& memory, int64_t row) : op_(op), memory_(memory), row_(row) {}

  BITFOLD_DEVICE void round() {
    uint32_t largest = 0, all = 0;
    for (int part = 0; part < op_.parts; ++part) {
      find_outliers(part);
      each_four(part, op_.k, [&](int, const typename Source::Loaded& x, uint32_t outliers) {
        Source::look(x, outliers, all, largest);
      });
    }
    largest = Source::bits(largest), all = Source::bits(all);
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      largest = larger(largest, ptx::shuffle_xor(largest, mask));
      all = larger(all, ptx::shuffle_xor(all, mask));
    }
    if (ptx::lane_id() == 0) {
      ptx::atomic_max(&memory_.largest, largest);
      ptx::atomic_max(&memory_.all, all);
    }
    ptx::sync_block();
    const float peak = ptx::uint_as_float(memory_.largest);
    const bool number = memory_.all < 0x7f800000u, fixed = op_.x_scale != nullptr;
    const bool rounds = number && (fixed || peak >= kSmallestRow);
    const float step = fixed ? *op_.x_scale : ptx::div(peak, 127.0f);
    const float inverse = !rounds ? 0.0f : fixed ? ptx::div(1.0f, step) : ptx::div(127.0f, peak);
    if (threadIdx.x == 0) op_.steps[row_] = !number ? ptx::uint_as_float(0x7fc00000u) : rounds ? step : 0.0f;
    for (int part = 0; part < op_.parts; ++part) {
      fixed ? write_part<true>(part, rounds, inverse) : write_part<false>(part, rounds, inverse);
    }
  }

 private:
  // Between barriers.
  BITFOLD_DEVICE void find_outliers(int part) {
    static_assert(kPartWords == 4 * kThreads && kStripWords % 4 == 0);
    const int64_t word = int64_t{part} * kPartWords + 4 * static_cast<int>(threadIdx.x);
    ptx::sync_block();
    if (word < op_.words) {
      uint4 bits = {};
      const auto add = [&](const uint32_t* words) {
        const uint4 more = ptx::load_fresh16(words + word);
        bits.x |= more.x, bits.y |= more.y, bits.z |= more.z, bits.w |= more.w;
      };
      if (op_.copied != nullptr) add(op_.copied);
#pragma unroll 8
      for (int i = 0; i < (op_.finds && !ByRow ? op_.flag_parts : 0); ++i) add(op_.reached + i * op_.words);
      *reinterpret_cast<uint4*>(memory_.without + 4 * threadIdx.x) = bits;
    }
    ptx::sync_block();
  }

  // fn(column of the part, what was loaded, which are outliers) for every fourth column of a part below `end` that is
  // this thread's.
  template <class Fn>
  BITFOLD_DEVICE void each_four(int part, int64_t end, const Fn& fn) {
    constexpr int kAhead = Source::kAhead, kTurn = 4 * kThreads;
    const int64_t begin = part * kPartColumns;
    const auto columns = static_cast<int>(smaller(end - begin, kPartColumns));
    const auto there = static_cast<int>(smaller(op_.k - begin, int64_t{columns}));
    const Source source(op_, row_, begin);
    // Two threads share a byte of bits. The product has bit i of four as the sign of byte i; no two of its terms meet.
    const auto thread = static_cast<int>(threadIdx.x), place = 4 * thread % 8;
    const uint32_t four = 15u << place, to_signs = 0x10204080u >> place;
    const auto* without = reinterpret_cast<const uint8_t*>(memory_.without) + thread / 2;
#pragma unroll 1
    for (int first = 4 * thread; first < columns; first += kTurn * kAhead, without += kTurn * kAhead / 8) {
      typename Source::Loaded loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool some = kTurn * i < there - first;
        loaded[i] = some ? source.load(op_, first + kTurn * i) : typename Source::Loaded{};
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (kTurn * i >= columns - first) break;
        uint32_t outliers = (without[kTurn / 8 * i] & four) * to_signs;
        if constexpr (ByRow) {
          float x[4];
          Source::numbers(loaded[i], x);
#pragma unroll
          for (int j = 0; j < 4; ++j) outliers |= (reaches(op_, x[j]) ? 128u : 0u) << 8 * j;
        }
        fn(first + kTurn * i, loaded[i], outliers);
      }
    }
  }

  // With a step of its own a row needs no Clamp: |x| <= peak, so that x * (127 / peak), rounded twice, is below
  // 127 * (1 + 2^-22), which rounds to 127. What is larger, or no number, has no code.
  template <bool Clamp>
  BITFOLD_DEVICE void write_part(int part, bool rounds, float inverse) {
    if (op_.parts > 1) find_outliers(part);
    int sum = 0;
    const uint32_t bytes = rounds ? ~0u : 0u;
    int8_t* codes = op_.x_codes + row_ * op_.stride + part * kPartColumns;
    each_four(part, op_.stride, [&](int column, const typename Source::Loaded& loaded, uint32_t outliers) {
      float x[4];
      Source::numbers(loaded, x);
      uint32_t even[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Adding 1.5 2^23 rounds to even, and leaves the code in the low byte.
        const float code = ptx::mul(x[i], inverse);
        even[i] = ptx::float_as_uint(ptx::add(Clamp ? smaller(larger(code, -127.0f), 127.0f) : code, 0x1.8p23f));
      }
      const uint32_t low = ptx::prmt(even[0], even[1], 0x0040), high = ptx::prmt(even[2], even[3], 0x0040);
      const uint32_t none = ptx::prmt(outliers, 0, 0xba98);
      const uint32_t four = ptx::prmt(low, high, 0x5410) & ~none & bytes;
      sum = ptx::dp4a(static_cast<int>(four), 0x01010101, sum);
      *reinterpret_cast<uint32_t*>(codes + column) = four;
    });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::lane_id() == 0) ptx::atomic_add(&memory_.sum, sum);
    ptx::sync_block();
    if (threadIdx.x == 0) {
      op_.sums[row_ * op_.parts + part] = memory_.sum;
      memory_.sum = 0;
    }
  }

  const Int8Op& op_;
  RoundMemory& memory_;
  const int64_t row_;
};

BITFOLD_DEVICE void round_row(const Int8Op& op, int64_t row) {
  auto& memory = shared<RoundMemory>();
  if (threadIdx.x == 0) memory.largest = memory.all = 0, memory.sum = 0;  // find_outliers begins with a barrier
  with_source(op, [&]<class Source>() {
    if (op.finds && op.per_row) Row<Source, true>(op, memory, row).round();
    else Row<Source, false>(op, memory, row).round();
  });
}

// ---- the list of outliers, and their columns ----

struct ListMemory {
  int before;
  uint32_t words[kStripWords];
};

BITFOLD_DEVICE uint32_t loose(const Int8Op& op, int64_t word) { return reached(op, word) & ~copied(op, word); }

// Line i of a table: the numbers of W, and those of x, of which there are `part` of `parts`.
template <class W>
BITFOLD_DEVICE void write_rows(const Int8Op& op, const Int8Table& table, int i, const W& w) {
  float* to_w = table.w + i * op.table_rows;
#pragma unroll 8
  for (int64_t row = static_cast<int>(threadIdx.x); row < op.n; row += kThreads) to_w[row] = w(row);
}
template <class X>
BITFOLD_DEVICE void write_tokens(const Int8Op& op, const Int8Table& table, int i, int part, int parts, const X& x) {
  const auto thread = static_cast<int>(threadIdx.x);
  float* to_x = table.x + i * op.table_tokens;
  const int64_t tokens = op.x.rows * (part + 1) / parts;
#pragma unroll 4
  for (int64_t row = op.x.rows * part / parts + thread; row < tokens; row += kThreads) to_x[row] = x(row);
}

// A strip's; `lister` of kListers has its share of the rows of W and x.
BITFOLD_DEVICE void list_strip(const Int8Op& op, int64_t strip, int lister) {
  auto& memory = shared<ListMemory>();
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t first = strip * kStripWords;
  if (thread == 0) memory.before = 0;
  ptx::sync_block();
  int mine = 0;
#pragma unroll 2
  for (int64_t word = thread; word < first; word += kThreads) mine += ptx::popc(loose(op, word));
  if (mine > 0) ptx::atomic_add(&memory.before, mine);
  if (thread < kStripWords) memory.words[thread] = loose(op, first + thread);
  ptx::sync_block();
  int at = memory.before;
  constexpr int kPieceWords = kInt8Piece / 32;
  if (lister == 0 && thread < kStripWords / kPieceWords) {
    const uint32_t* words = memory.words + kPieceWords * thread;
    int before = at;
    for (const uint32_t* word = memory.words; word < words; ++word) before += ptx::popc(*word);
    op.found[first / kPieceWords + thread] = {static_cast<uint32_t>(before), {words[0], words[1]}, 0};
  }
  bool huge = false;
  for (int i = 0; i < kStripWords; ++i) {
    for (uint32_t bits = memory.words[i]; bits != 0; bits &= bits - 1, ++at) {
      const int64_t column = 32 * (first + i) + 31 - ptx::clz(bits & (0u - bits));
      if (thread == 0 && lister == 0) op.outliers[at] = static_cast<int32_t>(column);
      if (at >= op.loose.lines) continue;
      write_tokens(op, op.loose, at, lister, kListers, [&](int64_t row) {
        const float number = int8_outlier(op, row, column);
        huge = huge || magnitude(number) >= 0x1p120f;
        return number;
      });
    }
  }
  if (huge) ptx::atomic_or(op.loose_huge, 1u);
  if (thread == 0 && lister == 0 && first + kStripWords == op.words) *op.outlier_count = at;
}

// Columns with a copy, every one of them by one of `blocks` blocks.
BITFOLD_DEVICE void write_copies(const Int8Op& op, int block, int blocks) {
  const auto* copy = static_cast<const uint16_t*>(op.copy.data);
  const bool half = op.copy.dtype == DType::F16;
  for (int i = block; i < smaller(op.copies, op.exact.lines); i += blocks) {
    const auto weight = [&](int64_t row) {
      const uint16_t bits = ptx::load2(copy + row * op.copies + i);
      return half ? half_to_float(bits) : bf16_to_float(bits);
    };
    write_rows(op, op.exact, i, weight);
    write_tokens(op, op.exact, i, 0, 1, [&](int64_t row) { return int8_x(op, row, op.columns[i]); });
  }
}

// One kernel for both steps, which `marks` chooses from. Rows have the first blocks, since they take longer than lists.
__global__ void __launch_bounds__(kThreads, 2) int8_round_kernel(const Int8Op op, bool marks, unsigned listing) {
  ptx::wait_for_earlier();
  ptx::let_later_begin();
  if (marks) return mark(op);
  const unsigned turned = blockIdx.x + listing, place = turned < gridDim.x ? turned : turned - gridDim.x;
  if (place >= listing) return round_row(op, place - listing);
  if (op.finds) list_strip(op, place / kListers, static_cast<int>(place % kListers));
  write_copies(op, static_cast<int>(place), static_cast<int>(listing));
}

}  // namespace

void int8_mark(const Int8Op& op, Stream stream) {
  launch({.grid = dim3(static_cast<unsigned>(op.words / kStripWords), static_cast<unsigned>(op.flag_parts)),
          .block = kMarkThreads,
          .shared_bytes = sizeof(MarkMemory),
          .name = "int8_mark",
          .stream = stream,
          .early = gpu().early},
         int8_round_kernel, op, true, 0u);
}

void int8_round(const Int8Op& op, Stream stream) {
  const auto listing = static_cast<unsigned>(op.finds || op.copies > 0 ? op.words / kStripWords * kListers : 0);
  launch({.grid = static_cast<unsigned>(op.x.rows) + listing,
          .block = kThreads,
          .shared_bytes = larger(sizeof(RoundMemory), sizeof(ListMemory)),
          .name = "int8_round",
          .stream = stream,
          .early = gpu().early},
         int8_round_kernel, op, false, listing);
}

}  // namespace bitfold::cuda
