// Which unit multiplies a format's few rows.
#include "cuda/linear_rows.hpp"

#include <stdexcept>

namespace bitfold::cuda {

namespace {

void call_rows(const RowsCall& call) {
  switch (call.args.w.format.row) {
    case kE4m3: return linear_rows_of<kE4m3>(call);
    case kE5m2: return linear_rows_of<kE5m2>(call);
    case kInt8: return linear_rows_of<kInt8>(call);
    case kInt4: return linear_rows_of<kInt4>(call);
    case kInt3: return linear_rows_of<kInt3>(call);
    case kInt2: return linear_rows_of<kInt2>(call);
    case kNf4:
    case kFp4: return linear_rows_of<kNf4>(call);
    case kQ4_0: return linear_rows_of<kQ4_0>(call);
    case kQ4_1: return linear_rows_of<kQ4_1>(call);
    case kQ5_0: return linear_rows_of<kQ5_0>(call);
    case kQ5_1: return linear_rows_of<kQ5_1>(call);
    case kQ8_0: return linear_rows_of<kQ8_0>(call);
    case kQ2K: return linear_rows_of<kQ2K>(call);
    case kQ3K: return linear_rows_of<kQ3K>(call);
    case kQ4K: return linear_rows_of<kQ4K>(call);
    case kQ5K: return linear_rows_of<kQ5K>(call);
    case kQ6K: return linear_rows_of<kQ6K>(call);
    case kIq4Nl: return linear_rows_of<kIq4Nl>(call);
    case kIq4Xs: return linear_rows_of<kIq4Xs>(call);
    case kMxfp4: return linear_rows_of<kMxfp4>(call);
    default: throw std::logic_error("this format has no kernel for few rows");
  }
}

}  // namespace

int64_t linear_rows_workspace(const LinearArgs& args) {
  int64_t wanted = 0;
  call_rows({args, nullptr, nullptr, &wanted});
  return wanted;
}

void linear_rows(const LinearArgs& args, void* workspace, Stream stream) {
  call_rows({args, workspace, stream, nullptr});
}

}  // namespace bitfold::cuda
