// Eight columns at a time, from bits to fp32, one thread each: for kernels that read a weight once and in order. Every
// value has the bits that csrc/formats' floor gives it (compile with -fmad=false).
#pragma once

#include <cstddef>

#include "cuda/device.hpp"
#include "formats/blocks.hpp"
#include "formats/codec.hpp"

namespace bitfold::cuda {

inline constexpr int kRun = 8;  // columns

// ---- bytes ----

constexpr int lowest_bit(int value) { return value & -value; }

// N bytes, 1 to 8, of an address that is a multiple of Align: the first in the lowest bits.
template <int N, int Align>
BITFOLD_DEVICE uint2 load_bytes(const uint8_t* p) {
  if constexpr (N == 8 && Align >= 8) return ptx::load8(p);
  uint32_t words[2] = {0, 0};
  constexpr int kStep = Align >= 4 && N % 4 == 0 ? 4 : Align >= 2 && N % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    uint32_t piece;
    if constexpr (kStep == 4) piece = ptx::load4(p + i);
    else if constexpr (kStep == 2) piece = ptx::load2(p + i);
    else piece = ptx::load1(p + i);
    words[i / 4] |= piece << 8 * (i % 4);
  }
  return {words[0], words[1]};
}

// ---- whole numbers: 2^23 + code is exact ----

// A code of at most 23 bits, less another number.
BITFOLD_DEVICE float whole_number(uint32_t code, int zero) {
  return ptx::uint_as_float(0x4b000000u | code) - (0x1p23f + static_cast<float>(zero));
}
// The same of byte j of a word.
BITFOLD_DEVICE float whole_byte(uint32_t word, int j, int zero) {
  return ptx::uint_as_float(ptx::prmt(word, 0x4b000000u, 0x7440u + static_cast<uint32_t>(j))) -
         (0x1p23f + static_cast<float>(zero));
}

// ---- bits of eight bytes ----

BITFOLD_DEVICE uint2 shift_right(uint2 bytes, int shift, uint32_t mask) {
  return {bytes.x >> shift & mask, bytes.y >> shift & mask};
}

// Bits 0 to 7 as bit `Bit` of eight bytes.
template <int Bit>
BITFOLD_DEVICE uint2 spread_bits(uint32_t bits) {
  constexpr uint32_t kCopies = 0x00204081u, kMask = 0x01010101u;  // bit i of four comes to bit 8 i
  return {((bits & 15u) * kCopies & kMask) << Bit, ((bits >> 4 & 15u) * kCopies & kMask) << Bit};
}

// Bit `shift` of each of eight bytes, and those next to it, as bit `Bit`.
template <int Bit, int Count>
BITFOLD_DEVICE uint2 move_bits(uint2 bytes, int shift) {
  constexpr uint32_t kMask = 0x01010101u * ((1u << Count) - 1u);
  const uint2 low = shift_right(bytes, shift, kMask);
  return {low.x << Bit, low.y << Bit};
}

BITFOLD_DEVICE uint2 either(uint2 a, uint2 b) { return {a.x | b.x, a.y | b.y}; }

// ---- codebooks: in shared memory, where lanes that ask for different entries don't wait for each other ----

BITFOLD_HOST_DEVICE constexpr bool has_codebook(int row) {
  return row == kNf4 || row == kFp4 || row == kIq4Nl || row == kIq4Xs || row == kMxfp4;
}
template <int Row>
inline constexpr bool kHasCodebook = has_codebook(Row);

struct Codebook {
  float values[16];
};

// Of the format's row, where it has one. By all threads of the block, which then meet before one looks at it.
BITFOLD_DEVICE void fill_codebook(int row, Codebook& book) {
  const auto i = static_cast<size_t>(threadIdx.x);
  if (i < 16 && has_codebook(row)) {
    if (row == kNf4) book.values[i] = kNf4Values[i];
    else if (row == kFp4) book.values[i] = kFp4Values[i];
    else if (row == kMxfp4) book.values[i] = static_cast<float>(kMxfp4Values[i]);
    else book.values[i] = static_cast<float>(kIq4Values[i]);
  }
}

// ---- formats with planes ----

// The scale at place i of the plane.
BITFOLD_DEVICE float scale_at(const Weight& w, int64_t i) {
  switch (w.format.scale) {
    case Scale::F16: return ptx::half_to_float(ptx::load2(static_cast<const uint16_t*>(w.scales) + i));
    case Scale::BF16: return ptx::bf16_to_float(ptx::load2(static_cast<const uint16_t*>(w.scales) + i));
    case Scale::F32: return ptx::uint_as_float(ptx::load4(static_cast<const float*>(w.scales) + i));
    default: {
      const float unit = kDynamicMap[ptx::load1(static_cast<const uint8_t*>(w.scales) + i)];
      const float product = unit * ptx::uint_as_float(ptx::load4(w.nested_scales + i / kNestedGroup));
      return product + ptx::uint_as_float(ptx::load4(w.nested_offset));
    }
  }
}

