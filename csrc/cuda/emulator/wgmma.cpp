// Products of warpgroups. Each warp comes to the instructions by itself, since nothing says that they wait for each
// other; a product is made when it is waited for, or early, as copies arrive.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "cuda/emulator/async_block.hpp"
#include "cuda/emulator/sanitizers.hpp"
#include "cuda/emulator/tensor_core.hpp"
#include "formats/numeric.hpp"

namespace bitfold::cuda::emulator {
namespace {

constexpr int kDepth = 16;
constexpr uint32_t kInFlight = 0x7fedcba9u;  // what sums hold until they are there: a NaN

// ---- the matrix in shared memory ----

constexpr uint64_t kOfBoxes = uint64_t{1} << 62;  // lines as copy_box turns them

struct Matrix {
  int64_t start, leading, stride;
  bool of_boxes;

  // Where the eight halves or 16 bytes from k on begin.
  int64_t row(int column, int k) const {
    if (!of_boxes) return start + column / 8 * stride + k / 8 * leading + column % 8 * 16;
    const int64_t at = start + column / 8 * stride + column % 8 * kBoxBytes + k / 8 * 16;
    return at ^ (at >> 7 & 7) << 4;
  }
};

Matrix decode(uint64_t descriptor) {
  const auto field = [=](int bit) { return static_cast<int64_t>(descriptor >> bit & 0x3fffu) << 4; };
  return {field(0), field(16), field(32), (descriptor & kOfBoxes) != 0};
}

void check_matrix(uint64_t descriptor, int n, const Where& where) {
  constexpr uint64_t kFields = kOfBoxes | 0x00003fff3fff3fffu;
  if (descriptor & ~kFields) fail("a descriptor of wgmma has bits that mean other swizzles or nothing", where);
  const Matrix b = decode(descriptor);
  if (b.of_boxes && (b.start % 1024 > 112 || b.stride % 1024 != 0))
    fail("lines of boxes lie in shared memory from a multiple of 1024 on", where);
  for (int column = 0; column < n; column += 8) {
    for (int k = 0; k < kDepth; k += 8) {
      const int64_t begin = b.row(column, k), end = begin + (b.of_boxes ? 1024 - begin % 1024 : 128);
      if (end > block->shape.shared_bytes) {
        fail("wgmma at bytes " + std::to_string(begin) + " ... " + std::to_string(end - 1) + " of " +
                 std::to_string(block->shape.shared_bytes) + " of shared memory",
             where);
      }
    }
  }
}

// The lane's share of the reads, as something that another thread does between the issue and the wait.
void show_to_tsan(Thread& self, const Product& product) {
  const Matrix b = decode(product.b);
  unsigned char* token = &self.product_tokens[self.product_groups % kProductTokens];
  enter_engine(self, token);
  const auto read = [&](const Matrix& matrix, int n) {
    const int rows = 2 * n / 32;  // of 16 bytes each
    for (int i = self.index % 32 * rows; i < (self.index % 32 + 1) * rows; ++i) {
      __tsan_read_range(block->shared + matrix.row(i / 16 * 8 + i % 8, i / 8 % 2 * 8), 16);
    }
  };
  read(b, product.n);
  if (product.of_bytes()) read(decode(product.a_matrix), 64);
  leave_engine(self, token);
}

// ---- the steps of a warpgroup ----

int warp_index() { return current->index / 32; }
WarpOfGroup& warp_of_group() { return async().warps[warp_index()]; }

std::string operator""_s(const char* text, size_t length) { return {text, length}; }

void come_to_step(uint64_t operand, bool flag) {
  const WarpgroupStep mine{current->warp->op, current->warp->where, operand, flag};
  const int first = warp_index() / 4 * 4;
  if (static_cast<size_t>(32 * (first + 4)) > block->threads.size()) {
    fail(mine.op->name + " needs a whole warpgroup of 128 threads"_s, mine.where);
  }
  std::vector<WarpgroupStep>& steps = async().steps[first / 4];
  const size_t at = warp_of_group().steps++;
  if (at == steps.size()) {
    for (int w = first; w < first + 4; ++w) {
      if (block->warps[w].live == 0) {
        fail(mine.op->name + " without warp "_s + std::to_string(w) + " of its warpgroup, which has returned",
             mine.where);
      }
    }
    return steps.push_back(mine);
  }
  const WarpgroupStep& other = steps[at];
  if (mine.op != other.op || !same(mine.where, other.where)) {
    fail("some warps of the warpgroup are in "_s + other.op->name + " at " + line(other.where) + ", others in " +
             mine.op->name,
         mine.where);
  }
  if (mine.operand != other.operand || mine.flag != other.flag) {
    fail("the warps of the warpgroup give "_s + mine.op->name + " different arguments", mine.where);
  }
}

// ---- registers ----

// An array of each lane, of so many words.
struct Registers {
  const void* (*of)(const Product&);
  size_t words;
  const char* what;
};
Registers a_of() {
  return {[](const Product& p) -> const void* { return p.a; }, 4, "A's registers"};
}
Registers d_of(const Product& product) {
  return {[](const Product& p) -> const void* { return p.d; }, static_cast<size_t>(product.n / 2), "the sums"};
}

// Arrays that have gone out of scope are left as they were: others in their place will be looked at when they are used.
void look(KnownRegisters& known) {
  for (int lane = 0; lane < 32; ++lane) {
    const size_t bytes = 4 * known.values[lane].size();
    if (with_asan() && __asan_region_is_poisoned(const_cast<void*>(known.registers[lane]), bytes) != nullptr) continue;
    std::memcpy(known.values[lane].data(), known.registers[lane], bytes);
  }
}

KnownRegisters* find_known(WarpOfGroup& warp, const PendingProduct& product, const Registers& registers) {
  for (KnownRegisters& known : warp.known) {
    if (known.registers[0] == registers.of(product.lanes[0]) && known.values[0].size() == registers.words)
      return &known;
  }
  return nullptr;
}

KnownRegisters& know(WarpOfGroup& warp, const PendingProduct& product, const Registers& registers) {
  KnownRegisters* known = find_known(warp, product, registers);
  if (!known) known = &warp.known.emplace_back();
  for (int lane = 0; lane < 32; ++lane) {
    known->registers[lane] = registers.of(product.lanes[lane]);
    known->values[lane].resize(registers.words);
  }
  look(*known);
  return *known;
}

void check_fenced(WarpOfGroup& warp, const PendingProduct& product, const Registers& registers) {
  if (const KnownRegisters* known = find_known(warp, product, registers)) {
    for (int lane = 0; lane < 32; ++lane) {
      if (std::memcmp(known->values[lane].data(), known->registers[lane], 4 * registers.words) != 0) {
        fail(registers.what + " of wgmma were written after the last wgmma_fence"_s, product.where);
      }
    }
  } else {
    know(warp, product, registers);
  }
}

// ---- products ----

// The warp's 16 rows, into `sums`.
uint32_t& sum_at(PendingProduct& product, int row, int column) {
  return product.sums[row % 8 * 4 + column % 8 / 2][static_cast<size_t>(column / 8 * 4 + row / 8 * 2 + column % 2)];
}
// A's bytes have no sign, B's have one; sums wrap around.
void multiply_bytes(PendingProduct& product) {
  const Product& first = product.lanes[0];
  const Matrix a = decode(first.a_matrix), b = decode(first.b);
  struct Line {
    unsigned char of[32];
  };
  const auto read = [&](const Matrix& matrix, int row) {
    Line line;
    for (int half = 0; half < 2; ++half) {
      std::memcpy(line.of + 16 * half,
                  seen_by_async(block->shared + matrix.row(row, 8 * half), 16, "wgmma", product.where), 16);
    }
    return line;
  };
  Line rows[16];
  for (int row = 0; row < 16; ++row) rows[row] = read(a, 16 * product.warp + row);
  for (int column = 0; column < first.n; ++column) {
    const Line of_b = read(b, column);
    for (int row = 0; row < 16; ++row) {
      int sum = 0;
      for (int i = 0; i < 32; ++i) sum += rows[row].of[i] * static_cast<int8_t>(of_b.of[i]);
      uint32_t& to = sum_at(product, row, column);
      to = (first.accumulate ? to : 0u) + static_cast<uint32_t>(sum);
    }
  }
}
void multiply(PendingProduct& product) {
  if (product.lanes[0].of_bytes()) return multiply_bytes(product);
  const int n = product.lanes[0].n;
  const Matrix matrix = decode(product.lanes[0].b);
  std::vector<Factor> b(static_cast<size_t>(kDepth * n));
  for (int column = 0; column < n; ++column) {
    for (int k = 0; k < kDepth; k += 8) {
      const unsigned char* row = seen_by_async(block->shared + matrix.row(column, k), 16, "wgmma", product.where);
      for (int i = 0; i < 8; ++i) {
        const auto code = static_cast<uint16_t>(row[2 * i] | row[2 * i + 1] << 8);
        b[static_cast<size_t>(column * kDepth + k + i)] = factor(half_to_float(code), kSmallestHalf);
      }
    }
  }
  Factor a[16][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) {
        a[lane / 4 + 8 * (r & 1)][2 * (lane % 4) + 8 * (r >> 1) + i] =
            factor(half_to_float(static_cast<uint16_t>(product.a[lane][r] >> 16 * i)), kSmallestHalf);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < n; ++column) {
      uint32_t& sum = sum_at(product, row, column);
      const float before = product.lanes[0].accumulate ? std::bit_cast<float>(sum) : 0.0f;
      sum = std::bit_cast<uint32_t>(add_products(before, a[row], &b[static_cast<size_t>(column * kDepth)], kDepth));
    }
  }
}

void check_untouched(const PendingProduct& product) {
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = product.lanes[lane];
    check_access(p.d, 4, 2 * p.n, product.where);
    if (!p.of_bytes()) {
      check_access(p.a, 4, 16, product.where);
      if (std::memcmp(p.a, product.a[lane], 16) != 0) {
        fail("A's registers were written before the end of wgmma was waited for, which was issued", product.where);
      }
    }
    for (int i = 0; i < p.n / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, static_cast<const char*>(p.d) + 4 * i, 4);
      if (bits != kInFlight) {
        fail("sums were written before the end of wgmma was waited for, which was issued", product.where);
      }
    }
  }
}

