// What every product ends with.
#pragma once

#include "cpu/buffer.hpp"
#include "cpu/kernels.hpp"

namespace bitfold::cpu {

// Sums of weight rows [begin, end) and one row of x, times the row's scale, plus bias, to row j of y.
class Epilogue {
 public:
  Epilogue(const Kernels& kernels, const LinearArgs& args, int64_t begin, int64_t end)
      : kernels_(kernels), args_(args), begin_(begin), count_(end - begin), bias_(args.bias != nullptr ? count_ : 0) {
    const int64_t size = dtype_bytes(args.x.dtype);
    if (args.bias != nullptr) {
      kernels.to_float(static_cast<const char*>(args.bias) + begin * size, args.x.dtype, count_, bias_.data());
    }
  }
  void operator()(int64_t j, float* sums) {
    if (args_.row_scales != nullptr) {
      const float scale = args_.row_scales[j];
      for (int64_t i = 0; i < count_; ++i) sums[i] *= scale;
    }
    if (args_.bias != nullptr) {
      for (int64_t i = 0; i < count_; ++i) sums[i] += bias_[i];
    }
    const int64_t at = (j * args_.w.n + begin_) * dtype_bytes(args_.x.dtype);
    kernels_.from_float(sums, count_, args_.x.dtype, static_cast<char*>(args_.y) + at);
  }

 private:
  const Kernels& kernels_;
  const LinearArgs& args_;
  int64_t begin_;
  int64_t count_;
  Buffer<float> bias_;
};

}  // namespace bitfold::cpu