template <int Row>
BITFOLD_DEVICE float run_number(uint32_t code, int zero, const float* codebook) {
  if constexpr (kHasCodebook<Row>) return codebook[code];
  else if constexpr (kFormats[Row].grid == Grid::Integer) return whole_number(code, zero);
  else return code_value<Row>(code, zero);
}

// The eight columns of a run whose codes start at `codes`, on a whole byte: their values before the scale.
template <int Row>
BITFOLD_DEVICE void run_values(const uint8_t* codes, int zero, const float* codebook, float (&values)[kRun]) {
  constexpr FormatRow kRow = kFormats[Row];
  if constexpr (kRow.grid == Grid::Cast) {
    const uint4 words = ptx::load16(codes);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < kRun; j += 2) {
      const float2 pair = Row == kFp16 ? ptx::halves_to_floats(pairs[j / 2]) : ptx::bf16s_to_floats(pairs[j / 2]);
      values[j] = pair.x;
      values[j + 1] = pair.y;
    }
  } else {
    constexpr int kBits = kRow.bits;  // as many bytes
    const uint2 bytes = load_bytes<kBits, lowest_bit(kBits)>(codes);
    const auto stream = static_cast<uint64_t>(bytes.y) << 32 | bytes.x;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int place = kRow.high_first ? j ^ 1 : j;
      const auto code = static_cast<uint32_t>(stream >> kBits * place) & ((1u << kBits) - 1u);
      values[j] = run_number<Row>(code, zero, codebook);
    }
  }
}

// ---- GGUF's blocks: columns 8 r to 8 r + 7 of a block (csrc/formats/blocks.hpp) ----

template <int Row>
struct RunOfBlock {
  using B = Block<Row>;
  static constexpr int kAlign = lowest_bit(static_cast<int>(sizeof(B)));  // of every block: the plane's is 16 or more

  // Eight bytes of a field that starts at byte `Offset` of the block; `at` is a multiple of 8.
  template <size_t Offset>
  BITFOLD_DEVICE static uint2 bytes(const B& b, int at) {
    constexpr int kFieldAlign = lowest_bit(kAlign | static_cast<int>(Offset) | 8);
    return load_bytes<8, kFieldAlign>(reinterpret_cast<const uint8_t*>(&b) + Offset + at);
  }
  BITFOLD_DEVICE static float half(const Half& h) { return ptx::half_to_float(ptx::load2(&h)); }

  // Codes, one a byte.
  BITFOLD_DEVICE static uint2 codes(const B& b, int r) {
    const int quarter = r >> 2 & 3, l = 8 * (r & 3);  // the large blocks': column / 32 % 4, column % 32
    if constexpr (Row == kQ4_0 || Row == kQ4_1 || Row == kIq4Nl || Row == kMxfp4) {
      return shift_right(bytes<offsetof(B, qs)>(b, 8 * (r & 1)), 4 * (r >> 1), 0x0f0f0f0fu);
    } else if constexpr (Row == kQ5_0 || Row == kQ5_1) {
      const uint2 low = shift_right(bytes<offsetof(B, qs)>(b, 8 * (r & 1)), 4 * (r >> 1), 0x0f0f0f0fu);
      return either(low, spread_bits<4>(ptx::load1(b.qh + r)));
    } else if constexpr (Row == kQ8_0) {
      return bytes<offsetof(B, qs)>(b, 8 * r);
    } else if constexpr (Row == kQ2K || Row == kQ3K) {
      const uint2 low = shift_right(bytes<offsetof(B, qs)>(b, 32 * (r >> 4) + l), 2 * quarter, 0x03030303u);
      if constexpr (Row == kQ2K) return low;
      else return either(low, move_bits<2, 1>(bytes<offsetof(B, hmask)>(b, l), r >> 2));
    } else if constexpr (Row == kQ4K || Row == kQ5K) {
      const uint2 low = shift_right(bytes<offsetof(B, qs)>(b, 32 * (r >> 3) + l), 4 * (r >> 2 & 1), 0x0f0f0f0fu);
      if constexpr (Row == kQ4K) return low;
      else return either(low, move_bits<4, 1>(bytes<offsetof(B, qh)>(b, l), r >> 2));
    } else if constexpr (Row == kQ6K) {
      const uint2 low = shift_right(bytes<offsetof(B, ql)>(b, 64 * (r >> 4) + 32 * (quarter & 1) + l),
                                    4 * (quarter >> 1), 0x0f0f0f0fu);
      return either(low, move_bits<4, 2>(bytes<offsetof(B, qh)>(b, 32 * (r >> 4) + l), 2 * quarter));
    } else {
      static_assert(Row == kIq4Xs);
      return shift_right(bytes<offsetof(B, qs)>(b, 16 * (r >> 2) + 8 * (r & 1)), 4 * (r >> 1 & 1), 0x0f0f0f0fu);
    }
  }

