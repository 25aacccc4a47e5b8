// The formats with planes as a source of fragments for any k and any group: 16 columns at a time, loaded byte by byte,
// codes through a table of their numbers. Right rather than fast, and so one kernel for all of them;
// fragments_planes.hpp has what models come in.
//
// Groups have at least 16 columns, so a piece belongs to at most two. It is multiplied twice: once with the columns of
// the first group, the others being zero, and once with those of the second.
#pragma once

#include "cuda/fragments_planes.hpp"

namespace bitfold::cuda {

// What a code is before its zero point and its scale.
BITFOLD_DEVICE float code_number(int row, uint32_t code) {
  switch (row) {
    case kE4m3: return code_value<kE4m3>(code, 0);
    case kE5m2: return code_value<kE5m2>(code, 0);
    case kNf4: return code_value<kNf4>(code, 0);
    case kFp4: return code_value<kFp4>(code, 0);
    default: return static_cast<float>(code);
  }
}

class RaggedFragments {
 public:
  static constexpr int kColumns = 16;
  static constexpr int kSteps = 2;
  static constexpr int kSections = 2;
  static constexpr int kMins = 0;
  static constexpr int kHead = 0;
  static constexpr int kTogether = 1;
  static constexpr int kSums = 0;
  static constexpr int kRoom = 0;
  static constexpr float kUnit = 1.0f;

  static constexpr int column(int, int t, int half) { return 4 * t + half; }

  BITFOLD_HOST_DEVICE static constexpr int down(int, int) { return 0; }

  struct Matrix {
    PlaneMatrix planes;
    int64_t group;  // columns; k where there is one
    int groups;
    int bits;
    bool high_first;
    bool integer;
  };
  static Matrix matrix(const Weight& w) {
    const FormatRow& format = w.format.info();
    return {.planes = plane_matrix(w, 1),
            .group = w.format.group < 1 ? larger<int64_t>(w.k, kColumns) : w.format.group,
            .groups = static_cast<int>(groups_in_row(w.format, w.k)),
            .bits = format.bits,
            .high_first = format.high_first,
            .integer = format.grid == Grid::Integer};
  }

  struct Tables {
    uint16_t numbers[256];  // halves
    float dynamic_map[256];
  };
  BITFOLD_DEVICE static void fill(const Matrix& w, Tables& tables, int thread, int threads) {
    const float up = codebook_up(w.planes.row);
    for (int i = thread; i < 256; i += threads) {
      const auto code = static_cast<uint32_t>(i);
      tables.numbers[i] = code >> w.bits == 0 ? ptx::float_to_half(code_number(w.planes.row, code) * up) : uint16_t{0};
      tables.dynamic_map[i] = kDynamicMap[static_cast<size_t>(i)];
    }
  }

  struct Slot {
    uint32_t word[2];  // a lane's four codes
    LoadedScales scales[2];
    uint32_t zero[2][2];  // of a section, of a row
    int first_columns;    // of the first group
    int shift;
  };

  BITFOLD_DEVICE static constexpr Manner manner(const Matrix&) { return Manner::Any; }

  // Nothing goes ahead: open() loads.
  struct Copies {
    Copies() = default;
    BITFOLD_DEVICE Copies(const Matrix&, int64_t, int) {}
    BITFOLD_DEVICE void begin(const Matrix&, int, std::byte*) const {}
    template <Manner>
    BITFOLD_DEVICE void fetch(const Matrix&, std::byte*) {}
  };

  RaggedFragments() = default;
  BITFOLD_DEVICE RaggedFragments(const Matrix& w, int64_t row, const Tables& tables, const std::byte*)
      : w_(&w), tables_(&tables) {
    for (int i = 0; i < 2; ++i) {
      const int64_t mine = smaller<int64_t>(row + ptx::lane_id() / 4 + 8 * i, w.planes.n - 1);
      codes_[i] = w.planes.codes + mine * w.planes.row_bytes;
      scales_[i] = w.planes.scales + (mine >> w.planes.row_shift) * w.planes.row_scales * w.planes.scale_bytes;
      zeros_[i] = w.planes.zeros == nullptr ? nullptr : w.planes.zeros + mine * w.planes.row_zeros;
    }
  }

  template <Manner>
  BITFOLD_DEVICE void open(Slot& slot, int piece, const std::byte*) const {
    const PlaneMatrix& planes = w_->planes;
    const int column = piece * kColumns;
    const int64_t bit = (int64_t{column} + 4 * (ptx::lane_id() % 4)) * w_->bits, byte = bit / 8;
    const auto group = static_cast<int>(planes.pieces.divide(static_cast<uint32_t>(column)));
    slot.first_columns = static_cast<int>(smaller<int64_t>((group + 1) * w_->group - column, kColumns));
    slot.shift = static_cast<int>(bit % 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      slot.word[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (8 * j < slot.shift + 4 * w_->bits && byte + j < planes.row_bytes) {
          slot.word[i] |= uint32_t{ptx::load1(codes_[i] + byte + j)} << 8 * j;
        }
      }
    }
#pragma unroll
    for (int section = 0; section < 2; ++section) {
      const int entry = smaller(group + section, w_->groups - 1);
      const uint8_t* scales[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[i] = scales_[i] + int64_t{entry} * planes.scale_bytes;
        slot.zero[section][i] = w_->integer ? 1u << (w_->bits - 1) : 0;
        if (planes.zeros != nullptr) slot.zero[section][i] = read_code(zeros_[i], entry, w_->bits, false);
      }
      slot.scales[section].load(planes, planes.scale, scales);
    }
  }

  template <Manner>
  BITFOLD_DEVICE void step(const Slot& slot, int step, uint32_t (&a)[4]) const {
    const int column = 4 * (ptx::lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t zero = ptx::hsub2(magic(0) + slot.zero[step][i], magic(0));  // the whole number as a half
      uint32_t halves[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool mine = (column + c < slot.first_columns) == (step == 0);  // of this step's group
        halves[c] = mine ? ptx::hsub2(tables_->numbers[code(slot, i, c)], zero) & 0xffffu : 0;
      }
      a[kLow0 + i] = halves[0] | halves[1] << 16;
      a[kLow1 + i] = halves[2] | halves[3] << 16;
    }
  }

  template <Manner>
  BITFOLD_DEVICE Scales scales(const Slot& slot, int section) const {
    return slot.scales[section].values(w_->planes, w_->planes.scale, tables_->dynamic_map);
  }

 private:
  BITFOLD_DEVICE uint32_t code(const Slot& slot, int i, int c) const {
    const int place = w_->high_first ? c ^ 1 : c;
    return slot.word[i] >> (slot.shift + place * w_->bits) & ((1u << w_->bits) - 1u);
  }

  const Matrix* w_;
  const Tables* tables_;
  const uint8_t *codes_[2], *scales_[2], *zeros_[2];  // of the two rows
};

}  // namespace bitfold::cuda
