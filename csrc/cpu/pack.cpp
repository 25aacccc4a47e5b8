// Logical codes and zeros <-> their bit streams, a row at a time.
#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "formats/bitstream.hpp"

namespace bitfold::cpu {
namespace {

template <class RowFn>
void each_row(const PackArgs& args, RowFn fn) {
  const FormatRow& info = args.format.info();
  const bool flat = args.layout == Layout::Flat;
  const int64_t rows = flat ? 1 : args.n, columns = flat ? args.n * args.k : args.k;
  cut(args.parallel_for, rows, grain_rows(columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      fn(args.codes + row * columns, columns, info.high_first,
         args.packed_codes + row * ceil_div(columns * info.bits, 8));
    }
  });
  if (args.zeros == nullptr) return;
  const int64_t groups = groups_in_row(args.format, columns);
  for (int64_t row = 0; row < (args.format.group == kPerTensor ? 1 : rows); ++row) {
    fn(args.zeros + row * groups, groups, false, args.packed_zeros + row * ceil_div(groups * info.bits, 8));
  }
}

}  // namespace

void pack(const PackArgs& args) {
  each_row(args, [&](uint8_t* codes, int64_t count, bool high_first, uint8_t* packed) {
    pack_codes(codes, count, args.format.bits(), high_first, packed);
  });
}

void unpack(const PackArgs& args) {
  each_row(args, [&](uint8_t* codes, int64_t count, bool high_first, uint8_t* packed) {
    unpack_codes(packed, count, args.format.bits(), high_first, codes);
  });
}

}  // namespace bitfold::cpu
