// wgmma: products of matrices by a warpgroup, four warps of which the first is a multiple of 4, that go on while its
// threads do. Hopper's (sm_90a) alone: where a kernel is compiled for another GPU, a call traps. Twin:
// emulator/ptx_wgmma.hpp.
//
// From "Parallel Thread Execution ISA" (9.0), chapter "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions"; tests/cuda/gpu_instructions.cu holds it against a GPU:
//   "Register fragments" (m64nNk16): warp w of the warpgroup has rows 16 w ... 16 w + 15, with g and t of ptx_mma.hpp.
//     A, 64 x 16 halves: register r as in mma's A of 16 x 16: row g + 8 (r & 1), columns 2t and 2t + 1, + 8 (r >> 1)
//     D, 64 x N: register 4 j + r holds row g + 8 (r >> 1), column 8 j + 2t + (r & 1)
//   "Shared memory matrix layout", "Strides", "Canonical layouts", K-major without swizzle, ((8,m),(T,2k)):((1T,SBO),
//     (1,LBO)) with T = 8 halves: B, N columns of 16 k, is made of core matrices of 8 columns by 8 k, each 128 bytes on
//     end: 16 for each column. The leading offset leads to the next 8 k, the stride offset to the next 8 columns.
//     Column c, row k: start + c / 8 * stride + k / 8 * leading + c % 8 * 16 + k % 8 * 2. (The document's own example,
//     of tf32: 16 rows by 16, LBO 256 bytes between halves of k, SBO 128 bytes between halves of the rows.)
//   "Matrix descriptor": bits 0-13 the start, 16-29 the leading, 32-45 the stride offset, each (bytes & 0x3ffff) >> 4;
//     bits 49-51 (base offset) and 62-63 (swizzle) zero. All three are multiples of 16.
//   The same with "128-byte swizzle" (1 in bits 62-63), K-major: lines of 128 bytes on end, the leading offset means
//     nothing, the stride offset leads to the next eight lines; the address of 16 bytes has its bits 4-6 changed by
//     bits 7-9 (exclusive or), wherever in a line the matrix begins.
//   "wgmma.fence": before the first wgmma, and between a thread's access of registers (A or sums) and a wgmma that uses
//     them, unless that was a wgmma of the same shape that uses them as sums.
//   "wgmma.wait_group": until then neither the sums nor A's registers may be touched.
//     Where a kernel does so all the same ptxas puts waits in, or products one after another, and says so (C7510,
//     C7517, C7519; C7508 of registers_up in a kernel whose __launch_bounds__ lacks a number): `make cuda` takes that
//     for an error.
//   "Async proxy": B is read by the async proxy (fence_async()); when the end of a product has been waited for, what it
//     read may be overwritten.
#pragma once

#include <cstdint>

#include "cuda/gpu/ptx_memory.hpp"
#include "cuda/gpu/ptx_warp.hpp"

namespace bitfold::cuda::ptx {

// B in shared memory for wgmma, which may begin elsewhere: + bytes / 16.
BITFOLD_DEVICE uint64_t wgmma_matrix(const void* shared, int leading_bytes, int stride_bytes) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return field(shared_address(shared)) | field(static_cast<uint32_t>(leading_bytes)) << 16 |
         field(static_cast<uint32_t>(stride_bytes)) << 32;
}

// Lines of bytes that copy_box brought to a multiple of 1024: A's rows, or B's columns, of which a product has 32 bytes
// (16 halves); the next are 32 / 16 further.
BITFOLD_DEVICE uint64_t wgmma_box(const void* shared) {
  constexpr uint64_t kSwizzled128 = uint64_t{1} << 62;
  return kSwizzled128 | wgmma_matrix(shared, 16, 1024);
}

BITFOLD_DEVICE void wgmma_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  trap();
#endif
}

// The products since the last commit become a group; wait<N> waits until all but the newest N groups are done.
BITFOLD_DEVICE void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  trap();
#endif
}
template <int N>
BITFOLD_DEVICE void wgmma_wait() {
  static_assert(N >= 0 && N <= 7);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  trap();
#endif
}

