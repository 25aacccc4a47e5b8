// y = x W^T + b: the plan's kernel.
#include <stdexcept>

#include "cuda/kernels.hpp"
#include "cuda/plan.hpp"

namespace bitfold::cuda {
namespace {

// The floor also takes what has no columns, where y is the bias.
Regime regime(const LinearArgs& args) {
  if (args.w.k == 0) return Regime::Floor;
  const Gpu device = gpu();
  return plan_linear(args.w.format, args.w.layout, args.x.rows, args.w.n, args.x.dtype, device.wgmma,
                     device.shared_bytes)
      .regime;
}
bool empty(const LinearArgs& args) { return args.x.rows == 0 || args.w.n == 0; }

}  // namespace

int64_t linear_workspace(const LinearArgs& args) {
  if (empty(args)) return 0;
  const Regime chosen = regime(args);
  if (chosen == Regime::Rows) return linear_rows_workspace(args);
  return chosen == Regime::Tile || chosen == Regime::Wgmma ? linear_tile_workspace(args) : 0;
}

void linear(const LinearArgs& args, void* workspace, Stream stream) {
  if (empty(args)) return;
  switch (regime(args)) {
    case Regime::Rows: return linear_rows(args, workspace, stream);
    case Regime::Tile:
    case Regime::Wgmma: return linear_tile(args, workspace, stream);
    case Regime::Floor: return linear_floor(args, stream);
    case Regime::Matmul: throw std::logic_error("torch multiplies here: the border decodes");
  }
}

}  // namespace bitfold::cuda
