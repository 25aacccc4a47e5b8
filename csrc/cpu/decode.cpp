// Decoding to a matrix of floats, whole or by row numbers (an embedding).
#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitfold::cpu {
namespace {

// Fresh memory costs more than decoding into it while it comes in pages of 4 KB: asks for huge ones.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = int64_t{2} << 20;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  // Advice: where the kernel does not take it, the memory is as good as it was.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

void decode(const DecodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Weight& w = args.w;
  const int64_t row_bytes = w.k * dtype_bytes(args.dtype);
  prefer_huge_pages(args.out, args.rows * row_bytes);
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
