// Tensor cores. Twin: gpu/ptx_mma.hpp, which says what each register holds.
//
// Sums of floats are cut off as tensor cores do (tensor_core.hpp): exact where those of small whole numbers are.
#pragma once

#include <cstdint>

#include "cuda/emulator/device.hpp"

namespace bitfold::cuda::ptx {

using emulator::Where;

BITFOLD_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared, const Where& where = Where::current()) {
  emulator::ldmatrix(r, 4, false, shared, where);
}
BITFOLD_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, const Where& where = Where::current()) {
  emulator::ldmatrix(r, 4, true, shared, where);
}
BITFOLD_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared, const Where& where = Where::current()) {
  emulator::ldmatrix(r, 2, false, shared, where);
}
BITFOLD_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, const Where& where = Where::current()) {
  emulator::ldmatrix(r, 2, true, shared, where);
}

BITFOLD_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::F16, d, a, b, false, where);
}
BITFOLD_DEVICE void mma_f16_zero(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::F16, d, a, b, true, where);
}
BITFOLD_DEVICE void mma_f16_from(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                 const Where& where = Where::current()) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  emulator::mma(emulator::Operands::F16, d, a, b, false, where);
}
BITFOLD_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::Bf16, d, a, b, false, where);
}
BITFOLD_DEVICE void mma_bf16_zero(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::Bf16, d, a, b, true, where);
}
BITFOLD_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::S8, d, a, b, false, where);
}
BITFOLD_DEVICE void mma_s8_zero(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::S8, d, a, b, true, where);
}
BITFOLD_DEVICE void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const Where& where = Where::current()) {
  emulator::mma(emulator::Operands::U8S8, d, a, b, false, where);
}

}  // namespace bitfold::cuda::ptx
