// What could not be encoded, collected by rows, so that the fault that is reported does not depend on the threads.
#pragma once

#include <cmath>
#include <mutex>

#include "formats/args.hpp"

namespace bitfold::cpu {

// The first fault in row-major order; a weight that is not finite comes before everything else.
class Faults {
 public:
  void add(const EncodeStatus& fault) {
    const std::lock_guard lock(mutex_);
    const int64_t count = first_.count + fault.count;
    if (first_.fault == EncodeFault::None || key(fault) < key(first_)) first_ = fault;
    first_.count = count;
  }
  const EncodeStatus& first() const { return first_; }

 private:
  struct Key {
    bool later;
    int64_t row, column;
    auto operator<=>(const Key&) const = default;
  };
  static Key key(const EncodeStatus& s) { return {s.fault != EncodeFault::NotFinite, s.row, s.column}; }
  std::mutex mutex_;
  EncodeStatus first_;
};

inline EncodeStatus not_finite(const float* w, int64_t count, int64_t row) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(w[i])) return {EncodeFault::NotFinite, row, i, w[i], 0};
  }
  return {};
}

}  // namespace bitfold::cpu
