// kernel_tests COUNT FILE...: runs the op that each file (kernel_cases.py) describes under the emulator's first COUNT
// schedules and compares with what the file expects, up to the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/plan.hpp"
#include "formats/numeric.hpp"
#include "kernel_cases.hpp"

namespace bitfold::cuda::test {
namespace {

Outputs run(const CaseFile& file) {
  const std::map<std::string, Outputs (*)(const CaseFile&)> ops = {{"linear", linear},
                                                                   {"linear_int8", linear_int8},
                                                                   {"linear_grad_x", linear_grad_x},
                                                                   {"decode", decode},
                                                                   {"encode", encode},
                                                                   {"pack", pack},
                                                                   {"gptq_columns", gptq_columns},
                                                                   {"search_steps", search_steps},
                                                                   {"kv_pack", kv_pack},
                                                                   {"kv_unpack", kv_unpack},
                                                                   {"kv_attention", kv_attention}};
  Outputs outputs = ops.at(file.text("op"))(file);
  emulator::synchronize();
  return outputs;
}

// ---- comparisons ----

double value_of(const Memory& memory, DType dtype, size_t i) {
  switch (dtype) {
    case DType::F16: return half_to_float(memory.as<uint16_t>()[i]);
    case DType::BF16: return bf16_to_float(memory.as<uint16_t>()[i]);
    case DType::F32: return memory.as<float>()[i];
    default: return memory.as<double>()[i];
  }
}

[[noreturn]] void differ(const std::string& name, size_t i, double actual, double expected) {
  std::ostringstream text;
  text << name << "[" << i << "] is " << actual << ", expected " << expected;
  throw std::runtime_error(text.str());
}

// Products within their tolerance, infinities and NaN where they should be, everything else to the bit.
void compare(const CaseFile& file, const Outputs& outputs) {
  for (const auto& [name, memory] : outputs) {
    const Memory& expected = file.tensor("expected " + name);
    if (name == "y") {
      for (size_t i = 0; i < expected.bytes() / sizeof(double); ++i) {
        const double actual = value_of(memory, file.dtype("dtype"), i), wanted = expected.as<double>()[i];
        const double tolerance = file.tensor("tolerance").as<double>()[i];
        const bool right = std::isfinite(wanted) ? std::fabs(actual - wanted) <= tolerance
                                                 : actual == wanted || (std::isnan(actual) && std::isnan(wanted));
        if (!right) differ(name, i, actual, wanted);
      }
    } else {
      if (memory.bytes() != expected.bytes()) throw std::runtime_error(name + " has another size");
      for (size_t i = 0; i < memory.bytes(); ++i) {
        if (memory.data()[i] != expected.data()[i]) differ(name + " byte", i, memory.data()[i], expected.data()[i]);
      }
    }
  }
}

void check(const CaseFile& file, int schedule, Outputs& first) {
  emulator::config() = emulator::schedule(schedule);
  emulator::config().multiprocessors = static_cast<int>(file.number("multiprocessors"));
  emulator::config().capability = static_cast<int>(file.number("capability"));
  emulator::config().shared_bytes = shared_bytes_of(emulator::config().capability);
  emulator::config().ahead = 1 + schedule % 3;
  Outputs outputs = run(file.written_by_a_kernel());
  compare(file, outputs);
  if (schedule == 0) {
    first = std::move(outputs);
    return;
  }
  for (const auto& [name, memory] : outputs) {
    if (std::memcmp(memory.data(), first.at(name).data(), memory.bytes()) != 0) {
      throw std::runtime_error(name + " has other bits in schedule " + std::to_string(schedule));
    }
  }
}

}  // namespace
}  // namespace bitfold::cuda::test

int main(int count, char** arguments) {
  using namespace bitfold::cuda::test;
  const int schedules = count < 3 ? 0 : std::atoi(arguments[1]);
  if (schedules < 1) return 1;
  std::vector<Outputs> firsts(count);
  // All files in one schedule before any in the next: most mistakes show in the first, in one file or the other.
  for (int schedule = 0; schedule < schedules; ++schedule) {
    for (int i = 2; i < count; ++i) {
      try {
        check(CaseFile(arguments[i]), schedule, firsts[i]);
      } catch (const std::exception& error) {
        std::printf("%s: %s\n", arguments[i], error.what());
        return 1;
      }
    }
  }
  return 0;
}
