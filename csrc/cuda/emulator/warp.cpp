// What the instructions of a warp compute: shuffles, votes, ldmatrix, mma. The layouts are in gpu/ptx_mma.hpp.
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/emulator/block.hpp"
#include "cuda/emulator/runtime.hpp"
#include "cuda/emulator/sanitizers.hpp"
#include "cuda/emulator/tensor_core.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::emulator {
namespace {

template <class T>
T& argument(void* const (&arguments)[32], int lane) {
  return *static_cast<T*>(arguments[lane]);
}

// ---- shuffles and votes ----

void shuffle_lanes(void* const (&arguments)[32], uint32_t present) {
  uint32_t values[32];
  for (int lane = 0; lane < 32; ++lane) {
    if (present >> lane & 1u) values[lane] = argument<Exchange>(arguments, lane).value;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(present >> lane & 1u)) continue;
    Exchange& exchange = argument<Exchange>(arguments, lane);
    if (!(present >> exchange.lane & 1u)) {
      fail("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(exchange.lane) +
               ", which has returned",
           *exchange.where);
    }
    exchange.value = values[exchange.lane];
  }
}
constexpr WarpOp kShuffle{"shuffle", false, false, shuffle_lanes};

struct Ballot {
  bool value;
  uint32_t lanes;  // with a true value
  uint32_t present;
};

void count_votes(void* const (&arguments)[32], uint32_t present) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (present >> lane & 1u && argument<Ballot>(arguments, lane).value) lanes |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(present >> lane & 1u)) continue;
    argument<Ballot>(arguments, lane).lanes = lanes;
    argument<Ballot>(arguments, lane).present = present;
  }
}
constexpr WarpOp kVotes[] = {
    {"ballot", false, false, count_votes}, {"any", false, false, count_votes}, {"all", false, false, count_votes}};

constexpr WarpOp kSyncWarp{"sync_warp", false, true, nullptr};

// ---- ldmatrix ----

struct LoadMatrices {
  uint32_t* r;
  const unsigned char* row;
  int matrices;
};

template <bool Transposed>
void load_matrices(void* const (&arguments)[32], uint32_t) {
  const int matrices = argument<LoadMatrices>(arguments, 0).matrices;
  for (int i = 0; i < matrices; ++i) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) {
      const unsigned char* from = argument<LoadMatrices>(arguments, 8 * i + row).row;
      for (int column = 0; column < 8; ++column) {
        m[row][column] = static_cast<uint16_t>(from[2 * column] | from[2 * column + 1] << 8);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = Transposed ? m[2 * t][g] : m[g][2 * t];
      const uint16_t high = Transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
      argument<LoadMatrices>(arguments, lane).r[i] = uint32_t{low} | uint32_t{high} << 16;
    }
  }
}
constexpr WarpOp kLoadMatrices[2][2] = {
    {{"ldmatrix_x2", true, false, load_matrices<false>}, {"ldmatrix_x2_trans", true, false, load_matrices<true>}},
    {{"ldmatrix_x4", true, false, load_matrices<false>}, {"ldmatrix_x4_trans", true, false, load_matrices<true>}}};

// ---- mma ----

struct Multiply {
  void* d;
  const uint32_t* a;
  const uint32_t* b;
  bool zero;
};

// Values of one register, as the numbers that the sums are made in.
struct F16 {
  static constexpr int kEach = 2;
  static const Factor& value(uint32_t r, int i) { return kTable[r >> 16 * i & 0xffffu]; }
  static const std::vector<Factor> kTable;
};
const std::vector<Factor> F16::kTable = [] {
  std::vector<Factor> values(65536);
  for (uint32_t code = 0; code < values.size(); ++code)
    values[code] = factor(half_to_float(static_cast<uint16_t>(code)), kSmallestHalf);
  return values;
}();
struct Bf16 {
  static constexpr int kEach = 2;
  static Factor value(uint32_t r, int i) {
    return factor(bf16_to_float(static_cast<uint16_t>(r >> 16 * i)), kSmallestBf16);
  }
};
struct S8 {
  static constexpr int kEach = 4;
  static int value(uint32_t r, int i) { return static_cast<int8_t>(r >> 8 * i); }
};
struct U8 {
  static constexpr int kEach = 4;
  static int value(uint32_t r, int i) { return static_cast<uint8_t>(r >> 8 * i); }
};

template <int Count>
float sum_of(float before, const Factor (&a)[Count], const Factor (&b)[Count]) {
  const int each = config().capability < 90 ? 8 : Count;
  for (int k = 0; k < Count; k += each) before = add_products(before, a + k, b + k, each);
  return before;
}
template <int Count>
int32_t sum_of(int32_t before, const int (&a)[Count], const int (&b)[Count]) {  // wraps around
  auto sum = static_cast<uint32_t>(before);
  for (int k = 0; k < Count; ++k) sum += static_cast<uint32_t>(a[k] * b[k]);
  return static_cast<int32_t>(sum);
}

template <class T, class Sum, class OfB = T>
void multiply(void* const (&arguments)[32], uint32_t) {
  constexpr int kEach = T::kEach;
  constexpr int kK = 8 * kEach;
  using Value = std::remove_cvref_t<decltype(T::value(0, 0))>;
  Value a[16][kK], b[8][kK];
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply& m = argument<Multiply>(arguments, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kEach; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][kEach * (t + 4 * (r >> 1)) + i] = T::value(m.a[r], i);
      for (int r = 0; r < 2; ++r) b[g][kEach * (t + 4 * r) + i] = OfB::value(m.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply& m = argument<Multiply>(arguments, lane);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      Sum& sum = static_cast<Sum*>(m.d)[r];
      sum = sum_of(m.zero ? Sum{} : sum, a[g + 8 * (r >> 1)], b[2 * t + (r & 1)]);
    }
  }
}
constexpr WarpOp kMultiply[] = {{"mma_f16", true, false, multiply<F16, float>},
                                {"mma_bf16", true, false, multiply<Bf16, float>},
                                {"mma_s8", true, false, multiply<S8, int32_t>},
                                {"mma_u8s8", true, false, multiply<U8, int32_t, S8>}};

}  // namespace

void shuffle(Exchange& exchange, const Where& where) { collective(kShuffle, &exchange, where); }

uint32_t vote(Vote kind, bool value, const Where& where) {
  Ballot ballot{value, 0, 0};
  collective(kVotes[static_cast<int>(kind)], &ballot, where);
  switch (kind) {
    case Vote::Any: return ballot.lanes != 0;
    case Vote::All: return ballot.lanes == ballot.present;
    default: return ballot.lanes;
  }
}

void sync_warp(const Where& where) { collective(kSyncWarp, nullptr, where); }

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* shared, const Where& where) {
  if (current->index % 32 < 8 * matrices) {  // the others' addresses don't matter
    check_shared(shared, 16, "ldmatrix", where);
    if (with_tsan()) __tsan_read_range(const_cast<void*>(shared), 16);
  }
  LoadMatrices load{r, static_cast<const unsigned char*>(shared), matrices};
  collective(kLoadMatrices[matrices == 4][transposed], &load, where);
}

void mma(Operands operands, void* d, const uint32_t* a, const uint32_t* b, bool zero, const Where& where) {
  Multiply multiply{d, a, b, zero};
  collective(kMultiply[static_cast<int>(operands)], &multiply, where);
}

}  // namespace bitfold::cuda::emulator