  static constexpr bool kHasMin = Row == kQ4_1 || Row == kQ5_1 || Row == kQ2K || Row == kQ4K || Row == kQ5K;
  struct Factors {
    float step;    // what the codes are multiplied by
    float offset;  // what is added to the product, where there are minima
  };
  BITFOLD_DEVICE static Factors factors(const B& b, int r) {
    if constexpr (Row == kQ2K) {
      const uint32_t both = ptx::load1(b.scales + (r >> 1));
      return {half(b.d) * static_cast<float>(both & 15), -(half(b.dmin) * static_cast<float>(both >> 4))};
    } else if constexpr (Row == kQ4K || Row == kQ5K) {
      // d, dmin and the twelve bytes of scale_and_min, four sub-blocks at a time.
      const uint4 head = ptx::load16(&b);
      const bool high = r >= 16;
      const uint32_t scales = high ? (head.w & 0x0f0f0f0fu) | (head.y >> 2 & 0x30303030u) : head.y & 0x3f3f3f3fu;
      const uint32_t mins = high ? (head.w >> 4 & 0x0f0f0f0fu) | (head.z >> 2 & 0x30303030u) : head.z & 0x3f3f3f3fu;
      const float2 d = ptx::halves_to_floats(head.x);
      const int j = r >> 2 & 3;
      return {d.x * whole_byte(scales, j, 0), -(d.y * whole_byte(mins, j, 0))};
    } else if constexpr (Row == kQ4_1 || Row == kQ5_1) {
      const float2 both = ptx::halves_to_floats(ptx::load4(&b));
      return {both.x, both.y};
    } else if constexpr (Row == kMxfp4) {
      return {mxfp4_step(ptx::load1(&b.e)), 0.0f};
    } else if constexpr (Row == kQ3K) {
      return {half(b.d) * static_cast<float>(q3k_scale(b.scales, r >> 1) - 32), 0.0f};
    } else if constexpr (Row == kQ6K) {
      return {half(b.d) * static_cast<float>(b.scales[r >> 1]), 0.0f};
    } else if constexpr (Row == kIq4Xs) {
      return {half(b.d) * static_cast<float>(iq4xs_scale(b, r >> 2) - 32), 0.0f};
    } else {
      return {half(b.d), 0.0f};
    }
  }

  // Everything of a run that lies in memory, and its values.
  struct Loaded {
    uint2 codes;
    Factors factors;
  };
  BITFOLD_DEVICE static Loaded load(const B& b, int r) { return {codes(b, r), factors(b, r)}; }

  BITFOLD_DEVICE static float number(uint32_t word, int j, const float* codebook) {
    constexpr int kMiddle = Row == kQ4_0 ? 8 : Row == kQ5_0 ? 16 : Row == kQ3K ? 4 : Row == kQ6K ? 32 : 0;
    if constexpr (kHasCodebook<Row>) return codebook[ptx::prmt(word, 0, 0x4440u + static_cast<uint32_t>(j))];
    else if constexpr (Row == kQ8_0) return whole_byte(word ^ 0x80808080u, j, 128);
    else return whole_byte(word, j, kMiddle);
  }
  BITFOLD_DEVICE static void values(const Loaded& run, const float* codebook, float (&out)[kRun]) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      out[j] = number(j < 4 ? run.codes.x : run.codes.y, j % 4, codebook) * run.factors.step;
      if constexpr (kHasMin) out[j] += run.factors.offset;
    }
  }
};

// ---- any format, any layout ----

// A matrix that is read in runs of its rows.
struct WeightRuns {
  Weight w;
  int64_t row_bytes;       // of the plane of codes
  int64_t zero_row_bytes;  // of the plane of zero points; none where all rows have the same
  int64_t groups;          // of a row of the planes
  int group_shift;         // log2 of the group, where it is a power of 2, else -1
  bool whole;              // every run has eight columns of one group and starts at a byte
};

