// y = x W^T + bias for m <= 8 rows of x: how rows_kernel.hpp is cut, by what is multiplied and the GPU, and its start.
//
// Compiled once for each format, and once for what its kernels don't fit (BITFOLD_PART).
#include <stdexcept>

#include "cuda/fragments_chunks.hpp"
#include "cuda/fragments_k.hpp"
#include "cuda/fragments_ragged.hpp"
#include "cuda/linear_rows.hpp"
#include "cuda/plan.hpp"
#include "cuda/rows_kernel.hpp"

namespace bitfold::cuda {
namespace rows {
namespace {

// How many pieces a warp has room for: all but one of them are on their way while it multiplies. In flight for a
// multiprocessor should be more than the 32 KB that come in the microsecond that memory takes to answer.
constexpr int kRooms[] = {4, 3};  // or 2
constexpr int64_t kInFlight = 78 << 10;

// Bytes of shared memory beside x, with so many rooms of each warp.
template <class Source>
constexpr int64_t bytes_beside_x(int64_t rooms) {
  return static_cast<int64_t>(sizeof(Memory<Source>)) + kWarps * rooms * kRoomBytes<Source>;
}
constexpr int64_t kFewestRooms = 2, kFewestKept = 2;  // of a warp; slices of x that a block keeps, if not all

// What a slice of x, of 8 tokens, may have.
template <class Source>
int64_t bytes_of_slice() {
  constexpr int64_t kSliceBytes = 32 << 10;
  constexpr int64_t kLongest = kSliceBytes / (kTokens * Tokens<Source>::kPieceBytes);
  static_assert(kLongest <= Tokens<Source>::kTogether * Tokens<Source>::kTurn, "a lane has room for a slice's x");
  if constexpr (Source::kHead > 0) static_assert(kLongest <= Source::kHeadPieces, "and for what is copied once");
  return smaller(kSliceBytes, (gpu().shared_bytes - bytes_beside_x<Source>(kFewestRooms)) / kFewestKept);
}
// A block has at least these bytes, with slices of a piece each; narrower pieces leave more room.
template <class Source>
constexpr int64_t kLeastBytes =
    bytes_beside_x<Source>(kFewestRooms) + kFewestKept * kTokens * Tokens<Source>::kPieceBytes;
template <class Source>
bool has_room() {
  return gpu().shared_bytes >= kLeastBytes<Source>;
}

// How k is cut, by n, k and the GPU's shared memory: so that 8 tokens of a slice have room beside the rings, and so
// that there are some thousand units.
template <class Source>
int slices_log2(int64_t n, int64_t pieces) {
  constexpr int64_t kUnits = 8192, kMost = 4;
  const int64_t most = bytes_of_slice<Source>();
  const auto bytes = [&](int log2) {
    return (ceil_div<int64_t>(pieces, int64_t{1} << log2)) * kTokens * Tokens<Source>::kPieceBytes;
  };
  int log2 = 0;
  while (int64_t{2} << log2 <= pieces &&
         (bytes(log2) > most || (log2 < kMost && ceil_div<int64_t>(n, 16) << log2 < kUnits))) {
    ++log2;
  }
  return log2;
}

template <class Source>
void launch_rows(const RowsCall& call) {
  if (!has_room<Source>()) throw std::runtime_error("linear_rows: this GPU has too little shared memory");
  const LinearArgs& a = call.args;
  const Gpu& device = gpu();
  const int64_t pieces = ceil_div<int64_t>(a.w.k, Source::kColumns), tiles = ceil_div<int64_t>(a.w.n, 16);
  const int log2 = slices_log2<Source>(a.w.n, pieces);
  const int64_t slices = int64_t{1} << log2, longest = ceil_div<int64_t>(pieces, slices), m = a.x.rows;
  const int64_t slice_bytes = longest * m * Tokens<Source>::kPieceBytes;
  constexpr int64_t kRoundBytes = 16 << 10;
  const auto fixed = bytes_beside_x<Source>;
  const int64_t turn = larger<int64_t>(slices, kWarps), unit_bytes = 16 * m * 4;
  const int64_t turns = larger<int64_t>(smaller<int64_t>(kRoundBytes / (turn * unit_bytes), 4), 1) * turn;
  const bool whole =
      slices <= kSlices && fixed(kFewestRooms) + slices * slice_bytes + turns * unit_bytes <= device.shared_bytes;
  if (call.wanted != nullptr) {
    *call.wanted = whole ? 0 : slices * m * tiles * 16 * 4;
    return;
  }
  const int64_t kept = whole ? slices : kFewestKept;
  const int64_t round = whole ? turns : 0;
  const int64_t others = kept * slice_bytes + round * unit_bytes;
  int64_t rooms = kFewestRooms;
  for (const int64_t more : kRooms) {
    const bool fits = fixed(more) + others <= device.shared_bytes;
    if (more > rooms && fits && kWarps * (more - 1) * Source::kRoom <= kInFlight) rooms = more;
  }
  const bool aligned = a.x.column_stride == 1 && (a.x.row_stride % 8 == 0 || a.x.rows == 1) &&
                       a.w.k % Source::kColumns == 0 && reinterpret_cast<uintptr_t>(a.x.data) % 16 == 0;
  // Where a turn of 16 units is more than two slices, a block has one.
  const int64_t blocks = whole            ? smaller<int64_t>(tiles, device.multiprocessors)
                         : tiles < kWarps ? slices
                                          : smaller<int64_t>(slices * tiles / kWarps, device.multiprocessors);
  const int64_t shares = whole ? tiles : slices * tiles;
  const Args<Source> args{
      .w = Source::matrix(a.w),
      .x = {static_cast<const uint16_t*>(a.x.data), a.x.row_stride, a.x.column_stride, a.w.k,
            static_cast<int>(a.x.rows), a.x.dtype == DType::BF16, aligned},
      .bias = static_cast<const uint16_t*>(a.bias),
      .y = static_cast<uint16_t*>(a.y),
      .partials = whole ? nullptr : static_cast<float*>(call.workspace),
      .n = a.w.n,
      .tiles = static_cast<int>(tiles),
      .pieces = static_cast<int>(pieces),
      .slices_log2 = log2,
      .longest = static_cast<int>(longest),
      .kept = static_cast<int>(kept),
      .each = static_cast<int>(shares / blocks),
      .more = static_cast<int>(shares % blocks),
      .round = static_cast<int>(round),
      .rooms = static_cast<int>(rooms),
      .unit = Source::kUnit / codebook_up(a.w.format.row),
  };
  launch({.grid = static_cast<unsigned>(blocks),
          .block = kThreads,
          .shared_bytes = fixed(rooms) + others,
          .name = "linear_rows",
          .stream = call.stream,
          .early = device.early && Source::kRoom > 0},  // without copies W is read as what nobody writes
         linear_rows_kernel<Source>, args);
  if (!whole) {
    rows_sums({args.partials, args.bias, args.y, m, a.w.n, tiles * 16, static_cast<int>(slices), args.x.bf16},
              call.stream);
  }
}

// The one kernel of blocks, or of what fits no other.
template <class Source>
void launch_one(const RowsCall& call) {
  static_assert(kLeastBytes<Source> <= rows_shared_bytes(BITFOLD_PART), "the plan promises that there is room");
  launch_rows<Source>(call);
}

// The kernels of a format with planes, the widest pieces first: their columns, and the groups in them.
template <int Columns, int Sections>
struct Pieces {};
template <class... Widest>
struct Choice {};

template <int Row>
struct KernelsOf : Choice<Pieces<128, 1>, Pieces<64, 1>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt4> : Choice<Pieces<256, 2>, Pieces<128, 1>, Pieces<128, 2>, Pieces<128, 4>, Pieces<32, 1>> {};
template <>
struct KernelsOf<kInt3> : Choice<Pieces<64, 1>> {};
template <>
struct KernelsOf<kInt2> : Choice<Pieces<128, 1>, Pieces<128, 2>> {};
template <>
struct KernelsOf<kNf4> : Choice<Pieces<256, 4>, Pieces<128, 2>, Pieces<32, 1>> {};

template <int Row, int Columns, int Sections>
bool launch_where_it_fits(const RowsCall& call, Pieces<Columns, Sections>) {
  using Source = PlaneFragments<Row, Columns, Sections>;
  if (!Source::fits(call.args.w) || !has_room<Source>()) return false;
  launch_rows<Source>(call);
  return true;
}

template <int Row, class... Widest>
void launch_widest(const RowsCall& call, Choice<Widest...>) {
  const bool launched = (... || launch_where_it_fits<Row>(call, Widest{}));
  if (!launched) linear_rows_of<kRagged>(call);
}

}  // namespace
}  // namespace rows

template <>
void linear_rows_of<BITFOLD_PART>(const RowsCall& call) {
  constexpr int kRow = BITFOLD_PART;
  if constexpr (kRow == kRagged) rows::launch_one<RaggedFragments>(call);
  else if constexpr ((kRow >= kQ2K && kRow <= kQ6K) || kRow == kIq4Xs) rows::launch_one<KFragments<kRow>>(call);
  else if constexpr (kRow >= kQ4_0) rows::launch_one<ChunkFragments<kRow>>(call);
  else rows::launch_widest<kRow>(call, rows::KernelsOf<kRow>());
}

}  // namespace bitfold::cuda
