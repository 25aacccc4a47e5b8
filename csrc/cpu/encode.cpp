// Rounding to nearest: scales per group, codes, bit streams, and the double quantization of scales.
//
// A row is read as fp32, its groups get their scales, its codes are packed. A scale per matrix needs a pass over
// all rows first; nested scales are quantized after all rows are done. Faults are collected per row, so that the one
// reported does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "cpu/encode_blocks.hpp"
#include "cpu/faults.hpp"
#include "formats/bitstream.hpp"

namespace bitfold::cpu {
namespace {

struct GroupGrid {
  float scale;   // as stored
  double exact;  // the same before any rounding
  int zero;
};

float round_scale(float scale, Scale dtype) {
  switch (dtype) {
    case Scale::F16: return half_to_float(float_to_half(scale));
    case Scale::BF16: return bf16_to_float(float_to_bf16(scale));
    default: return scale;
  }
}

GroupGrid choose_grid(const Format& format, const GroupRange& range) {
  const FormatRow& info = format.info();
  const float absmax = std::max(range.high, -range.low);  // in this order 0 and -0 make 0
  const auto top = static_cast<float>((1 << info.bits) - 1);
  GroupGrid grid{};
  float scale = absmax;  // docs/formats.md rounds each operation to binary32
  if (format.zero == Zero::Integer) {
    grid.exact = (static_cast<double>(range.high) - static_cast<double>(range.low)) / static_cast<double>(top);
    scale = (range.high - range.low) / top;
  } else if (info.grid != Grid::Codebook) {
    grid.exact = static_cast<double>(absmax) / static_cast<double>(info.grid_max);
    scale = absmax / info.grid_max;
  } else {
    grid.exact = static_cast<double>(absmax);
  }
  grid.scale = round_scale(scale, format.scale);
  if (format.zero == Zero::Integer) {
    if (grid.scale > 0.0f) grid.zero = static_cast<int>(std::clamp(std::nearbyint(-range.low / grid.scale), 0.0f, top));
  } else if (info.grid == Grid::Integer) {
    grid.zero = 1 << (info.bits - 1);
  }
  return grid;
}

// docs/formats.md, "scale range".
EncodeFault scale_fault(const Format& format, const GroupGrid& grid) {
  const FormatRow& info = format.info();
  if (!std::isfinite(grid.scale)) return EncodeFault::ScaleOverflow;
  const double largest = info.grid == Grid::Integer ? static_cast<double>(info.grid_max) : 8.0;
  const double moved = std::abs(static_cast<double>(grid.scale) - grid.exact);
  return moved * largest > grid.exact / 2.0 ? EncodeFault::ScaleUnderflow : EncodeFault::None;
}

void store_scale(void* scales, Scale dtype, int64_t i, float scale) {
  switch (dtype) {
    case Scale::F16: static_cast<uint16_t*>(scales)[i] = float_to_half(scale); break;
    case Scale::BF16: static_cast<uint16_t*>(scales)[i] = float_to_bf16(scale); break;
    default: static_cast<float*>(scales)[i] = scale; break;
  }
}

// ---- fp16 and bf16 ----

EncodeStatus encode_cast(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const bool half = args.format.row == kFp16;
  const DType dtype = half ? DType::F16 : DType::BF16;
  const float largest = args.format.info().grid_max;
  // The smallest magnitude that rounds to infinity lies half a unit in the last place above the largest finite number.
  const float limit = half ? 65520.0f : 3.3961775292304957e38f;
  Faults faults;
  cut(args.parallel_for, args.w.rows, grain_rows(args.w.columns), [&](int64_t begin, int64_t end) {
    const int64_t k = args.w.columns;
    Buffer<float> row(k);
    for (int64_t r = begin; r < end; ++r) {
      read_row(kernels, args.w, r, row.data());
      if (!kernels.group_range(row.data(), k).finite) {
        faults.add(not_finite(row.data(), k, r));
        continue;
      }
      EncodeStatus overflow;
      for (int64_t i = 0; i < k; ++i) {
        if (std::abs(row[i]) < limit) continue;
        if (overflow.count++ == 0) overflow = {EncodeFault::CastOverflow, r, i, row[i], 1};
        row[i] = std::copysign(largest, row[i]);
      }
      if (overflow.count > 0 && !args.clamp) faults.add(overflow);
      kernels.from_float(row.data(), k, dtype, static_cast<uint16_t*>(args.out.codes) + r * k);
    }
  });
  return faults.first();
}

// ---- groups with scales ----

// Reads one row after another, with room for its codes.
struct RowScratch {
  Buffer<float> w;
  Buffer<uint8_t> codes;
  Buffer<uint8_t> zeros;
  RowScratch(int64_t k, int64_t groups) : w(k), codes(k), zeros(groups) {}
};

void quantize_group(const Kernels& kernels, const Format& format, const GroupGrid& grid, const float* w, int64_t count,
                    uint8_t* codes) {
  if (grid.scale == 0.0f && format.info().grid == Grid::Integer) {
    std::memset(codes, grid.zero, static_cast<size_t>(count));
  } else {  // an all-zero group has any scale: w / 1 keeps the sign of its zeros, as w / s would
    kernels.quantize[format.row]({w, count, grid.scale == 0.0f ? 1.0f : grid.scale, grid.zero, codes});
  }
}

void pack_row(const EncodeArgs& args, int64_t r, RowScratch& scratch) {
  const FormatRow& info = args.format.info();
  const int64_t k = args.w.columns;
  pack_codes(scratch.codes.data(), k, info.bits, info.high_first,
             static_cast<uint8_t*>(args.out.codes) + r * ceil_div(k * info.bits, 8));
}

// All rows share one grid.
EncodeStatus encode_tensor(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const int64_t n = args.w.rows, k = args.w.columns;
  Buffer<GroupRange> ranges(n);
  Faults faults;
  cut(args.parallel_for, n, grain_rows(k), [&](int64_t begin, int64_t end) {
    Buffer<float> row(k);
    for (int64_t r = begin; r < end; ++r) {
      read_row(kernels, args.w, r, row.data());
      ranges[r] = kernels.group_range(row.data(), k);
      if (!ranges[r].finite) faults.add(not_finite(row.data(), k, r));
    }
  });
  if (faults.first().fault != EncodeFault::None) return faults.first();
  GroupRange all{0.0f, 0.0f, true};
  for (int64_t r = 0; r < n; ++r) {
    all.low = std::min(all.low, ranges[r].low);
    all.high = std::max(all.high, ranges[r].high);
  }
  const GroupGrid grid = choose_grid(args.format, all);
  if (const EncodeFault fault = scale_fault(args.format, grid); fault != EncodeFault::None) {
    return {fault, 0, 0, grid.exact, 0};
  }
  store_scale(args.out.scales, args.format.scale, 0, grid.scale);
  if (args.out.zeros != nullptr) *args.out.zeros = static_cast<uint8_t>(grid.zero);
  cut(args.parallel_for, n, grain_rows(k), [&](int64_t begin, int64_t end) {
    RowScratch scratch(k, 1);
    for (int64_t r = begin; r < end; ++r) {
      read_row(kernels, args.w, r, scratch.w.data());
      quantize_group(kernels, args.format, grid, scratch.w.data(), k, scratch.codes.data());
      pack_row(args, r, scratch);
    }
  });
  return {};
}

// The code of the dynamic map nearest to t, which is moved to a grid of 65,536 points first (docs/formats.md, "dq").
uint8_t nearest_dynamic(float t) {
  constexpr float kPoints = 65535.0f;
  const float clamped = std::clamp(t, -1.0f, 1.0f);
  const float point = std::trunc((clamped + 1.0f) * 0.5f * kPoints + 0.5f);
  const float moved = point / kPoints * 2.0f - 1.0f;
  const auto* begin = kDynamicMidpoints.data();
  return static_cast<uint8_t>(std::lower_bound(begin, begin + kDynamicMidpoints.size(), moved) - begin);
}

// QLoRA's double quantization of the scales of the whole matrix. docs/formats.md, "dq".
void nest_scales(const EncodeArgs& args, const float* scales, int64_t count) {
  float offset = 0.0f;
  if (args.nested_offset != nullptr) {
    offset = *args.nested_offset;
  } else if (count > 0) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(scales[i]);
    offset = static_cast<float>(sum / static_cast<double>(count));
  }
  *args.out.nested_offset = offset;
  auto* codes = static_cast<uint8_t*>(args.out.scales);
  cut(args.parallel_for, ceil_div(count, kNestedGroup), 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kNestedGroup, last = std::min(count, first + kNestedGroup);
      float absmax = 0.0f;
      for (int64_t i = first; i < last; ++i) absmax = std::max(absmax, std::abs(scales[i] - offset));
      args.out.nested_scales[group] = absmax;
      const float inverse = 1.0f / std::max(absmax, 1e-38f);
      for (int64_t i = first; i < last; ++i) {
        codes[i] = absmax > 0.0f ? nearest_dynamic((scales[i] - offset) * inverse) : uint8_t{0};
      }
    }
  });
}

