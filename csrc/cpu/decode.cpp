// Decoding to a matrix of floats, whole or by row numbers (an embedding).
#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"

namespace bitfold::cpu {

void decode(const DecodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t row_bytes = w.k * dtype_bytes(args.dtype);
  cut(args.parallel_for, args.rows, grain_rows(w.k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(args.dtype == DType::F32 ? 0 : w.k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = args.ids != nullptr ? args.ids[i] : i;
      auto* out = static_cast<char*>(args.out) + i * row_bytes;
      if (args.dtype == DType::F32) {
        decode_row(kernels, w, from, 0, w.k, reinterpret_cast<float*>(out));
      } else {
        decode_row(kernels, w, from, 0, w.k, row.data());
        kernels.from_float(row.data(), w.k, args.dtype, out);
      }
    }
  });
}

}  // namespace bitfold::cpu
