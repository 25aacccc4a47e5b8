#include "emulator_tests.hpp"

#include <cstring>

namespace bitfold::cuda::test {

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

}  // namespace bitfold::cuda::test

// emulator_tests NAME...: runs these cases; without names all.
int main(int count, char** names) {
  using namespace bitfold::cuda::test;
  int ran = 0, failed = 0;
  for (const Case& test : cases()) {
    bool chosen = count < 2;
    for (int i = 1; i < count; ++i) chosen |= std::strcmp(names[i], test.name) == 0;
    if (!chosen) continue;
    ++ran;
    try {
      test.body();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", test.name, error.what());
      ++failed;
    }
  }
  std::printf("%d of %d cases failed\n", failed, ran);
  return failed != 0 || ran == 0;
}
