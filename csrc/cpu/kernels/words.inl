// Small batches of integers and codebooks: every packed weight is read once, decoded in registers, and multiplied with
// all rows of x there.
//
// Codes are taken as they lie: one load fills each lane with a word of consecutive codes (8 of 4 or 3 bits, 16 of 2, 4
// of 8), a shift brings the next code of every lane to the bottom, and one table lookup makes it a value. A vector thus
// holds columns that are a word apart, so x is arranged likewise, once for all rows of the weight.
//
// The sum of one output is: per chunk (one load), a vector of sums over the steps of a word; that times the lanes'
// scales goes to a vector of totals; the totals are added up last. This order does not depend on how many rows x has.
#include "cpu/kernels/runs.hpp"

namespace bitfold::cpu {
namespace {

// x: for each chunk and step the lanes of all `rows` rows, so that the multiplication reads on and on.
template <int Row>
void arrange(const float* x, int64_t k, int j, int rows, float* panel, float* sums) {
  using W = Words<Row>;
  int32_t numbers[kLanes];
  for (int l = 0; l < kLanes; ++l) numbers[l] = l * W::kSteps;
  const I lane = load_int(numbers);
  float* to = panel + j * kLanes;
  sums += j * kLanes;
  for (int64_t c = 0; c < k; c += W::kChunk) {
    float padded[W::kChunk];
    const float* from = x + c;
    if (k - c < W::kChunk) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, from, static_cast<size_t>(k - c) * sizeof(float));
      from = padded;
    }
    F sum = splat(0.0f);
    for (int step = 0; step < W::kSteps; ++step) {
      const F lanes = gather(from + W::column(step), lane);
      store(to, lanes);
      to += rows * kLanes;
      sum = add(sum, lanes);
    }
    store(sums, sum);
    sums += rows * kLanes;
  }
}

template <int Row>
void decode_tile(const Weight& w, int64_t first, int rows, int64_t begin, int64_t end, float* tile, float* scratch) {
  using W = Words<Row>;
  constexpr int kStride = kTileRows * kLanes;
  const W values;
  const Entries<Row> entries(w, begin, end);
  float* zeros = W::kInteger && w.zeros != nullptr ? scratch + entries.padded() : nullptr;
  const int64_t bytes = row_bytes<Row>(w);
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    // The rows of the next tile are asked for while these are decoded.
    const int64_t ahead = row + kTileRows < w.n ? kTileRows * bytes : 0;
    read_scales<Row>(w, row, entries, scratch);
    if (zeros != nullptr) read_zeros<Row>(w, row, entries, zeros);
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * bytes + begin * W::kBits / 8;
    Cursor<Row> at(entries, scratch, zeros, begin / W::kChunk);
    float* out = tile + r * kLanes;
    for (int64_t c = begin; c < end; c += W::kChunk) {
      uint8_t tail[W::kBytes];
      if (c + W::kChunk > w.k) {
        std::memset(tail, 0, sizeof(tail));
        std::memcpy(tail, codes, static_cast<size_t>(bytes - c * W::kBits / 8));
        codes = tail;
      }
      const I words = load_words<W::kBits>(codes);
      prefetch(codes + ahead);
      codes += W::kBytes;
      const F scale = spread(at.scales, entries.places);
      const F zero = W::kInteger && zeros != nullptr ? spread(at.zeros, entries.places) : splat(0.0f);
      unroll<W::kSteps>([&]<int Step>() {
        F value = values.template at<Step>(words);
        if constexpr (W::kInteger) value = add(value, zero);
        store(out + Step * kStride, mul(value, scale));
      });
      out += W::kSteps * kStride;
      at.next();
    }
  }
}

// As multiply (runs.hpp) wants it.
template <int Row, int M, int R>
[[gnu::noinline]] void multiply_chunks(const uint8_t* const (&rows)[R], int64_t count, int64_t ahead, const float* x,
                                       const float* x_sums, Cursor<Row> at, int64_t entry_stride, I places,
                                       float* totals) {
  using W = Words<Row>;
  constexpr bool kHeld = M * R <= 8;  // totals in registers
  const W values;
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) codes[r] = rows[r];
  F held[R][M];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < M; ++j) held[r][j] = load(totals + (r * M + j) * kLanes);
  }
  for (; count > 0; --count) {
    I words[R];
    for (int r = 0; r < R; ++r) {
      words[r] = load_words<W::kBits>(codes[r]);
      prefetch(codes[r] + ahead);
      codes[r] += W::kBytes;
    }
    F sums[R][M];
    unroll<W::kSteps>([&]<int Step>() {
      F w_step[R];
      for (int r = 0; r < R; ++r) w_step[r] = values.template at<Step>(words[r]);
      for (int j = 0; j < M; ++j) {
        const F x_step = hold(load(x + (Step * M + j) * kLanes));
        for (int r = 0; r < R; ++r) {
          sums[r][j] = Step == 0 ? mul(w_step[r], x_step) : fma(w_step[r], x_step, sums[r][j]);
        }
      }
    });
    x += W::kChunk * M;
    if (W::kInteger && at.zeros != nullptr) {
      for (int r = 0; r < R; ++r) {
        const F zero = at.lanes(at.zeros + r * entry_stride, places);
        for (int j = 0; j < M; ++j) sums[r][j] = fma(zero, load(x_sums + j * kLanes), sums[r][j]);
      }
      x_sums += M * kLanes;
    }
    for (int r = 0; r < R; ++r) {
      const F scale = at.lanes(at.scales + r * entry_stride, places);
      for (int j = 0; j < M; ++j) {
        float* total = totals + (r * M + j) * kLanes;
        if constexpr (kHeld) held[r][j] = fma(sums[r][j], scale, held[r][j]);
        else store(total, fma(sums[r][j], scale, load(total)));
      }
    }
    at.next();
  }
  if constexpr (kHeld) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < M; ++j) store(totals + (r * M + j) * kLanes, held[r][j]);
    }
  }
}

template <int Row, int M, int R>
void multiply_words(const FusedArgs& a) {
  multiply<Row, M, R, multiply_chunks<Row, M, R>>(a);
}

template <int Row>
void fused(const FusedArgs& a) {
  if (a.m == 1) return multiply_words<Row, 1, 4>(a);
  if (a.m == 2) return multiply_words<Row, 2, 4>(a);
  if (a.m <= 4) return multiply_words<Row, 4, 4>(a);
  return multiply_words<Row, 8, 2>(a);
}

template <int Row>
void fill(Kernels& kernels) {
  kernels.linear[Row] = {fused<Row>, arrange<Row>, decode_tile<Row>, Words<Row>::kChunk, Words<Row>::kSteps};
}

}  // namespace

void BITFOLD_ISA(words)(Kernels& kernels) {
  fill<kInt8>(kernels);
  fill<kInt4>(kernels);
  fill<kInt3>(kernels);
  fill<kInt2>(kernels);
  fill<kNf4>(kernels);
  fill<kFp4>(kernels);
}

}  // namespace bitfold::cpu
