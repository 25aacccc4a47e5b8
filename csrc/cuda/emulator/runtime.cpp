// A block and its scheduler. A thread runs until it has to wait for others, and then goes straight to the next one.
#include "cuda/emulator/runtime.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cuda/emulator/async_block.hpp"
#include "cuda/emulator/block.hpp"
#include "cuda/emulator/sanitizers.hpp"

namespace bitfold::cuda::emulator {

Block* block;
Thread* current;

std::string line(const char* file, unsigned number) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(number);
}
std::string line(const Where& where) { return line(where.file_name(), where.line()); }

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string position(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

namespace {

uint64_t random_state;
constexpr const char* kWaitForEarlier = "wait_for_earlier";

// ---- the scheduler ----

void swap_ranks(int a, int b) {
  std::swap(block->order[a], block->order[b]);
  const uint32_t ready_a = block->ready_ranks >> a & 1u;
  const uint32_t ready_b = block->ready_ranks >> b & 1u;
  block->ready_ranks &= ~(1u << a | 1u << b);
  block->ready_ranks |= ready_b << a | ready_a << b;
  block->warps[block->order[a]].rank = a;
  block->warps[block->order[b]].rank = b;
}

// The thread to go on with, or null.
Thread* pick() {
  if (block->ready_ranks == 0) return nullptr;
  uint64_t random = 0;
  if (config().order == Order::Priority) {
    random = random_bits();
    if ((random >> 8 & 255) == 0) {
      const auto warps = static_cast<unsigned>((block->threads.size() + 31) / 32);
      swap_ranks(static_cast<int>((random >> 16 & 0xffff) % warps), static_cast<int>((random >> 32 & 0xffff) % warps));
    }
  }
  const int rank = std::countr_zero(block->ready_ranks);
  Warp& warp = block->warps[block->order[rank]];
  const int turn = static_cast<int>(random & 31);
  const int lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) & 31;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block->ready_ranks &= ~(1u << rank);
  return &block->threads[static_cast<size_t>(warp.first + lane)];
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  int returned = 0;
  for (const Thread& thread : block->threads) {
    if (thread.returned) {
      ++returned;
    } else {
      ++waiting[std::string(thread.waits_in) + " at " + line(thread.where)];
    }
  }
  std::string text =
      std::string(block->shape.name) + ", block " + position(block->threads[0].place.block) + ": deadlock: ";
  for (const auto& [what, threads] : waiting) text += std::to_string(threads) + " threads wait in " + what + "; ";
  return text + std::to_string(returned) + " have returned" + missing_at_barriers();
}

// To the next thread or, if there is none, to the host.
Context& next_context() {
  Thread* next = block->error ? nullptr : pick();
  if (!next && !block->error && block->live > 0 && block->waiting_for_earlier == 0) {
    block->error = std::make_exception_ptr(std::runtime_error(deadlock()));
  }
  current = next;
  return next ? next->context : block->host;
}

// ---- barriers and the instructions of warps ----

void complete(Warp& warp) {
  const uint32_t present = std::exchange(warp.present, 0u);
  if (warp.op->whole && present != 0xffffffffu) {
    fail(std::string(warp.op->name) + " needs all 32 lanes, and some have returned", warp.where);
  }
  if (warp.op->orders_memory) ++warp.tokens.phase;
  if (warp.op->compute) warp.op->compute(warp.arguments, present);
  for (uint32_t lanes = present; lanes; lanes &= lanes - 1) {
    Thread& thread = block->threads[static_cast<size_t>(warp.first + std::countr_zero(lanes))];
    if (&thread != current) wake(thread);
  }
}

void open(Barrier& barrier) {
  ++barrier.tokens.phase;
  barrier.present = 0;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void come_to(Barrier& barrier, const char* name, int threads, bool stay, const Where& where) {
  const bool first = barrier.present == 0;
  if (first) {
    barrier.where = where;
    barrier.threads = threads;
  }
  unsigned char* token = &barrier.tokens.token[barrier.tokens.phase & 1];
  release(token);
  if (++barrier.present == barrier.threads) {
    open(barrier);
  } else if (stay) {
    {
      const Unseen unseen;
      barrier.waiting.push_back(current);
    }
    wait(name, where);
  }
  if (stay) acquire(token);
}

// ---- a thread's life ----

// The others no longer wait for this one.
void take_leave(Thread& thread) {
  if (block->shape.early && !thread.has_waited) {
    throw std::runtime_error(std::string(block->shape.name) + ", block " + position(thread.place.block) + ", thread " +
                             std::to_string(thread.index) +
                             ": it may begin early, and returns without a wait_for_earlier");
  }
  Warp& warp = *thread.warp;
  thread.returned = true;
  warp.live &= ~thread.lane_bit;
  --block->live;
  if (warp.present && warp.present == warp.live) complete(warp);
  Barrier& barrier = block->barriers[0];
  barrier.threads = block->live;
  if (barrier.present && barrier.present == barrier.threads) open(barrier);
  if (!block->async) return;
  if (warp.live == 0) check_warpgroup_at_the_end(thread);
  if (block->live == 0) check_barriers_at_the_end();
}

[[noreturn]] void leave(Thread& self) {
  release(&block->grid->end_token);
  leave_for_good(self.context, next_context());
}

void thread_body() {
  Thread& self = *current;
  arrive(self.context);
  acquire(&block->grid->start_token);
  try {
    block->grid->body(block->grid->context.get());
    finish_copies(self);
    take_leave(self);
  } catch (...) {
    block->error = std::current_exception();
  }
  leave(self);
}

// Those of blocks that have ended.
std::vector<std::unique_ptr<Stacks>> idle_stacks;

void set_up(Thread& thread, int index, const dim3& at) {
  const dim3 size = block->shape.block;
  const auto i = static_cast<unsigned>(index);
  thread.place = {.thread = dim3(i, 0, 0), .block = at, .block_size = size, .grid_size = block->shape.grid};
  thread.index = index;
  thread.warp = &block->warps[index / 32];
  thread.lane_bit = 1u << index % 32;
  thread.returned = thread.has_waited = false;
  thread.waits_in = nullptr;
  thread.copies.clear();
  thread.issued = 0;
  thread.committed = thread.arrived = 0;
  thread.product_groups = thread.product_groups_done = 0;
  prepare(thread.context, block->stacks->at(static_cast<size_t>(index)), thread_body);
  thread.warp->ready |= thread.lane_bit;
  thread.warp->live |= thread.lane_bit;
}

// Those of blocks of one parity that have ended.
std::vector<std::vector<Watched>>& idle_watched(Grid& grid, const dim3& at) {
  const dim3 size = grid.shape.grid;
  const uint64_t number = (uint64_t{at.z} * size.y + at.y) * size.x + at.x;
  return grid.idle_watched[std::popcount(number) & 1];
}

// Gives the threads of a block that begins fibers.
void watch(Block& running, const dim3& at) {
  auto& idle = idle_watched(*running.grid, at);
  if (idle.empty()) {
    for (Thread& thread : running.threads) thread.watched = {.thread = __tsan_create_fiber(0)};
  } else {
    for (size_t i = 0; i < running.threads.size(); ++i) running.threads[i].watched = idle.back()[i];
    const Unseen unseen;
    idle.pop_back();
  }
}

void unwatch(Block& running) {
  std::vector<Watched> set;
  for (Thread& thread : running.threads) set.push_back(std::exchange(thread.watched, {}));
  idle_watched(*running.grid, running.threads[0].place.block).push_back(std::move(set));
}

Memory allocate(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  return Memory(static_cast<unsigned char*>(memory));
}

}  // namespace

Grid::~Grid() {
  for (const auto& sets : idle_watched) {
    for (const std::vector<Watched>& set : sets) {
      for (const Watched& watched : set) {
        for (void* fiber : {watched.thread, watched.copier, watched.engine}) {
          if (fiber) __tsan_destroy_fiber(fiber);
        }
      }
    }
  }
}

Block::Block(Grid& of) : grid(&of), shape(of.shape), threads(of.shape.block.x) {}
Block::~Block() = default;

void begin_block(Block& running, const dim3& at) {
  block = &running;
  const int threads = static_cast<int>(block->shape.block.x);
  const int warps = (threads + 31) / 32;
  const auto shared_bytes = static_cast<size_t>(block->shape.shared_bytes);
  {
    const Unseen unseen;
    block->shared_memory = allocate(1024, shared_bytes);
    block->shared = block->shared_memory.get();
    std::memset(block->shared, config().poison, shared_bytes);
    block->tokens = allocate(64, static_cast<size_t>(threads * (kCopyTokens + kProductTokens) + 2 * (warps + 16)));
    block->async.reset();
    if (idle_stacks.empty()) idle_stacks.push_back(std::make_unique<Stacks>());
    block->stacks = std::move(idle_stacks.back());
    idle_stacks.pop_back();
  }
  // Tokens are the block's own: those of another would bring its order along.
  auto take_tokens = [next = block->tokens.get()](int count) mutable { return std::exchange(next, next + count); };
  if (with_tsan()) {
    block->stacks->renew();
    watch(*block, at);
  }
  block->waiting_for_earlier = 0;
  std::iota(block->order, block->order + warps, 0);
  if (config().order == Order::Priority) {
    for (int i = warps - 1; i > 0; --i)
      std::swap(block->order[i], block->order[random_bits() % static_cast<unsigned>(i + 1)]);
  }
  for (int rank = 0; rank < warps; ++rank) {
    const int w = block->order[rank];
    block->warps[w] = Warp{};
    block->warps[w].rank = rank;
    block->warps[w].first = 32 * w;
    block->warps[w].tokens.token = take_tokens(2);
  }
  for (Barrier& barrier : block->barriers) {
    barrier.present = 0;
    barrier.waiting.clear();
    barrier.tokens = Tokens{.token = take_tokens(2)};
  }
  block->live = threads;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block->threads[static_cast<size_t>(i)];
    set_up(thread, i, at);
    thread.copy_tokens = take_tokens(kCopyTokens);
    thread.product_tokens = take_tokens(kProductTokens);
    thread.context.tsan = thread.watched.thread;
  }
  release(&block->grid->start_token);  // fibers that are taken again come after nothing else of the host's
  block->ready_ranks = warps == 32 ? 0xffffffffu : (1u << warps) - 1u;
}

