// The way out of kernels with tiles (linear_tile.cu, linear_wgmma.hpp): sums that have met in shared memory, those of
// several ranges of k in memory, become y.
#pragma once

#include "cuda/tile.hpp"

namespace bitfold::cuda {

inline constexpr int kSumsBarrier = 1;

// Of the first Threads threads of the block, which have its sums, of Rows rows. Tokens: of the block, or 0 where the
// shape says.
template <int Tokens, int Rows = kTileRows, int Threads = kTileThreads>
class TileSums {
 public:
  // memory: the block's, but what others may still look at; first_group: of 8 tokens.
  BITFOLD_DEVICE TileSums(const TileParameter& p, uint8_t* memory, int first_group)
      : p_(p), memory_(memory), row0_(int64_t{blockIdx.x} * Rows), group0_(first_group) {}

  // put(out) writes the block's sums to out[token * out_stride(Rows) + row] and comes back when all are there.
  template <class Put>
  BITFOLD_DEVICE void finish(const Put& put_sums) const {
    auto* out = reinterpret_cast<float*>(memory_);
    sync();  // all copies have arrived, and all stages were looked at
    put_sums(out);
    constexpr int kQuads = Rows / 4;
    const int count = static_cast<int>(smaller<int64_t>(tokens(), p_.m - int64_t{group0_} * 8)) * kQuads;
    const auto sums = [&](int i) {
      return reinterpret_cast<const float4*>(out + i / kQuads * out_stride(Rows))[i % kQuads];
    };
    if (p_.shape.splits == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) put(sums(i), i / kQuads, i % kQuads * 4);
      return;
    }
    const int size = tokens() * Rows;
    const auto block = static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x);
    float* partial = p_.partial + int64_t{block} * p_.shape.splits * size;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) {
      reinterpret_cast<float4*>(partial + int64_t{blockIdx.y} * size)[i] = sums(i);
    }
    ptx::fence();
    sync();  // all sums are written before the block counts, and nobody looks at `out` any more
    auto& arrived = *reinterpret_cast<uint32_t*>(memory_);
    if (threadIdx.x == 0) arrived = ptx::atomic_add(p_.arrivals + block, 1u);
    sync();
    if (arrived != static_cast<uint32_t>(p_.shape.splits) - 1) return;
    ptx::fence();
    // The last to come adds all of them, in their order.
    for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) {
      float4 sum = ptx::load_written16(partial + i * 4);
      for (int s = 1; s < p_.shape.splits; ++s) {
        const float4 more = ptx::load_written16(partial + int64_t{s} * size + i * 4);
        sum.x = ptx::add(sum.x, more.x), sum.y = ptx::add(sum.y, more.y);
        sum.z = ptx::add(sum.z, more.z), sum.w = ptx::add(sum.w, more.w);
      }
      put(sum, i / kQuads, i % kQuads * 4);
    }
  }

 private:
  BITFOLD_DEVICE int tokens() const {
    if constexpr (Tokens > 0) return Tokens;
    else return p_.shape.tokens;
  }
  // Those who have sums: the whole block, or all of it but the warpgroup that copies.
  BITFOLD_DEVICE static void sync() {
    if constexpr (Tokens > 0) ptx::sync_block();
    else ptx::bar_sync(kSumsBarrier, Threads);
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
      float value = ptx::mul(ptx::mul(ptx::add(sums[i], sums[i]), p_.unit), factor);
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
