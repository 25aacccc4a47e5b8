// How tensor cores add floats. Khattak and Mikaitis (2025), Accurate Models of NVIDIA Tensor Cores, found by experiment
// what NVIDIA doesn't say: products are exact; they and the number that they come to are brought to the largest
// exponent among them, with one bit (A100) or two (H100) more than fp32 has, what is below is cut off, and so is what
// fp32 lacks of the sum. Here it is one bit, and an exponent is that of a product rather than the sum of its factors'.
// An H200's distances from float64 in tests/cuda/gpu_instructions.cu are these to all digits printed.
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

template <int Count>
float add_products(float before, const double (&products)[Count]) {
  double largest = std::fabs(static_cast<double>(before)), plain = before;
  for (const double product : products) {
    const double size = std::fabs(product);
    largest = size > largest ? size : largest;
    plain += product;
  }
  if (largest == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  constexpr int kBits = 24;  // behind the point
  constexpr uint64_t kExponent = 0x7ff0000000000000u;
  const auto power = std::bit_cast<double>(std::bit_cast<uint64_t>(largest) & kExponent);
  const double unit = power * (1.0 / (int64_t{1} << kBits)), units = 1.0 / unit;
  auto sum = static_cast<int64_t>(static_cast<double>(before) * units);
  for (const double product : products) sum += static_cast<int64_t>(product * units);
  return toward_zero(static_cast<double>(sum) * unit);
}

}  // namespace bitfold::cuda::emulator
