// Decoding to a matrix of floats, whole or by row numbers (an embedding).
//
// A plain store reads the line that it writes. Where the output is larger than what a core's own caches hold, it
// goes past them instead, which spares that reading; unless its pages are new, for those were cleared a moment before
// and lie in the caches.
#include <algorithm>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "cpu/pages.hpp"

namespace bitfold::cpu {
namespace {

// Columns that are decoded to fp32 at a time on their way to another type.
constexpr int64_t kColumns = 1024;

}  // namespace

void decode(const DecodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t size = dtype_bytes(args.dtype), row_bytes = w.k * size;
  const bool large = args.rows * row_bytes >= kLargeBytes;
  const int64_t piece = large ? std::max<int64_t>(1, kPieceBytes / row_bytes) : args.rows;
  cut(args.parallel_for, args.rows, grain_rows(w.k), [&](int64_t begin, int64_t end) {
    Buffer<float> columns(args.dtype == DType::F32 ? 0 : kColumns);
    const auto decode_to = [&](int64_t row, char* out, Stores stores) {
      if (args.dtype == DType::F32) {
        decode_row(kernels, w, row, 0, w.k, reinterpret_cast<float*>(out), stores);
        return;
      }
      const auto from_float = stores == Stores::Cached ? kernels.from_float : kernels.stream_from_float;
      for (int64_t c = 0; c < w.k; c += kColumns) {
        const int64_t stop = std::min(w.k, c + kColumns);
        decode_row(kernels, w, row, c, stop, columns.data());
        from_float(columns.data(), stop - c, args.dtype, out + c * size);
      }
    };
    for (int64_t first = begin; first < end; first += piece) {
      const int64_t last = std::min(end, first + piece);
      auto* out = static_cast<char*>(args.out) + first * row_bytes;
      const bool past = large && !fetch_pages(out, (last - first) * row_bytes);
      for (int64_t i = first; i < last; ++i, out += row_bytes) {
        decode_to(args.ids != nullptr ? args.ids[i] : i, out, past ? Stores::PastCaches : Stores::Cached);
      }
    }
    if (large) kernels.drain();
  });
}

}  // namespace bitfold::cpu
