// Which unit multiplies a format's few rows.
#include "cuda/linear_rows.hpp"

#include <stdexcept>

namespace bitfold::cuda {

void linear_rows(const LinearArgs& args, Stream stream) {
  if (args.w.n == 0 || args.x.rows == 0) return;
  switch (args.w.format.row) {
    case kE4m3: return linear_rows_of<kE4m3>(args, stream);
    case kE5m2: return linear_rows_of<kE5m2>(args, stream);
    case kInt8: return linear_rows_of<kInt8>(args, stream);
    case kInt4: return linear_rows_of<kInt4>(args, stream);
    case kInt3: return linear_rows_of<kInt3>(args, stream);
    case kInt2: return linear_rows_of<kInt2>(args, stream);
    case kNf4:
    case kFp4: return linear_rows_of<kNf4>(args, stream);
    case kQ4_0: return linear_rows_of<kQ4_0>(args, stream);
    case kQ4_1: return linear_rows_of<kQ4_1>(args, stream);
    case kQ5_0: return linear_rows_of<kQ5_0>(args, stream);
    case kQ5_1: return linear_rows_of<kQ5_1>(args, stream);
    case kQ8_0: return linear_rows_of<kQ8_0>(args, stream);
    case kQ2K: return linear_rows_of<kQ2K>(args, stream);
    case kQ3K: return linear_rows_of<kQ3K>(args, stream);
    case kQ4K: return linear_rows_of<kQ4K>(args, stream);
    case kQ5K: return linear_rows_of<kQ5K>(args, stream);
    case kQ6K: return linear_rows_of<kQ6K>(args, stream);
    case kIq4Nl: return linear_rows_of<kIq4Nl>(args, stream);
    case kIq4Xs: return linear_rows_of<kIq4Xs>(args, stream);
    case kMxfp4: return linear_rows_of<kMxfp4>(args, stream);
    default: throw std::logic_error("this format has no kernel for few rows");
  }
}

}  // namespace bitfold::cuda
