// What a block has of Hopper's asynchronous instructions: made by the first of them that it comes to.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/emulator/async.hpp"
#include "cuda/emulator/block.hpp"

namespace bitfold::cuda::emulator {

// ---- barriers.cpp ----

struct BulkCopy {
  unsigned char* shared;
  unsigned bytes;
  const unsigned char* global;  // or null: a box of a matrix, from this byte of this line on
  ByteMatrix matrix = {};
  int64_t byte = 0, line = 0;
};
// An arrival that comes when the thread's first `copies` cp_async are there.
struct CopiesArrival {
  Thread* thread;
  int64_t copies;
};

struct AsyncBarrier {
  unsigned arrivals = 0;  // of each phase
  unsigned pending = 0;   // of these, in this phase
  int64_t bytes = 0;      // that were expected and aren't there
  unsigned phase = 0;
  const Thread* initialised_by = nullptr;
  bool visible = false;  // to copy_bulk
  // Late ones, which come when a thread waits and nothing else is left to come.
  std::vector<BulkCopy> bulk_copies;
  std::vector<CopiesArrival> copies_arrivals;
  std::vector<Thread*> waiting;
};

// ---- wgmma.cpp ----

// A product that was issued and isn't done: a warp's 16 rows.
struct PendingProduct {
  Product lanes[32];
  uint32_t a[32][4];  // at the issue
  std::vector<uint32_t>
      sums[32];  // bits of what the product is added to; if that isn't done either, it will bring them
  int group = 0;
  int warp = 0;  // of the warpgroup
  Where where;
};

// Registers that a product has used: what they held at the last wgmma_fence, or what a product left there since.
struct KnownRegisters {
  const void* registers[32];
  std::vector<uint32_t> values[32];
};

struct WarpOfGroup {
  size_t steps = 0;  // of the warpgroup's, that it has come to
  int committed = 0;
  bool fenced = false;
  std::vector<PendingProduct> products;
  std::vector<KnownRegisters> known;
};

// All warps of a warpgroup must come to the same instructions, though not at the same time.
struct WarpgroupStep {
  const WarpOp* op;
  Where where;
  uint64_t operand;
  bool flag;
};

struct Async {
  // Shared memory as the async proxy sees it: with what copy_bulk wrote, and of other writes what a fence_async came
  // after. Here a fence is for all writes so far, whoever made them.
  std::vector<unsigned char> seen;
  std::map<const void*, AsyncBarrier> barriers;
  std::vector<WarpgroupStep> steps[8];  // of a warpgroup
  WarpOfGroup warps[32];
};

Async& async();
// The block's bytes as the async proxy sees them; an error where they were written and not fenced.
const unsigned char* seen_by_async(const unsigned char* shared, int bytes, const char* what, const Where& where);

// At the return of a thread, whose warp and block may end with it.
void check_barriers_at_the_end();
void check_warpgroup_at_the_end(const Thread& thread);

// For the report of a deadlock: what is missing at the barriers that are waited for.
std::string missing_at_barriers();

}  // namespace bitfold::cuda::emulator
