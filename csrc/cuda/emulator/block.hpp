// The block that is running: its threads, warps and barriers. Only the emulator's own sources include this.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <vector>

#include "cuda/emulator/fiber.hpp"
#include "cuda/emulator/runtime.hpp"

namespace bitfold::cuda::emulator {

struct Warp;

// A copy that was issued and hasn't arrived.
struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int size;
  int bytes;
  int group;
};

struct Thread {
  Context context;
  Place place;
  int index = 0;
  Warp* warp = nullptr;
  uint32_t lane_bit = 0;
  bool returned = false;
  const char* waits_in = nullptr;  // null while it can run
  Where where;

  std::vector<Copy> copies;
  int committed = 0;            // groups
  int arrived = 0;              // groups, of the oldest, that were waited for
  void* tsan_copier = nullptr;  // copies run beside their thread
  unsigned char* copy_tokens = nullptr;
};
inline constexpr int kCopyTokens = 64;  // the group's number modulo this

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

struct Block {
  Shape shape;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  Context host;
  std::vector<Thread> threads;
  Warp warps[32];
  int order[32];             // rank -> warp
  uint32_t ready_ranks = 0;  // warps with a lane that can run
  int live = 0;
  Barrier barriers[16];  // 0 is sync_block's, for all that haven't returned
  unsigned char* shared = nullptr;
  std::exception_ptr error;
  unsigned char start_token, end_token;
};

extern Block* block;     // null outside of a launch
extern Thread* current;  // null on the host's side

uint64_t random_bits();

// The running thread stops until wake() of it.
void wait(const char* in, const Where& where);
void wake(Thread& thread);

// What a thread leaves behind arrives before the kernel ends, and nobody waits for it.
void finish_copies(Thread& thread);

}  // namespace bitfold::cuda::emulator
