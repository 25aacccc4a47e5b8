// Which unit multiplies a format's few rows.
#include "cuda/linear_rows.hpp"

#include <stdexcept>

namespace bitfold::cuda {

int64_t linear_rows_workspace(const LinearArgs& args) {
  return args.w.format.is_block() && args.x.rows > 0 ? linear_tile_workspace(args) : 0;
}

void linear_rows(const LinearArgs& args, void* workspace, Stream stream) {
  if (args.w.n == 0 || args.x.rows == 0) return;
  if (args.w.format.is_block()) return linear_tile(args, workspace, stream);
  switch (args.w.format.row) {
    case kE4m3: return linear_rows_of<kE4m3>(args, stream);
    case kE5m2: return linear_rows_of<kE5m2>(args, stream);
    case kInt8: return linear_rows_of<kInt8>(args, stream);
    case kInt4: return linear_rows_of<kInt4>(args, stream);
    case kInt3: return linear_rows_of<kInt3>(args, stream);
    case kInt2: return linear_rows_of<kInt2>(args, stream);
    case kNf4: return linear_rows_of<kNf4>(args, stream);
    case kFp4: return linear_rows_of<kFp4>(args, stream);
    default: throw std::logic_error("this format has no kernel for few rows");
  }
}

}  // namespace bitfold::cuda
