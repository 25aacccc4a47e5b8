// Rounding to nearest: scales per group, codes, bit streams, and the double quantization of scales.
//
// A row is read as fp32, its groups get their scales, its codes are packed. A scale per matrix, or per block of rows,
// needs a pass over those first; nested scales are quantized after all rows are done. Faults are collected per row, so
// that the one reported does not depend on the threads.
#include <algorithm>
#include <cmath>

#include "cpu/buffer.hpp"
#include "cpu/cpu.hpp"
#include "cpu/encode_blocks.hpp"
#include "cpu/faults.hpp"
#include "formats/bitstream.hpp"

namespace bitfold::cpu {
namespace {

// ---- fp16 and bf16 ----

EncodeStatus encode_cast(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const bool half = args.format.row == kFp16;
  const DType dtype = half ? DType::F16 : DType::BF16;
  const float largest = args.format.info().grid_max;
  const float limit = cast_limit(half);
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
  const GroupGrid grid = choose_grid(args.format.info(), args.format.zero, args.format.scale, all);
  if (const EncodeFault fault = scale_fault(args.format.info(), grid); fault != EncodeFault::None) {
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

// QLoRA's double quantization of the scales of the whole matrix. docs/formats.md, "dq".
void nest_scales(const EncodeArgs& args, const float* scales, int64_t count) {
  float offset = 0.0f;
  if (args.nested_offset != nullptr) {
    offset = *args.nested_offset;
  } else if (count > 0) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += kNestedSum) {
      double sum = 0.0;
      for (int64_t i = first; i < std::min(count, first + kNestedSum); ++i) sum += static_cast<double>(scales[i]);
      total += sum;
    }
    offset = static_cast<float>(total / static_cast<double>(count));
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
        const GroupGrid grid = choose_grid(format.info(), format.zero, format.scale, range);
        const EncodeFault fault = scale_fault(format.info(), grid);
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

// Scales for some columns of several rows, which are read twice: for the ranges, and for the codes.
EncodeStatus encode_bands(const EncodeArgs& args) {
  const Kernels& kernels = cpu::kernels();
  const Format& format = args.format;
  const int64_t n = args.w.rows, k = args.w.columns, band_rows = int64_t{1} << format.row_shift;
  const int64_t groups = groups_in_row(format, k);
  const auto each_group = [&](const auto& fn) {
    for (int64_t g = 0; g < groups; ++g) fn(g, g * format.group, std::min(k - g * format.group, format.group));
  };
  Faults faults;
  cut(args.parallel_for, ceil_div(n, band_rows), grain_rows(band_rows * k), [&](int64_t begin, int64_t end) {
    RowScratch scratch(k, 0);
    Buffer<GroupRange> ranges(groups);
    Buffer<GroupGrid> grids(groups);
    float* w = scratch.w.data();
    for (int64_t band = begin; band < end; ++band) {
      const int64_t first_row = band * band_rows, end_row = std::min(n, first_row + band_rows);
      EncodeStatus status;
      std::fill_n(ranges.data(), groups, GroupRange{0.0f, 0.0f, true});
      for (int64_t r = first_row; r < end_row && status.fault == EncodeFault::None; ++r) {
        read_row(kernels, args.w, r, w);
        each_group([&](int64_t g, int64_t first, int64_t count) {
          const GroupRange range = kernels.group_range(w + first, count);
          ranges[g] = {std::min(ranges[g].low, range.low), std::max(ranges[g].high, range.high),
                       ranges[g].finite && range.finite};
          if (!range.finite && status.fault == EncodeFault::None) status = not_finite(w, k, r);
        });
      }
      each_group([&](int64_t g, int64_t first, int64_t) {
        if (status.fault != EncodeFault::None) return;
        grids[g] = choose_grid(format.info(), format.zero, format.scale, ranges[g]);
        if (const EncodeFault fault = scale_fault(format.info(), grids[g]); fault != EncodeFault::None) {
          status = {fault, first_row, first, grids[g].exact, 0};
        }
        store_scale(args.out.scales, format.scale, band * groups + g, grids[g].scale);
      });
      if (status.fault != EncodeFault::None) {
        faults.add(status);
        continue;
      }
      for (int64_t r = first_row; r < end_row; ++r) {
        read_row(kernels, args.w, r, w);
        each_group([&](int64_t g, int64_t first, int64_t count) {
          quantize_group(kernels, format, grids[g], w + first, count, scratch.codes.data() + first);
        });
        pack_row(args, r, scratch);
      }
    }
  });
  return faults.first();
}

}  // namespace

EncodeStatus encode(const EncodeArgs& args) {
  if (args.format.info().grid == Grid::Cast) return encode_cast(args);
  if (args.format.is_block()) return encode_blocks(args);
  if (args.format.group == kPerTensor) return encode_tensor(args);
  return args.format.row_shift > 0 ? encode_bands(args) : encode_rows(args);
}

}  // namespace bitfold::cpu
