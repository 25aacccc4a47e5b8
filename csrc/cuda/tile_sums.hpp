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
    const int count = static_cast<int>(smaller<int64_t>(tokens(), p_.m - int64_t{group0_} * 8)) * kQuads;
    const auto sums = [&](int i) {
      return reinterpret_cast<const float4*>(out + i / kQuads * out_stride(Rows))[i % kQuads];
    };
    const auto thread = static_cast<int>(threadIdx.x);
    if (p_.shape.splits == 1) {
      write_all(count, [&](int first, float4(&sum)[kTogether]) {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (first + j * Threads < count) sum[j] = sums(first + j * Threads);
        }
      });
      return;
    }
    const int size = tokens() * Rows;
    const auto block = static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x);
    float* partial = p_.partial + int64_t{block} * p_.shape.splits * size;
    for (int i = thread; i < count; i += Threads) {
      reinterpret_cast<float4*>(partial + int64_t{blockIdx.y} * size)[i] = sums(i);
    }
    ptx::fence();
    sync();  // all sums are written before the block counts, and nobody looks at `out` any more
    auto& arrived = *reinterpret_cast<uint32_t*>(memory_);
    if (thread == 0) arrived = ptx::atomic_add(p_.arrivals + block, 1u);
    sync();
    if (arrived != static_cast<uint32_t>(p_.shape.splits) - 1) return;
    ptx::fence();
    // The last to come adds all of them, in their order.
    write_all(count, [&](int first, float4(&sum)[kTogether]) {
#pragma unroll 1
      for (int begin = 0; begin < p_.shape.splits; begin += kSplits) {
        float4 more[kSplits][kTogether];
        const auto each = [&](const auto& body) {
#pragma unroll
          for (int s = 0; s < kSplits; ++s) {
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
              if (begin + s < p_.shape.splits && first + j * Threads < count) body(s, j);
            }
          }
        };
        each([&](int s, int j) {
          more[s][j] = ptx::load_written16(partial + int64_t{begin + s} * size + (first + j * Threads) * 4);
        });
        each([&](int s, int j) { sum[j] = begin + s == 0 ? more[s][j] : sum_of(sum[j], more[s][j]); });
      }
    });
  }

 private:
  static constexpr int kQuads = Rows / 4;
  // Quads of sums, and ranges of k, that a thread asks for together: each may take a microsecond to come.
  static constexpr int kTogether = 4, kSplits = 2;

  BITFOLD_DEVICE int tokens() const {
    if constexpr (Tokens > 0) return Tokens;
    else return p_.shape.tokens;
  }
  // Those who have sums: the whole block, or all of it but the warpgroup that copies.
  BITFOLD_DEVICE static void sync() {
    if constexpr (Tokens > 0) ptx::sync_block();
    else ptx::bar_sync(kSumsBarrier, Threads);
  }
  BITFOLD_DEVICE static float4 sum_of(const float4& a, const float4& b) {
    return {ptx::add(a.x, b.x), ptx::add(a.y, b.y), ptx::add(a.z, b.z), ptx::add(a.w, b.w)};
  }

  // Of `count` quads of sums, four rows of W and one token, a thread's, of which get(first, sums) has some at a time.
  template <class Get>
  BITFOLD_DEVICE void write_all(int count, const Get& get) const {
    static_assert(Threads % kQuads == 0, "a thread has the same rows of all tokens");
    const auto thread = static_cast<int>(threadIdx.x);
    const int64_t row = row0_ + thread % kQuads * 4;
    const Bias bias(p_, row);
#pragma unroll 1
    for (int first = thread; first < count; first += kTogether * Threads) {
      float4 sum[kTogether];
      float factor[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = first + j * Threads;
        if (i < count) factor[j] = p_.factors[int64_t{group0_} * 8 + i / kQuads];
      }
      get(first, sum);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = first + j * Threads;
        if (i < count) write(sum[j], factor[j], bias, int64_t{group0_} * 8 + i / kQuads, row);
      }
    }
  }

  // Of four rows; zeros where there is none.
  struct Bias {
    bool there;
    float of[4];

    BITFOLD_DEVICE Bias(const TileParameter& p, int64_t row) : there(p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of[i] = 0.0f;
        if (!there || row + i >= p.n) continue;
        const uint16_t bits = ptx::load2(static_cast<const uint16_t*>(p.bias) + row + i);
        of[i] = p.dtype == DType::F16 ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits);
      }
    }
  };

  BITFOLD_DEVICE void write(const float4& sum, float factor, const Bias& bias, int64_t token, int64_t row) const {
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    uint16_t* y = static_cast<uint16_t*>(p_.y) + token * p_.n + row;
    uint16_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Twice, and the rest of the power of two: neither overflows where the result doesn't.
      float value = ptx::mul(ptx::mul(ptx::add(sums[i], sums[i]), p_.unit), factor);
      if (bias.there) value = ptx::add(value, bias.of[i]);
      bits[i] = p_.dtype == DType::F16 ? ptx::float_to_half(value) : ptx::float_to_bf16(value);
    }
    if (row + 4 <= p_.n && reinterpret_cast<uintptr_t>(y) % 8 == 0) {
      *reinterpret_cast<uint2*>(y) = {bits[0] | static_cast<uint32_t>(bits[1]) << 16,
                                      bits[2] | static_cast<uint32_t>(bits[3]) << 16};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < p_.n) y[i] = bits[i];
    }
  }

  const TileParameter& p_;
  uint8_t* const memory_;
  const int64_t row0_;
  const int group0_;
};

}  // namespace bitfold::cuda
