// The formats with planes as sources of fragments for any k and any group: 16 columns at a time, loaded
// byte by byte. Right rather than fast; fragments_planes.hpp has what models come in.
//
// Groups have at least 16 columns, so a piece belongs to at most two. It is multiplied twice: once with the columns of
// the first group, the others being zero, and once with those of the second.
#pragma once

#include "cuda/fragments_planes.hpp"

namespace bitfold::cuda {

// Four codes of `bits` bits from bit `shift` of a word on as halves: value(r) has codes 2 r and 2 r + 1, less the zero.
template <int Row>
BITFOLD_DEVICE uint32_t ragged_value(uint32_t word, int shift, int r, uint32_t zero,
                                     const typename PlaneCodes<Row>::Tables& tables) {
  constexpr int kBits = kFormats[Row].bits;
  if constexpr (kBits == 8 || kFormats[Row].grid == Grid::Codebook) {
    return PlaneCodes<Row>::value(&word, 0, r, zero, tables);
  } else {
    const uint32_t codes = word >> (shift + 2 * r * kBits);
    return field_value<kBits>((codes & ((1u << kBits) - 1u)) | codes >> kBits << 16, 0, zero);
  }
}

template <int Row>
class RaggedFragments {
  static constexpr int kBits = kFormats[Row].bits;
  static constexpr bool kInteger = kFormats[Row].grid == Grid::Integer;
  static constexpr int kBytes = (4 * kBits + 7) / 8;  // of a lane's four codes

 public:
  static constexpr int kColumns = 16;
  static constexpr int kSteps = 2;
  static constexpr int kSections = 2;
  static constexpr int kMins = 0;
  static constexpr int kLaneBytes = kBytes;
  static constexpr int kRoom = 0;
  static constexpr float kUnit = 1.0f;

  static constexpr int column(int, int t, int half) { return 4 * t + half; }

  struct Matrix {
    PlaneMatrix planes;
    int64_t group;  // columns; k where there is one
    int64_t groups;
  };
  static Matrix matrix(const Weight& w) {
    return {plane_matrix<Row>(w, 1), w.format.group < 1 ? larger<int64_t>(w.k, kColumns) : w.format.group,
            groups_in_row(w.format, w.k)};
  }

  using Tables = typename PlaneCodes<Row>::Tables;
  BITFOLD_DEVICE static void fill(Tables& tables, int thread, int threads) {
    PlaneFragments<Row, 64, Scale::None, true>::fill(tables, thread, threads);
  }

  struct Slot {
    uint32_t word[2];
    LoadedScale<Scale::None> scale[2][2];  // of a row, of a group
    uint32_t zero[2][2];
    int first_columns;  // of the first group
    int shift;
  };

  RaggedFragments() = default;
  BITFOLD_DEVICE RaggedFragments(const Matrix& w, int64_t row, const Tables& tables) : w_(&w), tables_(&tables) {
    for (int i = 0; i < 2; ++i) {
      row_[i] = smaller<int64_t>(row + ptx::lane_id() / 4 + 8 * i, w.planes.n - 1);
    }
  }

  BITFOLD_DEVICE void fetch(Slot& slot, int piece, std::byte*) const {
    const PlaneMatrix& planes = w_->planes;
    const int64_t column = int64_t{piece} * kColumns, bit = (column + 4 * (ptx::lane_id() % 4)) * kBits;
    const int64_t group = column / w_->group;
    slot.first_columns = static_cast<int>(smaller<int64_t>((group + 1) * w_->group - column, kColumns));
    slot.shift = static_cast<int>(bit % 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* row = planes.codes + row_[i] * planes.row_bytes;
      slot.word[i] = 0;
#pragma unroll
      for (int byte = 0; byte < kBytes; ++byte) {
        const int64_t at = bit / 8 + byte;
        if (at < planes.row_bytes) slot.word[i] |= uint32_t{ptx::load1(row + at)} << 8 * byte;
      }
#pragma unroll
      for (int section = 0; section < 2; ++section) {
        const int64_t entry = smaller<int64_t>(group + section, w_->groups - 1);
        const int64_t number = row_[i] * planes.row_scales + entry;
        slot.scale[i][section].load(planes, number * LoadedScale<Scale::None>::bytes(planes));
        if constexpr (kInteger) {
          uint32_t zero = 1u << (kBits - 1);
          if (planes.zeros != nullptr) {
            zero = read_code(planes.zeros + row_[i] * planes.row_zeros, entry, kBits, false);
          }
          slot.zero[i][section] = zero * 0x00010001u;
        }
      }
    }
  }

  BITFOLD_DEVICE void open(Slot&, int, const std::byte*) const {}

  BITFOLD_DEVICE void step(const Slot& slot, int step, uint32_t (&a)[4]) const {
    const int column = 4 * (ptx::lane_id() % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t first = (column + 2 * r < slot.first_columns ? 0x0000ffffu : 0u) |
                             (column + 2 * r + 1 < slot.first_columns ? 0xffff0000u : 0u);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t zero = kInteger ? slot.zero[i][step] : 0;
        a[2 * r + i] = ragged_value<Row>(slot.word[i], slot.shift, r, zero, *tables_) & (step == 0 ? first : ~first);
      }
    }
  }

  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    const float* dynamic_map = nullptr;
    if constexpr (kFormats[Row].nested) dynamic_map = tables_->dynamic_map;
    return {
        {slot.scale[0][section].value(w_->planes, dynamic_map), slot.scale[1][section].value(w_->planes, dynamic_map)}};
  }

 private:
  const Matrix* w_;
  const Tables* tables_;
  int64_t row_[2];
};

}  // namespace bitfold::cuda
