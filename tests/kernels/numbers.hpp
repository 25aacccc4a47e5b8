// What the kernels are given: ordinary numbers, and hard ones. The same on every machine: integers of a generator, and
// arithmetic without a rounding that could differ; the standard distributions promise neither.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace bitfold {

using Engine = std::mt19937;
using Numbers = std::vector<float>;

// The sum of twelve uniform draws of 24 bits, less its mean: close to normal, variance 1.
inline float gaussian(Engine& engine) {
  int64_t sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<int64_t>(engine() >> 8);
  return static_cast<float>(static_cast<double>(sum - (int64_t{6} << 24)) * 0x1p-24);
}
inline Numbers gaussian(Engine& engine, int64_t count) {
  Numbers out(static_cast<size_t>(count));
  for (float& value : out) value = gaussian(engine);
  return out;
}

// Any finite number, sub-normal ones and zeros of either sign included.
inline float any_finite(Engine& engine) {
  for (;;) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>(engine()));
    if (std::isfinite(value)) return value;
  }
}

// Rows of k numbers of which every one is hard in its own way; a whole number of blocks of 256 columns each.
inline std::vector<Numbers> hard_rows(Engine& engine, int64_t k) {
  constexpr float kMost = std::numeric_limits<float>::max(), kLeast = 0x1p-149f;
  std::vector<Numbers> rows;
  const auto row = [&](auto number) {
    Numbers& out = rows.emplace_back(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) out[static_cast<size_t>(i)] = number(i);
  };

  // All equal: zeros of both signs, the smallest and the largest numbers, and those at which a search gives up, a
  // scale leaves binary16 or a square leaves binary32.
  for (const float value :
       {0.0f, kLeast, 0x1p-130f, 0x1p-126f, 1e-38f, 1e-30f, 1e-20f, 9.99e-16f, 1e-15f, 1.01e-15f, 1e-9f, 6e-8f, 1e-4f,
        1.0f, 0.1f,   65504.0f,  65520.0f,  8.4e6f, 1e13f,  1e19f,  2e19f,     1e30f,  0x1p125f,  1e38f, kMost}) {
    row([=](int64_t) { return value; });
    row([=](int64_t) { return -value; });
  }
  row([](int64_t i) { return i % 2 == 0 ? 0.0f : -0.0f; });
  row([](int64_t i) { return i % 2 == 0 ? -0.0f : 0.0f; });

  // Of equal magnitude and both signs: the first one counts. Two numbers; one number in a block, first or last.
  for (const float value : {kLeast, 1e-15f, 1.0f, 8.4e6f, 1e30f, kMost}) {
    row([=](int64_t i) { return i % 2 == 0 ? value : -value; });
    row([=](int64_t i) { return i % 32 < 16 ? -value : value; });
    row([=](int64_t i) { return i % 3 == 0 ? value : 0.5f * value; });
    row([=](int64_t i) { return i % 256 == 0 ? value : 0.0f; });
    row([=](int64_t i) { return i % 256 == 255 ? -value : -0.0f; });
    row([=](int64_t i) { return i % 32 == 31 ? value : 1e-20f * value; });
  }

  // Ties: whole numbers, halves and quarters, with one that makes the step a power of two.
  for (const float step : {1.0f, 0.5f, 0.25f, 0x1p-20f, 0x1p-140f, 0x1p100f}) {
    row([=](int64_t i) { return step * static_cast<float>(i % 16 - 8); });
    row([=](int64_t i) { return step * static_cast<float>(i % 17 - 8); });
    row([=](int64_t i) { return step * static_cast<float>(i % 32); });
    row([=](int64_t i) { return step * (i % 32 == 0 ? 127.0f : 0.5f * static_cast<float>(i % 32 - 16)); });
    row([=](int64_t i) { return step * static_cast<float>(i % 64) - 32 * step; });
  }

  // Ordinary numbers of every size; beyond the largest they become it.
  for (int exponent = -150; exponent <= 127; exponent += exponent < -110 || exponent > 110 ? 1 : 9) {
    row([&](int64_t) { return std::clamp(std::ldexp(gaussian(engine), exponent), -kMost, kMost); });
  }
  // Scales at the end of binary16, and below its normal numbers.
  for (const float size : {8e3f, 1.6e4f, 3.3e4f, 6.5e4f, 1e5f, 2.6e5f, 5e5f, 1e6f, 2e6f, 4e6f, 8.3e6f, 1e-7f, 1e-6f}) {
    row([&](int64_t) { return size * std::clamp(gaussian(engine), -2.0f, 2.0f); });
  }
  // Huge ranges: between the sub-blocks of a block, within one, and any pattern of bits.
  row([&](int64_t i) { return std::ldexp(gaussian(engine), static_cast<int>(i / 16 % 16) * 8 - 64); });
  row([&](int64_t i) { return std::ldexp(gaussian(engine), static_cast<int>(i / 32 % 8) * -12); });
  row([&](int64_t i) { return i / 32 % 2 == 0 ? 0.0f : gaussian(engine); });
  row([&](int64_t i) { return i / 16 % 2 == 0 ? -1e-16f : gaussian(engine); });
  for (int i = 0; i < 8; ++i) row([&](int64_t) { return any_finite(engine); });
  for (const int most : {20, 60, 120}) {
    row([&](int64_t) {
      const auto exponent = static_cast<int>(engine() % static_cast<uint32_t>(2 * most)) - most;
      return std::ldexp(gaussian(engine), exponent);
    });
  }
  // Of one sign, far from zero: what a minimum takes away leaves little.
  row([&](int64_t) { return 1000.0f + 1e-3f * gaussian(engine); });
  row([&](int64_t) { return -1000.0f + 1e-3f * gaussian(engine); });
  row([&](int64_t) { return 1e30f + 1e23f * gaussian(engine); });
  return rows;
}