// No instruction: the compiler neither reads nor writes these sums earlier than here, nor keeps others for them.
template <int Sums>
BITFOLD_DEVICE void wgmma_keep(float (&d)[Sums]) {
#pragma unroll
  for (int i = 0; i < Sums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int Sums>
BITFOLD_DEVICE void wgmma_keep(int (&d)[Sums]) {
#pragma unroll
  for (int i = 0; i < Sums; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// The same of A's registers, which products read until they have been waited for: nothing else lies in them so long.
template <int Steps>
BITFOLD_DEVICE void wgmma_keep(uint32_t (&a)[Steps][4]) {
#pragma unroll
  for (int s = 0; s < Steps; ++s)
    asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3])::"memory");
}

// d (64 x N) = a (64 x 16) b (16 x N), plus d where it accumulates.
template <int N>
BITFOLD_DEVICE void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// d (64 x N) = a (64 x 32, bytes without a sign) b (32 x N, bytes with one), plus d where it accumulates. Both lie in
// shared memory, A as B does: its rows are as B's columns. 16 bytes are as 8 halves.
template <int N>
BITFOLD_DEVICE void wgmma_u8s8(int (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BITFOLD_EIGHT_SUMS(i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
template <>
BITFOLD_DEVICE void wgmma_f16<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 0;\n"
      "}"
      : BITFOLD_EIGHT_SUMS(0), BITFOLD_EIGHT_SUMS(8), BITFOLD_EIGHT_SUMS(16), BITFOLD_EIGHT_SUMS(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
template <>
BITFOLD_DEVICE void wgmma_f16<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 0;\n"
      "}"
      : BITFOLD_EIGHT_SUMS(0), BITFOLD_EIGHT_SUMS(8), BITFOLD_EIGHT_SUMS(16), BITFOLD_EIGHT_SUMS(24),
        BITFOLD_EIGHT_SUMS(32), BITFOLD_EIGHT_SUMS(40), BITFOLD_EIGHT_SUMS(48), BITFOLD_EIGHT_SUMS(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef BITFOLD_EIGHT_SUMS
#define BITFOLD_EIGHT_INTS(i)                                                                                 \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
      "+r"(d[i + 7])
template <>
BITFOLD_DEVICE void wgmma_u8s8<64>(int (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, accumulate;\n"
      "}"
      : BITFOLD_EIGHT_INTS(0), BITFOLD_EIGHT_INTS(8), BITFOLD_EIGHT_INTS(16), BITFOLD_EIGHT_INTS(24)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
template <>
BITFOLD_DEVICE void wgmma_u8s8<128>(int (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, accumulate;\n"
      "}"
      : BITFOLD_EIGHT_INTS(0), BITFOLD_EIGHT_INTS(8), BITFOLD_EIGHT_INTS(16), BITFOLD_EIGHT_INTS(24),
        BITFOLD_EIGHT_INTS(32), BITFOLD_EIGHT_INTS(40), BITFOLD_EIGHT_INTS(48), BITFOLD_EIGHT_INTS(56)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
template <>
BITFOLD_DEVICE void wgmma_u8s8<256>(int (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.u8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, accumulate;\n"
      "}"
      : BITFOLD_EIGHT_INTS(0), BITFOLD_EIGHT_INTS(8), BITFOLD_EIGHT_INTS(16), BITFOLD_EIGHT_INTS(24),
        BITFOLD_EIGHT_INTS(32), BITFOLD_EIGHT_INTS(40), BITFOLD_EIGHT_INTS(48), BITFOLD_EIGHT_INTS(56),
        BITFOLD_EIGHT_INTS(64), BITFOLD_EIGHT_INTS(72), BITFOLD_EIGHT_INTS(80), BITFOLD_EIGHT_INTS(88),
        BITFOLD_EIGHT_INTS(96), BITFOLD_EIGHT_INTS(104), BITFOLD_EIGHT_INTS(112), BITFOLD_EIGHT_INTS(120)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef BITFOLD_EIGHT_INTS
#else
template <int N>
BITFOLD_DEVICE void wgmma_u8s8(int (&)[N / 2], uint64_t, uint64_t, bool) {
  static_assert(N == 64 || N == 128 || N == 256);
  trap();
}
template <int N>
BITFOLD_DEVICE void wgmma_f16(float (&)[N / 2], const uint32_t (&)[4], uint64_t, bool) {
  static_assert(N == 64 || N == 128);
  trap();
}
#endif

// ---- registers of a warpgroup's threads ("setmaxnreg"), 24 ... 256 by 8: up not to fewer and down not to more than it
// has; up waits until others of the block have given enough back ----

template <int Count>
BITFOLD_DEVICE void registers_up() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#else
  trap();
#endif
}
template <int Count>
BITFOLD_DEVICE void registers_down() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#else
  trap();
#endif
}

}  // namespace bitfold::cuda::ptx
