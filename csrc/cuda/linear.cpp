// y = x W^T + b: the plan's kernel.
#include <stdexcept>

#include "cuda/kernels.hpp"
#include "cuda/plan.hpp"

namespace bitfold::cuda {
namespace {

LinearPlan plan(const LinearArgs& args) { return plan_linear(args.w.format, args.w.layout, args.x.rows, args.x.dtype); }

}  // namespace

int64_t linear_workspace(const LinearArgs& args) {
  switch (plan(args).regime) {
    case Regime::Rows: return linear_rows_workspace(args);
    case Regime::Tile: return linear_tile_workspace(args);
    default: return 0;
  }
}

void linear(const LinearArgs& args, void* workspace, Stream stream) {
  switch (plan(args).regime) {
    case Regime::Rows: return linear_rows(args, workspace, stream);
    case Regime::Tile: return linear_tile(args, workspace, stream);
    case Regime::Floor: return linear_floor(args, stream);
    case Regime::Matmul: throw std::logic_error("torch multiplies here: the border decodes");
  }
}

}  // namespace bitfold::cuda
