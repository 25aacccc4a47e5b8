// The tile kernel's way out (linear_tile.cu): the warps' sums meet in shared memory, those of several ranges of k in
// memory, and become y.
#pragma once

#include "cuda/tile.hpp"

namespace bitfold::cuda {

template <int Tokens>
class TileSums {
  static constexpr int kGroups = Tokens / 8;

 public:
  // memory: all of the block's, which nobody looks at any more; first_group: of 8 tokens.
  BITFOLD_DEVICE TileSums(const TileParameter& p, uint8_t* memory, int first_group)
      : p_(p), memory_(memory), row0_(int64_t{blockIdx.x} * kTileRows), group0_(first_group) {}

  BITFOLD_DEVICE void finish(const float (&warp_sums)[kTiles][kGroups][4]) const {
    auto* out = reinterpret_cast<float*>(memory_);
    ptx::sync_block();  // all copies have arrived, and all stages were looked at
    for (int turn = 0; turn < kColumnWarps; ++turn) {
      if (turn == ptx::warp_id() / kRowWarps) put_sums(out, warp_sums, turn > 0);
      ptx::sync_block();
    }
    constexpr int kQuads = kTileRows / 4;
    const int count = static_cast<int>(smaller<int64_t>(Tokens, p_.m - int64_t{group0_} * 8)) * kQuads;
    const auto sums = [&](int i) { return reinterpret_cast<const float4*>(out + i / kQuads * kOutStride)[i % kQuads]; };
    if (p_.shape.splits == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads)
        put(sums(i), i / kQuads, i % kQuads * 4);
      return;
    }
    constexpr int kSize = Tokens * kTileRows;
    const auto block = static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x);
    float* partial = p_.partial + int64_t{block} * p_.shape.splits * kSize;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      reinterpret_cast<float4*>(partial + int64_t{blockIdx.y} * kSize)[i] = sums(i);
    }
    ptx::fence();
    ptx::sync_block();  // all sums are written before the block counts, and nobody looks at `out` any more
    auto& arrived = *reinterpret_cast<uint32_t*>(memory_);
    if (threadIdx.x == 0) arrived = ptx::atomic_add(p_.arrivals + block, 1u);
    ptx::sync_block();
    if (arrived != static_cast<uint32_t>(p_.shape.splits) - 1) return;
    ptx::fence();
    // The last to come adds all of them, in their order.
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTileThreads) {
      float4 sum = ptx::load_written16(partial + i * 4);
      for (int s = 1; s < p_.shape.splits; ++s) {
        const float4 more = ptx::load_written16(partial + int64_t{s} * kSize + i * 4);
        sum.x = ptx::add(sum.x, more.x), sum.y = ptx::add(sum.y, more.y);
        sum.z = ptx::add(sum.z, more.z), sum.w = ptx::add(sum.w, more.w);
      }
      put(sum, i / kQuads, i % kQuads * 4);
    }
  }

 private:
  BITFOLD_DEVICE static void put_sums(float* out, const float (&sums)[kTiles][kGroups][4], bool add) {
    const int lane = ptx::lane_id(), row_warp = ptx::warp_id() % kRowWarps;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + lane % 4 * 2 + i % 2;
          const int row = 16 * (row_warp * kTiles + r) + lane / 4 + 8 * (i / 2);
          float& place = out[token * kOutStride + row];
          place = add ? ptx::add(place, sums[r][j][i]) : sums[r][j][i];
        }
      }
    }
  }

  // Four rows of W and one token.
  BITFOLD_DEVICE void put(const float4& sum, int block_token, int block_row) const {
    const int64_t token = int64_t{group0_} * 8 + block_token, row = row0_ + block_row;
    const float factor = p_.factors[token];
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    const auto* bias = static_cast<const uint16_t*>(p_.bias);
    uint16_t* y = static_cast<uint16_t*>(p_.y) + token * p_.n + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i >= p_.n) return;
      // Twice, and the rest of the power of two: neither overflows where the result doesn't.
      float value = ptx::mul(ptx::add(sums[i], sums[i]), factor);
      const bool half = p_.dtype == DType::F16;
      if (bias != nullptr) {
        const uint16_t bits = ptx::load2(bias + row + i);
        value = ptx::add(value, half ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits));
      }
      y[i] = half ? ptx::float_to_half(value) : ptx::float_to_bf16(value);
    }
  }

  const TileParameter& p_;
  uint8_t* const memory_;
  const int64_t row0_;
  const int group0_;
};

}  // namespace bitfold::cuda
