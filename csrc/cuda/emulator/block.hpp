// The block that is running: its threads, warps and barriers, and the grid that it is of. Only the emulator's own
// sources include this.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emulator/fiber.hpp"
#include "cuda/emulator/runtime.hpp"

namespace bitfold::cuda::emulator {

struct Async;  // async_block.hpp
struct Warp;

// A thread as ThreadSanitizer's, and what goes on beside it: each a fiber of its own, or null.
struct Watched {
  void* thread = nullptr;
  void* copier = nullptr;  // cp_async
  void* engine = nullptr;  // bulk copies and products' reads
};

// A copy that was issued and hasn't arrived.
struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int size;
  int bytes;
  int group;
  int64_t number;  // of the thread's copies
};

struct Thread {
  Context context;
  Place place;
  int index = 0;
  Warp* warp = nullptr;
  uint32_t lane_bit = 0;
  bool returned = false;
  bool has_waited = false;         // for the kernel before
  const char* waits_in = nullptr;  // null while it can run
  Where where;

  std::vector<Copy> copies;
  int64_t issued = 0;  // copies
  int committed = 0;   // groups
  int arrived = 0;     // groups, of the oldest, that were waited for
  unsigned char* copy_tokens = nullptr;

  int product_groups = 0;  // of wgmma, and how many of the oldest were waited for
  int product_groups_done = 0;
  unsigned char* product_tokens = nullptr;

  Watched watched;
};
inline constexpr int kCopyTokens = 64;  // the group's number modulo this
inline constexpr int kProductTokens = 16;

// Two tokens, by turns: with one, who leaves late would also see what comes before the next arrivals.
struct Tokens {
  unsigned char* token = nullptr;  // 2
  unsigned phase = 0;
};

struct Warp {
  int rank = 0;          // its place in Block::order
  int first = 0;         // thread
  uint32_t ready = 0;    // lanes that can run
  uint32_t live = 0;     // lanes that haven't returned
  uint32_t present = 0;  // lanes that have come to the instruction
  const WarpOp* op = nullptr;
  Where where;
  void* arguments[32] = {};
  Tokens tokens;
};

struct Barrier {
  int threads = 0;
  int present = 0;
  Where where;
  std::vector<Thread*> waiting;
  Tokens tokens;
};

struct FreeMemory {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, FreeMemory>;

struct Block;

// A kernel that was launched.
struct Grid {
  Shape shape;
  void (*body)(void*) = nullptr;
  std::shared_ptr<void> context;
  std::vector<uint64_t> order;                  // of its blocks
  size_t begun = 0;                             // of these
  std::vector<std::unique_ptr<Block>> waiting;  // blocks that have begun and wait for the kernel before
  bool earlier_ended = false;                   // the kernel before
  unsigned char start_token, earlier_token, end_token;
  // Fibers of blocks that have ended, to be taken again: each is a large object that has to be made. ThreadSanitizer
  // takes two blocks of one set for one after the other. So there are two sets, and which a block has is the parity of
  // its number's bits: of a race between many pairs of blocks some pairs are seen, one between a single pair may not
  // be.
  std::vector<std::vector<Watched>> idle_watched[2];

  ~Grid();
};

struct Block {
  explicit Block(Grid& of);
  ~Block();

  Grid* grid;
  Shape shape;
  Context host;
  std::vector<Thread> threads;
  std::unique_ptr<Stacks> stacks;  // of its threads, while it runs
  Memory shared_memory, tokens;
  int waiting_for_earlier = 0;  // threads
  Warp warps[32];
  int order[32];             // rank -> warp
  uint32_t ready_ranks = 0;  // warps with a lane that can run
  int live = 0;
  Barrier barriers[16];  // 0 is sync_block's, for all that haven't returned
  unsigned char* shared = nullptr;
  std::unique_ptr<Async> async;  // null where the kernel uses nothing of it
  std::exception_ptr error;
};

extern Block* block;     // null outside of a launch
extern Thread* current;  // null on the host's side

uint64_t random_bits();
void start_random_bits();  // from Config::seed on
std::string position(const dim3& at);

// ---- runtime.cpp: a block's life ----

void begin_block(Block& running, const dim3& at);
// Until all threads have returned, or wait for the kernel before: whether they have returned.
bool go_on(Block& running);
void end_block(Block& running);  // throws what a thread has thrown

// ---- for what threads come to ----

// The running thread stops until wake() of it.
void wait(const char* in, const Where& where);
void wake(Thread& thread);

// What a thread leaves behind arrives before the kernel ends, and nobody waits for it.
void finish_copies(Thread& thread);
// Those of the thread's first `count` copies that haven't arrived.
void deliver_copies(Thread& thread, int64_t count);

void check_shared_range(const void* address, int bytes, const char* what, const Where& where);

// ThreadSanitizer hears of what goes on beside a thread as of something that another one does, after all that the
// thread has done so far; between the two, the engine's accesses are shown. Who acquires the token comes after them.
void enter_engine(Thread& self, unsigned char* token);
void leave_engine(Thread& self, unsigned char* token);
// Who acquires the token comes after the thread's copies so far.
void release_after_copies(Thread& self, unsigned char* token);

bool same(const Where& a, const Where& b);
std::string line(const Where& where);

}  // namespace bitfold::cuda::emulator