// The group of column i of a row of the planes.
BITFOLD_DEVICE int64_t group_of(const WeightRuns& d, int64_t i) {
  if (d.w.format.group < 1) return 0;
  if (d.group_shift >= 0) return i >> d.group_shift;
  return (i | d.w.format.group) >> 32 != 0 ? i / d.w.format.group
                                           : static_cast<uint32_t>(i) / static_cast<uint32_t>(d.w.format.group);
}

template <int Row>
BITFOLD_DEVICE int zero_at(const WeightRuns& d, int64_t row, int64_t group) {
  constexpr int kBits = kFormats[Row].bits;
  if (d.w.format.zero == Zero::None) return 1 << (kBits - 1);
  return static_cast<int>(read_code(d.w.zeros + row * d.zero_row_bytes, group, kBits, false));
}

// Columns [column, column + count) of the matrix's row `row`; column is a multiple of 8.
template <int Row>
BITFOLD_DEVICE void decode_run(const WeightRuns& d, int64_t row, int64_t column, int count, const float* codebook,
                               float (&values)[kRun]) {
  constexpr FormatRow kRow = kFormats[Row];
  const bool flat = d.w.layout == Layout::Flat;
  const int64_t begin = flat ? row * d.w.k + column : column;
  row = flat ? 0 : row;
  const uint8_t* codes = static_cast<const uint8_t*>(d.w.codes) + row * d.row_bytes;
  if constexpr (kRow.grid == Grid::Block) {
    constexpr int kBlockRuns = static_cast<int>(kRow.group) / kRun;
    const int64_t run = begin / kRun;
    const auto* block = reinterpret_cast<const Block<Row>*>(codes) + run / kBlockRuns;
    const auto loaded = RunOfBlock<Row>::load(*block, static_cast<int>(run % kBlockRuns));
    RunOfBlock<Row>::values(loaded, codebook, values);
  } else if (d.whole) {
    const int64_t group = group_of(d, begin);
    const int zero = kRow.grid == Grid::Integer ? zero_at<Row>(d, row, group) : 0;
    run_values<Row>(codes + begin / kRun * kRow.bits, zero, codebook, values);
    if constexpr (kRow.grid != Grid::Cast) {
      const float scale = scale_at(d.w, scale_row(d.w.format, row) * d.groups + group);
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] *= scale;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= count) break;
      const int64_t i = begin + j;
      if constexpr (kRow.grid == Grid::Cast) {
        const uint16_t bits = ptx::load2(codes + 2 * i);
        values[j] = Row == kFp16 ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits);
      } else {
        const int64_t group = group_of(d, i);
        const uint32_t code = read_code(codes, i, kRow.bits, kRow.high_first);
        float value;
        if constexpr (kHasCodebook<Row>) value = codebook[code];
        else value = code_value<Row>(code, kRow.grid == Grid::Integer ? zero_at<Row>(d, row, group) : 0);
        values[j] = value * scale_at(d.w, scale_row(d.w.format, row) * d.groups + group);
      }
    }
  }
}

inline int log2_or_minus_one(int64_t value) {
  if (value < 1 || (value & (value - 1)) != 0) return -1;
  int shift = 0;
  while (value >> shift != 1) ++shift;
  return shift;
}

// Whether all rows of a matrix can be read as one: none of its planes has anything between them, and its groups end
// with them.
inline bool rows_are_one(const Weight& w) {
  const int64_t group = w.format.group;
  if (w.format.is_block() || w.format.info().grid == Grid::Cast) return w.k % kRun == 0;
  if (w.layout != Layout::Rows || w.format.row_shift > 0 || group < 1 || w.k % group != 0 || w.k % kRun != 0)
    return false;
  return w.zeros == nullptr || w.k / group * w.format.bits() % 8 == 0;
}

// Of rows of `columns` columns: those of the matrix, unless all of it is read as one row.
inline WeightRuns runs_of(const Weight& w, int64_t columns) {
  const int64_t plane_bits = w.plane_columns() * w.format.bits();
  const int64_t groups = groups_in_row(w.format, w.plane_columns());
  return {.w = w,
          .row_bytes = w.format.is_block() ? w.k / w.format.group * w.format.info().block_bytes
                                           : ceil_div(plane_bits, int64_t{8}),
          .zero_row_bytes = w.format.group == kPerTensor ? 0 : ceil_div(groups * w.format.bits(), int64_t{8}),
          .groups = groups,
          .group_shift = log2_or_minus_one(w.format.group),
          .whole = (w.format.group < 1 || w.format.group % kRun == 0) && columns % kRun == 0};
}

}  // namespace bitfold::cuda
