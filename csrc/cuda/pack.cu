// Logical codes and zeros <-> their bit streams: eight codes, which are whole bytes, a thread.
#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
#include "formats/bitstream.hpp"

namespace bitfold::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCodes = 8;

struct Streams {
  uint8_t* codes;   // [rows, columns], one a byte
  uint8_t* packed;  // [rows, ceil(columns * bits / 8)]
  int64_t rows, columns;
  int bits;
  bool high_first;
};

enum class Direction : uint8_t { Pack, Unpack };

__global__ void __launch_bounds__(kThreads) pack_kernel(const Streams s, Direction to) {
  const int64_t pieces = ceil_div<int64_t>(s.columns, kCodes);
  const int64_t i = blockIdx.x * int64_t{kThreads} + static_cast<int64_t>(threadIdx.x);
  if (i >= s.rows * pieces) return;
  const int64_t row = i / pieces, piece = i % pieces;
  uint8_t* codes = s.codes + row * s.columns + piece * kCodes;
  uint8_t* packed = s.packed + row * ceil_div<int64_t>(s.columns * s.bits, 8) + piece * s.bits;
  const int64_t count = smaller<int64_t>(kCodes, s.columns - piece * kCodes);
  if (to == Direction::Pack) pack_codes(codes, count, s.bits, s.high_first, packed);
  else unpack_codes(packed, count, s.bits, s.high_first, codes);
}

void run(const Streams& s, Direction to, Stream stream) {
  const int64_t pieces = s.rows * ceil_div<int64_t>(s.columns, kCodes);
  if (pieces == 0) return;
  launch({.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(pieces, kThreads))),
          .block = dim3(kThreads),
          .shared_bytes = 0,
          .name = to == Direction::Pack ? "pack" : "unpack",
          .stream = stream},
         pack_kernel, s, to);
}

void run(const PackArgs& args, Direction to, Stream stream) {
  const FormatRow& info = args.format.info();
  const bool flat = args.layout == Layout::Flat;
  const int64_t rows = flat ? 1 : args.n, columns = flat ? args.n * args.k : args.k;
  run(Streams{args.codes, args.packed_codes, rows, columns, info.bits, info.high_first}, to, stream);
  if (args.zeros == nullptr) return;
  run(Streams{args.zeros, args.packed_zeros, args.format.group == kPerTensor ? 1 : rows,
              groups_in_row(args.format, columns), info.bits, false},
      to, stream);
}

}  // namespace

void pack(const PackArgs& args, Stream stream) { run(args, Direction::Pack, stream); }
void unpack(const PackArgs& args, Stream stream) { run(args, Direction::Unpack, stream); }

}  // namespace bitfold::cuda
