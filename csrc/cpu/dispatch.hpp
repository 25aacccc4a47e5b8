// What the dispatcher knows, for `bitfold doctor` and the tests.
#pragma once

#include <vector>

namespace bitfold::cpu {

struct IsaInfo {
  const char* name;
  bool available;  // on this CPU
};
std::vector<IsaInfo> isas();

}  // namespace bitfold::cpu
