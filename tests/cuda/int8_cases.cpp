// Products with x rounded to 8 bits, row by row: what int8_cases.py has cases of.
#include "cuda/device.hpp"
#include "cuda/linear_int8.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {

Outputs linear_int8(const CaseFile& file) {
  LinearInt8Args args{.w = file.weight(),
                      .x = file.matrix("x"),
                      .bias = file.data("bias"),
                      .y = nullptr,
                      .threshold = static_cast<double>(file.number("threshold")),
                      .per_row = file.number("per_row") != 0,
                      .x_scale = static_cast<const float*>(file.data("x_scale")),
                      .columns = static_cast<const int32_t*>(file.data("columns")),
                      .copy = file.data("copy"),
                      .copy_dtype = DType::F16,
                      .copies = file.number("copies"),
                      .parallel_for = nullptr};
  Memory y(bytes_of(args.x.dtype, args.x.rows * args.w.n), kUnwritten);
  args.y = y.data();
  const Memory workspace(static_cast<size_t>(cuda::linear_int8_workspace(args)), kUnwritten);
  cuda::linear_int8(args, workspace.data(), nullptr);
  emulator::synchronize();
  Outputs outputs;
  outputs["out y"] = std::move(y);
  return outputs;
}

}  // namespace bitfold::cuda::test