bool go_on(Block& running) {
  block = &running;
  if (block->waiting_for_earlier > 0 && block->grid->earlier_ended) {
    block->waiting_for_earlier = 0;
    for (Thread& thread : block->threads) {
      if (thread.waits_in == kWaitForEarlier) wake(thread);
    }
  }
  if (with_tsan()) block->host.tsan = __tsan_get_current_fiber();
  go(block->host, next_context());
  current = nullptr;
  return block->live == 0 || block->error;
}

void end_block(Block& running) {
  const Unseen unseen;
  if (with_tsan()) unwatch(running);
  running.shared_memory.reset();
  running.tokens.reset();
  idle_stacks.push_back(std::move(running.stacks));
  if (running.error) std::rethrow_exception(running.error);
}

Config& config() {
  static Config values;
  return values;
}

Config schedule(int number) {
  constexpr Delivery kDeliveries[] = {Delivery::Late, Delivery::Early, Delivery::Random};
  constexpr uint8_t kPoisons[] = {0xff, 0x00, 0x5a};
  Config values;
  values.seed = static_cast<uint64_t>(number) + 1;
  values.order = number % 4 == 0 ? Order::Sequential : Order::Priority;
  values.delivery = kDeliveries[number % 3];
  values.poison = kPoisons[number % 3];
  return values;
}