// The oldest products.
void finish(WarpOfGroup& warp, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    PendingProduct& product = warp.products[i];
    check_untouched(product);
    multiply(product);
    const auto next = std::find_if(warp.products.begin() + static_cast<std::ptrdiff_t>(i) + 1, warp.products.end(),
                                   [&](const PendingProduct& p) { return p.lanes[0].d == product.lanes[0].d; });
    if (next != warp.products.end()) {  // the sums stay in flight
      std::copy(product.sums, product.sums + 32, next->sums);
      continue;
    }
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(product.lanes[lane].d, product.sums[lane].data(), 4 * product.sums[lane].size());
    }
    know(warp, product, d_of(product.lanes[0]));
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<std::ptrdiff_t>(count));
}

void issue(void* const (&arguments)[32], uint32_t) {
  const Unseen unseen;
  WarpOfGroup& warp = warp_of_group();
  PendingProduct product;
  product.where = current->warp->where;
  product.group = warp.committed;
  product.warp = warp_index() % 4;
  for (int lane = 0; lane < 32; ++lane) product.lanes[lane] = *static_cast<const Product*>(arguments[lane]);
  const Product& first = product.lanes[0];
  for (const Product& p : product.lanes) {
    if (p.b != first.b || p.a_matrix != first.a_matrix || p.accumulate != first.accumulate) {
      fail("the lanes of the warp give wgmma different arguments", product.where);
    }
  }
  come_to_step(first.b ^ std::rotl(first.a_matrix, 13), first.accumulate);
  if (!warp.fenced) fail("wgmma before the first wgmma_fence", product.where);
  check_matrix(first.b, first.n, product.where);
  if (first.of_bytes()) check_matrix(first.a_matrix, 64, product.where);
  else check_fenced(warp, product, a_of());
  const bool follows = std::any_of(warp.products.begin(), warp.products.end(),
                                   [&](const PendingProduct& p) { return p.lanes[0].d == first.d; });
  if (!follows) check_fenced(warp, product, d_of(first));
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = product.lanes[lane];
    if (!p.of_bytes()) std::memcpy(product.a[lane], p.a, sizeof(product.a[lane]));
    product.sums[lane].resize(static_cast<size_t>(p.n / 2));
    std::memcpy(product.sums[lane].data(), p.d, 2 * static_cast<size_t>(p.n));
    for (int i = 0; i < p.n / 2; ++i) std::memcpy(static_cast<char*>(p.d) + 4 * i, &kInFlight, 4);
  }
  warp.products.push_back(std::move(product));
  const Delivery delivery = config().delivery;
  if (delivery == Delivery::Early || (delivery == Delivery::Random && random_bits() & 1u)) {
    finish(warp, warp.products.size());
  }
}
constexpr WarpOp kProduct{"wgmma", true, false, issue};