EncodeStatus encode_rows(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Format& format = args.format;
  const int64_t n = args.w.rows, k = args.w.columns;
  const int64_t groups = groups_in_row(format, k);
  const int64_t group_size = format.group > 0 ? format.group : k;
  const bool nested = format.scale == Scale::Nested;
  Buffer<float> absmaxes(nested ? n * groups : 0);
  void* scales = nested ? absmaxes.data() : args.out.scales;
  Faults faults;
  cut(args.parallel_for, n, grain_rows(k), [&](int64_t begin, int64_t end) {
    RowScratch scratch(k, groups);
    for (int64_t r = begin; r < end; ++r) {
      float* w = scratch.w.data();
      read_row(kernels, args.w, r, w);
      EncodeStatus status;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group_size, count = std::min(k - first, group_size);
        const GroupRange range = kernels.group_range(w + first, count);
        if (!range.finite) {
          status = not_finite(w, k, r);
          break;
        }
        const GroupGrid grid = choose_grid(format, range);
        const EncodeFault fault = scale_fault(format, grid);
        if (fault != EncodeFault::None) {  // unless a weight further on is not even finite
          status = not_finite(w, k, r);
          if (status.fault == EncodeFault::None) status = {fault, r, first, grid.exact, 0};
          break;
        }
        store_scale(scales, format.scale, r * groups + g, grid.scale);
        scratch.zeros[g] = static_cast<uint8_t>(grid.zero);
        quantize_group(kernels, format, grid, w + first, count, scratch.codes.data() + first);
      }
      if (status.fault != EncodeFault::None) {
        faults.add(status);
        continue;
      }
      pack_row(args, r, scratch);
      if (args.out.zeros != nullptr) {
        pack_codes(scratch.zeros.data(), groups, format.bits(), false,
                   args.out.zeros + r * ceil_div(groups * format.bits(), 8));
      }
    }
  });
  if (nested && faults.first().fault == EncodeFault::None) nest_scales(args, absmaxes.data(), n * groups);
  return faults.first();
}

}  // namespace

EncodeStatus encode(const EncodeArgs& args) {
  if (args.format.info().grid == Grid::Cast) return encode_cast(args);
  if (args.format.is_block()) return encode_blocks(args);
  return args.format.group == kPerTensor ? encode_tensor(args) : encode_rows(args);
}

}  // namespace bitfold::cpu
