// Encoding to GGUF's blocks on the GPU: which unit has a type's search, and the means that some searches ask for.
#include "cuda/encode_blocks.hpp"

namespace bitfold::cuda {
namespace {

// ---- the mean of each row's squares: a thread a row, since the sum is one after the other ----

struct MeansRoom {
  float x[kWarp][kWarp + 1];
};

__global__ void __launch_bounds__(kWarp) mean_squares(BlocksArgs a, float* means) {
  auto& room = shared<MeansRoom>();
  const int lane = ptx::lane_id();
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < a.w.rows; first += int64_t{gridDim.x} * kWarp) {
    const int rows = static_cast<int>(smaller<int64_t>(kWarp, a.w.rows - first));
    float sum = 0.0f;
    for (int64_t column = 0; column < a.w.columns; column += kWarp) {
#pragma unroll 8
      for (int r = 0; r < rows; ++r) {
        room.x[r][lane] = read_float(a.w, (first + r) * a.w.row_stride + (column + lane) * a.w.column_stride);
      }
      ptx::sync_warp();
      if (lane < rows) {
        for (int i = 0; i < kWarp; ++i) sum += room.x[lane][i] * room.x[lane][i];
      }
      ptx::sync_warp();
    }
    if (lane < rows) means[first + lane] = sum / static_cast<float>(a.w.columns);
  }
}

}  // namespace

bool block_row_means(const EncodeArgs& args) {
  const int row = args.format.row;
  return args.importance != nullptr && (row == kQ4_0 || row == kQ4_1 || row == kQ5_0 || row == kQ5_1);
}

void encode_blocks(const EncodeArgs& args, float* row_means, Faults* faults, Stream stream) {
  const BlocksArgs a{args.w, args.importance, row_means, static_cast<uint8_t*>(args.out.codes), args.clamp, faults};
  if (a.w.rows == 0 || a.w.columns == 0) return;
  if (row_means != nullptr) {
    launch({grid_for(a.w.rows, kWarp), kWarp, sizeof(MeansRoom), "mean_squares", stream}, mean_squares, a, row_means);
  }
  const bool weighted = args.importance != nullptr;
  const int row = args.format.row;
  switch (row) {
    case kQ4_0:
    case kQ5_0: return weighted ? encode_symmetric(row, a, stream) : encode_legacy(row, a, stream);
    case kQ4_1:
    case kQ5_1: return weighted ? encode_affine(row, a, stream) : encode_legacy(row, a, stream);
    case kQ2K:
    case kQ4K:
    case kQ5K: return encode_affine(row, a, stream);
    case kQ3K:
    case kQ6K: return encode_symmetric(row, a, stream);
    case kIq4Nl:
    case kIq4Xs: return encode_iq4(row, a, stream);
    default: return encode_legacy(row, a, stream);
  }
}

}  // namespace bitfold::cuda
