// A matrix in planes as a kernel's parameter, and the scales of two rows of it.
#pragma once

#include "cuda/fragments.hpp"
#include "formats/codec.hpp"

namespace bitfold::cuda {

// The matrix as a kernel's parameter.
struct PlaneMatrix {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;                     // null: none
  int64_t scale_bytes_all, zero_bytes_all;  // of the planes
  bool whole_words;                         // both are a multiple of four
  const float* nested_scales;
  const float* nested_offset;
  int64_t n;
  int64_t row_bytes;   // of codes
  int64_t row_scales;  // from the first scale of a row to that of the next: 0 where the matrix has one
  int row_shift;       // log2 of the rows that have the same
  int64_t row_zeros;   // the same of zeros, in bytes
  Divider pieces;      // of a group
  int row;             // of the table of formats
  Scale scale;
  int scale_bytes;
};

// Bytes from the zero points of a row to those of the next.
inline int64_t row_zero_bytes(const Format& format, int64_t k) {
  return format.group == kPerTensor ? 0 : bitfold::ceil_div(groups_in_row(format, k) * format.bits(), 8);
}

inline PlaneMatrix plane_matrix(const Weight& w, int columns_of_piece) {
  constexpr uint32_t kAll = (1u << 31) - 1;
  const int64_t group = w.format.group, groups = groups_in_row(w.format, w.k);
  const int scale_bytes = static_cast<int>(dtype_bits(scale_dtype(w.format.scale)) / 8);
  const int64_t scale_bytes_all = (scale_row(w.format, w.n - 1) + 1) * groups * scale_bytes;
  const int64_t zero_bytes_all = group == kPerTensor ? 1 : w.n * row_zero_bytes(w.format, w.k);
  const auto pieces =
      group < 1 ? kAll : static_cast<uint32_t>(smaller(larger<int64_t>(group / columns_of_piece, 1), int64_t{kAll}));
  return {
      .codes = static_cast<const uint8_t*>(w.codes),
      .scales = static_cast<const uint8_t*>(w.scales),
      .zeros = w.zeros,
      .scale_bytes_all = scale_bytes_all,
      .zero_bytes_all = zero_bytes_all,
      .whole_words = scale_bytes_all % 4 == 0 && (w.zeros == nullptr || zero_bytes_all % 4 == 0),
      .nested_scales = w.nested_scales,
      .nested_offset = w.nested_offset,
      .n = w.n,
      .row_bytes = bitfold::ceil_div(w.k * w.format.bits(), int64_t{8}),
      .row_scales = group == kPerTensor ? 0 : groups,
      .row_shift = w.format.row_shift,
      .row_zeros = row_zero_bytes(w.format, w.k),
      .pieces = Divider::of(pieces),
      .row = w.format.row,
      .scale = w.format.scale,
      .scale_bytes = scale_bytes,
  };
}

// The row of the plane of scales that a row of the weight has its scales in.
template <int Row>
BITFOLD_DEVICE int64_t scale_row_of(const PlaneMatrix& w, int64_t row) {
  if constexpr (kFormats[Row].tall) return row >> w.row_shift;
  else return row;
}

// Scales of a row that lie on end, so many bytes of them, as words: one load, or two where there are 16 bytes.
template <int Bytes>
BITFOLD_DEVICE void load_on_end(const uint8_t* from, uint32_t (&words)[(Bytes + 3) / 4]) {
  if constexpr (Bytes >= 8) {
#pragma unroll
    for (int i = 0; i < Bytes / 4; i += 2) {
      const uint2 two = ptx::load8(from + 4 * i);
      words[i] = two.x, words[i + 1] = two.y;
    }
  } else if constexpr (Bytes == 4) {
    words[0] = ptx::load4(from);
  } else if constexpr (Bytes == 2) {
    words[0] = ptx::load2(from);
  } else {
    static_assert(Bytes == 1);
    words[0] = ptx::load1(from);
  }
}

// What a lane has loaded of the scales of a group of its two rows, to be looked at when it has arrived.
// `stored` is how scales are stored: F32, Nested, or F16 for both kinds of 16 bits.
struct LoadedScales {
  uint32_t bits[2];
  uint32_t nested[2];

  BITFOLD_DEVICE void load(const PlaneMatrix& w, Scale stored, const uint8_t* const (&from)[2]) {
    if (stored == Scale::F32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) bits[i] = ptx::load4(from[i]);
    } else if (stored == Scale::Nested) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bits[i] = ptx::load1(from[i]);
        nested[i] = ptx::load4(w.nested_scales + static_cast<uint32_t>(from[i] - w.scales) / kNestedGroup);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) bits[i] = ptx::load2(from[i]);
    }
  }
  // dynamic_map: of nested scales.
  BITFOLD_DEVICE Scales values(const PlaneMatrix& w, Scale stored, const float* dynamic_map) const {
    Scales scales;
    if (stored == Scale::F32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales.of[i] = ptx::uint_as_float(bits[i]);
    } else if (stored == Scale::Nested) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales.of[i] = ptx::add(ptx::mul(dynamic_map[bits[i]], ptx::uint_as_float(nested[i])), *w.nested_offset);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto half = static_cast<uint16_t>(bits[i]);
        scales.of[i] = w.scale == Scale::BF16 ? ptx::bf16_to_float(half) : ptx::half_to_float(half);
      }
    }
    return scales;
  }
};

}  // namespace bitfold::cuda
