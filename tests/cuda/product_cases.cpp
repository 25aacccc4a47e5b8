// Products with a matrix of any format, and their gradient: what product_cases.py has cases of.
#include "cuda/cuda.hpp"
#include "cuda/device.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {

Outputs linear(const CaseFile& file) {
  LinearArgs args{
      .w = file.weight(), .x = file.matrix("x"), .bias = file.data("bias"), .y = nullptr, .parallel_for = nullptr};
  Memory y(bytes_of(args.x.dtype, args.x.rows * args.w.n), kUnwritten);
  args.y = y.data();
  const Memory workspace(static_cast<size_t>(cuda::linear_workspace(args)), kUnwritten);
  cuda::linear(args, workspace.data(), nullptr);
  emulator::synchronize();
  Outputs outputs;
  outputs["y"] = std::move(y);
  return outputs;
}

Outputs linear_grad_x(const CaseFile& file) {
  LinearGradArgs args{.w = file.weight(), .dy = file.matrix("dy"), .dx = nullptr, .parallel_for = nullptr};
  Memory dx(bytes_of(args.dy.dtype, args.dy.rows * args.w.k), kUnwritten);
  args.dx = dx.data();
  cuda::linear_grad_x(args, nullptr);
  Outputs outputs;
  outputs["y"] = std::move(dx);
  return outputs;
}

}  // namespace bitfold::cuda::test
