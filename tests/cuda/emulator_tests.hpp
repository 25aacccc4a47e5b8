// The emulator's own tests: a kernel of a few lines for each rule. Each CASE runs by its name (test_emulator.py).
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.hpp"

namespace bitfold::cuda::test {

struct Case {
  const char* name;
  void (*body)();
};
std::vector<Case>& cases();
struct Registered {
  Registered(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

#define CASE(name)                                                         \
  static void name();                                                      \
  static const ::bitfold::cuda::test::Registered name##_case(#name, name); \
  static void name()

// A failed test is an exception that names its line.
inline void expect(bool condition, const std::string& what, emulator::Where where = emulator::Where::current()) {
  if (!condition) throw std::logic_error(what + " (line " + std::to_string(where.line()) + ")");
}

// body once for each of the first schedules.
inline void under_schedules(int count, const std::function<void()>& body) {
  for (int i = 0; i < count; ++i) {
    emulator::config() = emulator::schedule(i);
    body();
  }
  emulator::config() = {};
}

// body must end in an error that has all of these in its text.
inline void expect_error(const std::function<void()>& body, const std::vector<std::string>& parts,
                         emulator::Where where = emulator::Where::current()) {
  std::string text;
  try {
    body();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  expect(!text.empty(), "no error", where);
  for (const std::string& part : parts)
    expect(text.find(part) != std::string::npos, "not in '" + text + "': " + part, where);
}

inline std::string at(int line) { return ":" + std::to_string(line); }

}  // namespace bitfold::cuda::test