void fence(void* const (&)[32], uint32_t) {
  const Unseen unseen;
  come_to_step(0, false);
  WarpOfGroup& warp = warp_of_group();
  warp.fenced = true;
  for (KnownRegisters& known : warp.known) look(known);
}
constexpr WarpOp kFence{"wgmma_fence", true, false, fence};

void commit(void* const (&)[32], uint32_t) {
  const Unseen unseen;
  come_to_step(0, false);
  ++warp_of_group().committed;
}
constexpr WarpOp kCommit{"wgmma_commit", true, false, commit};

void wait_for_groups(void* const (&arguments)[32], uint32_t) {
  const Unseen unseen;
  const int groups = *static_cast<const int*>(arguments[0]);
  come_to_step(static_cast<uint64_t>(groups), false);
  WarpOfGroup& warp = warp_of_group();
  const auto done = std::find_if(warp.products.begin(), warp.products.end(), [&](const PendingProduct& product) {
    return product.group >= warp.committed - groups;
  });
  finish(warp, static_cast<size_t>(done - warp.products.begin()));
}
constexpr WarpOp kWait{"wgmma_wait", true, false, wait_for_groups};

void set_registers(void* const (&arguments)[32], uint32_t) {
  const Unseen unseen;
  come_to_step(static_cast<uint64_t>(*static_cast<const int*>(arguments[0])), false);
}
constexpr WarpOp kRegisters[] = {{"registers_down", true, false, set_registers},
                                 {"registers_up", true, false, set_registers}};

}  // namespace

