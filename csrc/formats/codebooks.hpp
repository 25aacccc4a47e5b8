// The codebooks: the only home of their numbers.
#pragma once

#include <array>
#include <cstdint>

// A table that is indexed at run time, which on a GPU takes a place in its memory: nvcc compiles this room for both
// sides.
#if defined(__CUDACC__)
#define BITFOLD_TABLE static __device__ constexpr
#else
#define BITFOLD_TABLE inline constexpr
#endif

namespace bitfold {

// NF4: Dettmers et al. 2023, "QLoRA", appendix E. Sorted; the code is the index.
BITFOLD_TABLE std::array<float, 16> kNf4Values = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// FP4 as bitsandbytes stores it: bit 3 is the sign, and the magnitudes are not in the order of the codes. Code 8 is 0
// and is never written.
BITFOLD_TABLE std::array<float, 16> kFp4Values = {
    0.0f, 0.005208333333f,  0.66666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
    0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f,
};

// IQ4_NL and IQ4_XS of GGUF; sorted.
BITFOLD_TABLE std::array<int8_t, 16> kIq4Values = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                   1,    13,   25,  38,  53,  69,  89,  113};

// MXFP4: twice the e2m1 values of the OCP Microscaling formats (2023), section 5.3.3; bit 3 is the sign. Code 8 is 0
// and is never written.
BITFOLD_TABLE std::array<int8_t, 16> kMxfp4Values = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A codebook sorted by value, with the midpoints that decide: a number above midpoint i belongs to entry i + 1 or
// higher.
template <int Count>
struct SortedCodebook {
  std::array<float, Count> values{};
  std::array<uint8_t, Count> codes{};
  std::array<float, Count - 1> midpoints{};
};

// Equal entries keep the order of their codes.
template <int Count>
constexpr SortedCodebook<Count> sort_codebook(const std::array<float, Count>& values) {
  SortedCodebook<Count> sorted;
  for (size_t code = 0; code < values.size(); ++code) {
    size_t place = code;
    for (; place > 0 && sorted.values[place - 1] > values[code]; --place) {
      sorted.values[place] = sorted.values[place - 1];
      sorted.codes[place] = sorted.codes[place - 1];
    }
    sorted.values[place] = values[code];
    sorted.codes[place] = static_cast<uint8_t>(code);
  }
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    sorted.midpoints[i] = (sorted.values[i] + sorted.values[i + 1]) * 0.5f;
  }
  return sorted;
}

BITFOLD_TABLE SortedCodebook<16> kNf4Sorted = sort_codebook<16>(kNf4Values);
BITFOLD_TABLE SortedCodebook<16> kFp4Sorted = sort_codebook<16>(kFp4Values);
static_assert(kFp4Sorted.codes[7] == 0 && kFp4Sorted.codes[8] == 8 && kFp4Sorted.midpoints[7] == 0.0f);

// The dynamic map of 8-bit optimizers (Dettmers 2016), rounded as docs/formats.md says; sorted, so the code is the
// index.
constexpr std::array<float, 256> make_dynamic_map() {
  std::array<float, 256> map{};
  int count = 0;
  auto insert = [&](float value) {
    int place = count++;
    for (; place > 0 && map[static_cast<size_t>(place - 1)] > value; --place) {
      map[static_cast<size_t>(place)] = map[static_cast<size_t>(place - 1)];
    }
    map[static_cast<size_t>(place)] = value;
  };
  constexpr float kLow = 0.1f;
  constexpr std::array<float, 7> kPowers = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  for (int e = 0; e < 7; ++e) {
    const int parts = 1 << e;
    const float step = (1.0f - kLow) / static_cast<float>(parts);
    auto edge = [&](int i) {  // the product is exact in double: one rounding
      const double from_low = static_cast<double>(kLow) + static_cast<double>(step) * i;
      const double from_high = 1.0 - static_cast<double>(step) * (parts - i);
      return static_cast<float>(i < (parts + 1) / 2 ? from_low : from_high);
    };
    for (int i = 0; i < parts; ++i) {
      const float centre = (edge(i) + edge(i + 1)) / 2.0f * kPowers[static_cast<size_t>(e)];
      insert(centre);
      insert(-centre);
    }
  }
  insert(0.0f);
  insert(1.0f);
  return map;
}

BITFOLD_TABLE std::array<float, 256> kDynamicMap = make_dynamic_map();
static_assert(kDynamicMap[127] == 0.0f && kDynamicMap[255] == 1.0f);

constexpr std::array<float, 255> make_dynamic_midpoints() {
  std::array<float, 255> midpoints{};
  for (size_t i = 0; i < midpoints.size(); ++i) midpoints[i] = (kDynamicMap[i] + kDynamicMap[i + 1]) * 0.5f;
  return midpoints;
}
BITFOLD_TABLE std::array<float, 255> kDynamicMidpoints = make_dynamic_midpoints();

}  // namespace bitfold
