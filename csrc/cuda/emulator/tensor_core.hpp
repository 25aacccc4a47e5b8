// How tensor cores add floats. Khattak and Mikaitis (2025), Accurate Models of NVIDIA Tensor Cores, found by experiment
// what NVIDIA doesn't say: products are exact; they and the number that they come to are brought to the largest
// exponent among them, with one bit (A100) or two (H100) more than fp32 has, what is below is cut off, and so is what
// fp32 lacks of the sum. Here it is one bit. A product's exponent is what its factors' come to, and a number that is
// too small to be normal has the smallest exponent of those that are: all others are cut off as if it were as large.
// An A100 adds eight products of halves at a time, an H100 sixteen; what is older than that is taken for an A100.
// An H200's distances from float64 in tests/cuda/gpu_instructions.cu, of normal numbers, are these in all digits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace bitfold::cuda::emulator {

inline float toward_zero(double value) {
  const auto nearest = static_cast<float>(value);
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return beyond && std::isfinite(nearest) ? std::nextafter(nearest, 0.0f) : nearest;
}

// A factor, and the magnitude that its products are aligned by: at least that of the smallest normal number.
struct Factor {
  double value, size;
};
inline Factor factor(double value, double smallest_normal) {
  const double size = std::fabs(value);
  return {value, size < smallest_normal && size != 0.0 ? smallest_normal : size};
}
inline constexpr double kSmallestHalf = 0x1p-14, kSmallestBf16 = 0x1p-126;

inline float add_products(float before, const Factor* a, const Factor* b, int count) {
  double largest = std::fabs(static_cast<double>(before)), plain = before;
  for (int i = 0; i < count; ++i) {
    const double size = a[i].size * b[i].size;
    largest = size > largest ? size : largest;
    plain += a[i].value * b[i].value;
  }
  if (largest == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  constexpr int kBits = 24;  // behind the point
  constexpr uint64_t kExponent = 0x7ff0000000000000u;
  const auto power = std::bit_cast<double>(std::bit_cast<uint64_t>(largest) & kExponent);
  const double unit = power * (1.0 / (int64_t{1} << kBits)), units = 1.0 / unit;
  auto sum = static_cast<int64_t>(static_cast<double>(before) * units);
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(a[i].value * b[i].value * units);
  return toward_zero(static_cast<double>(sum) * unit);
}

}  // namespace bitfold::cuda::emulator
