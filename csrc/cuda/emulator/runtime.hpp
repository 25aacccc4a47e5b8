// What the emulator's headers ask of its run time (runtime.cpp, memory.cpp, mma.cpp), and what a test may choose.
// Everything here is compiled once and without sanitizers' instrumentation, so that they see the kernel alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/emulator/where.hpp"

namespace bitfold::cuda {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

// ---- what a test chooses ----

// Sequential: blocks, warps and lanes in order. Priority: blocks in random order, and always the warp that comes first
// in a random order that seldom changes: unlike a fair choice it lets warps run far ahead of others.
enum class Order : uint8_t { Sequential, Priority };

// When the bytes of cp_async arrive: when waited for (before, the place holds poison), at once, or either.
enum class Delivery : uint8_t { Late, Early, Random };

inline constexpr int64_t kSharedBytes = 227 * 1024;  // what one block may have

struct Config {
  uint64_t seed = 1;
  Order order = Order::Sequential;
  Delivery delivery = Delivery::Late;
  uint8_t poison = 0xff;  // every byte of shared memory at the start: as floats NaN; 0x00 and others find integers
  int multiprocessors = 132;
  int64_t shared_bytes = kSharedBytes;  // less than what one block may have, where smaller
  int capability = 90;
  // 0: a launch has happened when it returns. Else it waits for the next one, or for synchronize(), and so many blocks
  // of a kernel that may begin early do what precedes their wait before the kernel ahead of it does anything.
  int ahead = 0;
};
Config& config();

// The schedules to test a kernel with: any three in a row have a late, an early and a random delivery, two orders and
// three poisons. A correct kernel gives the same bits in all of them.
Config schedule(int number);

// ---- a launch ----

struct Shape {
  dim3 grid;
  dim3 block;
  int64_t shared_bytes;
  int64_t parameter_bytes;
  const char* name;
  bool early;
};

// Runs body(context) once for each thread of the grid, now or later (Config::ahead). What a kernel throws or does wrong
// is thrown where it runs.
void run(const Shape& shape, void (*body)(void* context), std::shared_ptr<void> context);
// All that was launched has happened.
void synchronize();

// ---- what a thread asks ----

struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& place();

// Ends the launch with a sentence that names the kernel, the block, the thread and the line.
[[noreturn]] void fail(const std::string& what, const Where& where);
// The same for what may not throw: the thread runs no further, and destroys nothing.
[[noreturn]] void fail_here(const std::string& what, const char* file, unsigned line);

void* shared_memory(size_t bytes, const Where& where);

void wait_for_earlier(const Where& where);
void let_later_begin(const Where& where);

void sync_block(const Where& where);
void bar_sync(int barrier, int threads, const Where& where);
void bar_arrive(int barrier, int threads, const Where& where);

// An instruction of all lanes of a warp. Each comes with its arguments, and the last one computes for all.
struct WarpOp {
  const char* name;
  bool whole;  // no lane may have returned
  bool orders_memory;
  void (*compute)(void* const (&arguments)[32], uint32_t present);
};
void collective(const WarpOp& op, void* arguments, const Where& where);

// The arguments of one lane.
struct Exchange {
  uint32_t value;  // becomes the result
  int lane;        // which lane's value
  const Where* where;
};
void shuffle(Exchange& exchange, const Where& where);

enum class Vote : uint8_t { Ballot, Any, All };
uint32_t vote(Vote kind, bool value, const Where& where);

void sync_warp(const Where& where);

// ---- memory ----

// Aligned, and as far as AddressSanitizer knows allocated.
void check_access(const void* address, int alignment, int bytes, const Where& where);
void check_shared(const void* address, int bytes, const char* what, const Where& where);
void cp_async(void* shared, const void* global, int size, int bytes, const Where& where);
void cp_async_commit();
void cp_async_wait(int groups);

// ---- matrices ----

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* shared, const Where& where);

enum class Operands : uint8_t { F16, Bf16, S8, U8S8 };
void mma(Operands operands, void* d, const uint32_t* a, const uint32_t* b, bool zero, const Where& where);

}  // namespace emulator
}  // namespace bitfold::cuda