uint64_t random_bits() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void start_random_bits() { random_state = config().seed; }

const Place& place() { return current->place; }

static std::string sentence(const std::string& what, const std::string& at) {
  std::string text = block->shape.name;
  if (current) text += ", block " + position(current->place.block) + ", thread " + std::to_string(current->index);
  return text + ": " + what + " at " + at;
}

void fail(const std::string& what, const Where& where) {
  const Unseen unseen;
  throw std::runtime_error(sentence(what, line(where)));
}
void fail_here(const std::string& what, const char* file, unsigned line) {
  {
    const Unseen unseen;
    block->error = std::make_exception_ptr(std::runtime_error(sentence(what, emulator::line(file, line))));
  }
  leave(*current);
}

void* shared_memory(size_t bytes, const Where& where) {
  if (static_cast<int64_t>(bytes) > block->shape.shared_bytes) {
    fail("shared() of " + std::to_string(bytes) + " bytes, launched with " + std::to_string(block->shape.shared_bytes),
         where);
  }
  return block->shared;
}

void wait(const char* in, const Where& where) {
  Thread& self = *current;
  self.waits_in = in;
  self.where = where;
  go(self.context, next_context());
}

void wake(Thread& thread) {
  thread.waits_in = nullptr;
  thread.warp->ready |= thread.lane_bit;
  block->ready_ranks |= 1u << thread.warp->rank;
}