uint64_t wgmma_matrix(const void* shared, int leading_bytes, int stride_bytes, const Where& where) {
  check_access(shared, 16, 0, where);
  check_shared_range(shared, 16, "wgmma_matrix", where);
  const auto field = [&](int64_t bytes, const char* what) {
    if (bytes < 0 || bytes % 16 != 0 || bytes > 0x3ffff) {
      fail(std::string(what) + " of a matrix of wgmma is a multiple of 16 below 2^18, got " + std::to_string(bytes),
           where);
    }
    return static_cast<uint64_t>(bytes) >> 4;
  };
  const auto start = reinterpret_cast<intptr_t>(shared) - reinterpret_cast<intptr_t>(block->shared);
  return field(start, "the start") | field(leading_bytes, "leading_bytes") << 16 |
         field(stride_bytes, "stride_bytes") << 32;
}

uint64_t wgmma_box(const void* shared, const Where& where) { return kOfBoxes | wgmma_matrix(shared, 16, 1024, where); }

void wgmma_fence(const Where& where) { collective(kFence, nullptr, where); }

void wgmma(const Product& product, const Where& where) {
  Product mine = product;
  check_matrix(mine.b, mine.n, where);
  if (mine.of_bytes()) check_matrix(mine.a_matrix, 64, where);
  if (with_tsan()) show_to_tsan(*current, mine);
  collective(kProduct, &mine, where);
}

void wgmma_commit(const Where& where) {
  collective(kCommit, nullptr, where);
  ++current->product_groups;
}

void wgmma_wait(int groups, const Where& where) {
  collective(kWait, &groups, where);
  Thread& self = *current;
  for (; self.product_groups_done < self.product_groups - groups; ++self.product_groups_done) {
    acquire(&self.product_tokens[self.product_groups_done % kProductTokens]);
  }
}

void registers(int count, bool up, const Where& where) { collective(kRegisters[up], &count, where); }

void check_warpgroup_at_the_end(const Thread& thread) {
  const int w = thread.index / 32;
  const WarpOfGroup& warp = async().warps[w];
  if (!warp.products.empty()) {
    fail("the warp returns before the end of wgmma was waited for, which was issued", warp.products[0].where);
  }
  const std::vector<WarpgroupStep>& steps = async().steps[w / 4];
  if (warp.steps < steps.size()) {
    const WarpgroupStep& missed = steps[warp.steps];
    fail("the warp returns without "_s + missed.op->name + ", to which others of its warpgroup have come",
         missed.where);
  }
}

}  // namespace bitfold::cuda::emulator