// Importance as hard: every column alike, most without any, sizes from the smallest to the largest.
inline std::vector<Numbers> hard_importance(Engine& engine, int64_t k) {
  std::vector<Numbers> all;
  const auto columns = [&](auto number) {
    Numbers& out = all.emplace_back(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) out[static_cast<size_t>(i)] = number(i);
  };
  columns([](int64_t) { return 1.0f; });
  columns([](int64_t i) { return i % 40 == 3 ? 1.0f : 0.0f; });
  columns([&](int64_t) {
    const float size = 1.0f + std::abs(gaussian(engine));
    return std::ldexp(size, static_cast<int>(engine() % 60) - 30);
  });
  columns([&](int64_t) { return std::abs(any_finite(engine)); });
  return all;
}

// Activations: ordinary rows, and rows with a block of zeros, of numbers too small or too large, and with numbers that
// are none.
inline std::vector<Numbers> hard_activations(Engine& engine, int64_t k) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto ties = [](int64_t i) { return i % 32 == 5 ? 127.0f : 0.5f * static_cast<float>(i % 200 - 100); };
  std::vector<Numbers> rows(10);
  for (Numbers& row : rows) row = gaussian(engine, k);
  const auto set = [&](size_t row, auto number) {
    for (int64_t i = 0; i < k; ++i) rows[row][static_cast<size_t>(i)] = number(i);
  };
  set(1, [&](int64_t i) { return i < 256 ? -0.0f : gaussian(engine); });
  set(2, ties);
  set(3, [&](int64_t) { return 0x1p-100f * gaussian(engine); });
  set(4, [&](int64_t) { return 0x1p-140f * gaussian(engine); });
  set(5, [&](int64_t) { return 0x1p124f * gaussian(engine); });
  set(6, [&](int64_t i) { return i % 32 == 0 ? 30.0f * gaussian(engine) : gaussian(engine); });
  set(7, [&](int64_t i) { return i == 300 ? std::numeric_limits<float>::quiet_NaN() : gaussian(engine); });
  set(8, [&](int64_t i) { return i == 3 ? -kInfinity : gaussian(engine); });
  set(9, [&](int64_t) { return any_finite(engine); });
  return rows;
}

}  // namespace bitfold
