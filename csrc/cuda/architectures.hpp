// Which GPUs a build covers.
#pragma once

#include <string_view>

namespace bitfold::cuda {

// Whether one of `architectures`, as CMake writes them ("80-real 90a-real 90-virtual"), runs on a GPU of this
// capability: machine code on its own generation from its own number on, with an 'a' on that GPU alone; PTX on every
// later one. Only those from `least` on count.
constexpr bool covers(std::string_view architectures, int capability, int least = 0) {
  while (!architectures.empty()) {
    const std::string_view one = architectures.substr(0, architectures.find(' '));
    architectures.remove_prefix(one.size() < architectures.size() ? one.size() + 1 : one.size());
    int number = 0;
    size_t i = 0;
    for (; i < one.size() && one[i] >= '0' && one[i] <= '9'; ++i) number = 10 * number + (one[i] - '0');
    const std::string_view rest = one.substr(i);
    const bool alone = rest.starts_with('a'), ptx = !rest.ends_with("-real"), code = !rest.ends_with("-virtual");
    if (number < least) continue;
    if (alone ? number == capability : number <= capability && (ptx || (code && number / 10 == capability / 10))) {
      return true;
    }
  }
  return false;
}
static_assert(covers("80-real", 80) && covers("80-real", 89) && !covers("80-real", 90) && !covers("86-real", 80));
static_assert(covers("80-real 90a-real", 90) && !covers("90a-real", 89) && !covers("90a-real", 100));
static_assert(covers("90a-real 90-virtual", 120) && !covers("90a-virtual", 100) && covers("75", 86) && !covers("", 90));

// Whether a GPU of this capability runs code with wgmma: machine code for Hopper's own instructions, 9.0a, which it
// takes before any other.
constexpr bool has_wgmma(std::string_view architectures, int capability) {
  return capability == 90 && architectures.find("90a") != std::string_view::npos;
}
static_assert(has_wgmma("80-real 90a-real", 90) && !has_wgmma("80-real 90-real", 90) && !has_wgmma("90a-real", 100));

// Whether kernels may begin before those ahead of them have ended: the code that a GPU of this capability runs is
// for 9.0 or newer, where it waits by itself. A GPU takes that before any older.
constexpr bool has_early(std::string_view architectures, int capability) {
  return covers(architectures, capability, 90);
}
static_assert(has_early("80-real 90a-real", 90) && has_early("80-real 90-virtual", 120) && !has_early("80", 90));
static_assert(!has_early("80-real 90a-real 90-virtual", 89) && !has_early("80-real 90a-real 80-virtual", 100));

}  // namespace bitfold::cuda
