// Launches, one after another in one stream: what a kernel may do before the one ahead of it has ended.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cuda/emulator/block.hpp"
#include "cuda/emulator/sanitizers.hpp"

namespace bitfold::cuda::emulator {
namespace {

std::mutex one_at_a_time;
std::unique_ptr<Grid> held;  // the last launch, where it hasn't happened yet

void check(const Shape& shape) {
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(shape.name) + ": " + why); };
  const dim3 grid = shape.grid;
  if (shape.block.x < 1 || shape.block.x > 1024 || shape.block.y != 1 || shape.block.z != 1) {
    refuse("a block is 1 to 1024 threads of one dimension, got " + position(shape.block));
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid is at least one block and at most (2^31 - 1, 65535, 65535), got " + position(grid));
  }
  const int64_t most = std::min(kSharedBytes, config().shared_bytes);
  if (shape.shared_bytes < 0 || shape.shared_bytes > most) {
    refuse("a block has at most " + std::to_string(most) + " bytes of shared memory, asked for " +
           std::to_string(shape.shared_bytes));
  }
  if (shape.parameter_bytes > 4096) {
    refuse("a kernel takes at most 4096 bytes of parameters, got " + std::to_string(shape.parameter_bytes));
  }
}

std::unique_ptr<Grid> grid_of(const Shape& shape, void (*body)(void*), std::shared_ptr<void> context) {
  auto grid = std::make_unique<Grid>();
  grid->shape = shape;
  grid->body = body;
  grid->context = std::move(context);
  start_random_bits();
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  grid->order.resize(blocks);
  std::iota(grid->order.begin(), grid->order.end(), uint64_t{0});
  if (config().order == Order::Priority) {
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(grid->order[i], grid->order[random_bits() % (i + 1)]);
  }
  return grid;
}

void begin_next(Grid& grid, Block& running) {
  const uint64_t i = grid.order[grid.begun++];
  const dim3 size = grid.shape.grid;
  begin_block(running, dim3(static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                            static_cast<unsigned>(i / size.x / size.y)));
}

// Nothing is running when one of these ends.
struct Reset {
  ~Reset() {
    block = nullptr;
    current = nullptr;
  }
};

// Some blocks, as far as their wait for the kernel before.
void begin_early(Grid& grid) {
  const Reset reset;
  const size_t count = std::min(grid.order.size(), static_cast<size_t>(config().ahead));
  while (grid.begun < count) {
    auto running = std::make_unique<Block>(grid);
    begin_next(grid, *running);
    if (go_on(*running)) end_block(*running);
    else grid.waiting.push_back(std::move(running));
  }
}

void finish(Grid& grid) {
  const Reset reset;
  for (const auto& running : grid.waiting) {
    go_on(*running);
    end_block(*running);
  }
  Block running(grid);
  while (grid.begun < grid.order.size()) {
    begin_next(grid, running);
    go_on(running);
    end_block(running);
  }
  acquire(&grid.end_token);
}

}  // namespace

void run(const Shape& shape, void (*body)(void*), std::shared_ptr<void> context) {
  const std::lock_guard lock(one_at_a_time);
  check(shape);
  std::unique_ptr<Grid> grid = grid_of(shape, body, std::move(context));
  if (const std::unique_ptr<Grid> earlier = std::exchange(held, nullptr)) {
    if (shape.early) begin_early(*grid);
    finish(*earlier);
  }
  grid->earlier_ended = true;
  release(&grid->earlier_token);
  if (config().ahead > 0) held = std::move(grid);
  else finish(*grid);
}

void synchronize() {
  const std::lock_guard lock(one_at_a_time);
  if (const std::unique_ptr<Grid> last = std::exchange(held, nullptr)) finish(*last);
}

}  // namespace bitfold::cuda::emulator