void wait_for_earlier(const Where& where) {
  current->has_waited = true;
  if (!block->grid->earlier_ended) {
    ++block->waiting_for_earlier;
    wait(kWaitForEarlier, where);
  }
  acquire(&block->grid->earlier_token);
}

void let_later_begin(const Where& where) {
  if (block->shape.early && !current->has_waited) {
    fail("let_later_begin before wait_for_earlier: a kernel that begins then would meet two others", where);
  }
}

void sync_block(const Where& where) {
  Barrier& barrier = block->barriers[0];
  if (barrier.present && !same(barrier.where, where)) {
    fail("some threads of the block are in sync_block at " + line(barrier.where) + ", others in sync_block", where);
  }
  come_to(barrier, "sync_block", block->live, true, where);
}

namespace {

void named_barrier(int number, const char* name, int threads, bool stay, const Where& where) {
  if (number < 1 || number > 15) fail("barriers are 1 to 15, got " + std::to_string(number), where);
  if (threads < 32 || threads % 32 != 0)
    fail("a barrier is for whole warps, got " + std::to_string(threads) + " threads", where);
  Barrier& barrier = block->barriers[number];
  if (barrier.present && barrier.threads != threads) {
    fail("barrier " + std::to_string(number) + " is for " + std::to_string(barrier.threads) + " threads at " +
             line(barrier.where) + ", and for " + std::to_string(threads),
         where);
  }
  come_to(barrier, name, threads, stay, where);
}

}  // namespace

void bar_sync(int barrier, int threads, const Where& where) {
  named_barrier(barrier, "bar_sync", threads, true, where);
}
void bar_arrive(int barrier, int threads, const Where& where) {
  named_barrier(barrier, "bar_arrive", threads, false, where);
}

void collective(const WarpOp& op, void* arguments, const Where& where) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  if (warp.present == 0) {
    warp.op = &op;
    warp.where = where;
  } else if (warp.op != &op || !same(warp.where, where)) {
    fail(std::string("some lanes of the warp are in ") + warp.op->name + " at " + line(warp.where) + ", others in " +
             op.name,
         where);
  }
  warp.arguments[self.index % 32] = arguments;
  warp.present |= self.lane_bit;
  unsigned char* token = &warp.tokens.token[warp.tokens.phase & 1];
  if (op.orders_memory) release(token);
  if (warp.present == warp.live) {
    complete(warp);
  } else {
    wait(op.name, where);
  }
  if (op.orders_memory) acquire(token);
}

}  // namespace bitfold::cuda::emulator
