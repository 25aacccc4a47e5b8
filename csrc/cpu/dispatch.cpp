// Chooses the instruction set, once per process.
#include "cpu/dispatch.hpp"

#if defined(BITFOLD_HAVE_AVX2)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace bitfold::cpu {

#define BITFOLD_DECLARE(name)                         \
  void fill_convert_##name(Kernels&);                 \
  void fill_encode_##name(Kernels&);                  \
  void fill_decode_##name(Kernels&);                  \
  void fill_fused_##name(Kernels&);                   \
  void fill_words_##name(Kernels&);                   \
  void fill_tiled_##name(Kernels&);                   \
  void fill_decode_blocks_##name(Kernels&);           \
  void fill_blocks_##name(Kernels&);                  \
  void fill_int8_##name(Kernels&);                    \
  void fill_rows_int8_##name(Kernels&);               \
  void fill_gptq_##name(Kernels&);                    \
  void fill_step_search_##name(Kernels&);             \
  void fill_kv_##name(Kernels&);                      \
  void fill_encode_blocks_affine_##name(Kernels&);    \
  void fill_encode_blocks_symmetric_##name(Kernels&); \
  void fill_encode_blocks_iq4_##name(Kernels&);       \
  void fill_encode_blocks_legacy_##name(Kernels&);
#define BITFOLD_FILL(name)                        \
  [](Kernels& kernels) {                          \
    kernels.isa = #name;                          \
    fill_convert_##name(kernels);                 \
    fill_encode_##name(kernels);                  \
    fill_decode_##name(kernels);                  \
    fill_fused_##name(kernels);                   \
    fill_words_##name(kernels);                   \
    fill_tiled_##name(kernels);                   \
    fill_decode_blocks_##name(kernels);           \
    fill_blocks_##name(kernels);                  \
    fill_int8_##name(kernels);                    \
    fill_rows_int8_##name(kernels);               \
    fill_gptq_##name(kernels);                    \
    fill_step_search_##name(kernels);             \
    fill_kv_##name(kernels);                      \
    fill_encode_blocks_affine_##name(kernels);    \
    fill_encode_blocks_symmetric_##name(kernels); \
    fill_encode_blocks_iq4_##name(kernels);       \
    fill_encode_blocks_legacy_##name(kernels);    \
  }

BITFOLD_DECLARE(scalar)
#if defined(BITFOLD_HAVE_AVX2)
BITFOLD_DECLARE(avx2)
BITFOLD_DECLARE(avx512)
#endif
#if defined(BITFOLD_HAVE_AVX512_VNNI)
void fill_int8_avx512_vnni(Kernels&);
void fill_rows_int8_avx512_vnni(Kernels&);
void fill_tiled_bf16_avx512_bf16(Kernels&);
#endif
#if defined(BITFOLD_HAVE_NEON)
BITFOLD_DECLARE(neon)
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  bool wanted;  // without being asked for
  void (*fill)(Kernels&);
};

#if defined(BITFOLD_HAVE_AVX2)
// __builtin_cpu_supports of Clang 14 doesn't know the name.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// From the most wanted to the one that always runs.
std::vector<Isa> known_isas() {
  std::vector<Isa> isas;
#if defined(BITFOLD_HAVE_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(BITFOLD_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(BITFOLD_HAVE_AVX512_VNNI)
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  // Intel's cores multiply bf16 pairs more slowly than fp32 (compare BITFOLD_ISA=avx512 and avx512_bf16 at 128 rows),
  // so it is not their choice. AMD's are taken to be faster, by torch's figures for bf16 there; bitfold was not timed.
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  isas.push_back({"avx512_bf16", bf16, bf16 && __builtin_cpu_is("amd"), [](Kernels& kernels) {
                    BITFOLD_FILL(avx512)(kernels);
                    fill_int8_avx512_vnni(kernels);
                    fill_rows_int8_avx512_vnni(kernels);
                    fill_tiled_bf16_avx512_bf16(kernels);
                    kernels.isa = "avx512_bf16";
                  }});
  isas.push_back({"avx512_vnni", vnni, true, [](Kernels& kernels) {
                    BITFOLD_FILL(avx512)(kernels);
                    fill_int8_avx512_vnni(kernels);
                    fill_rows_int8_avx512_vnni(kernels);
                    kernels.isa = "avx512_vnni";
                  }});
#endif
  isas.push_back({"avx512", avx512, true, BITFOLD_FILL(avx512)});
  isas.push_back({"avx2", avx2, true, BITFOLD_FILL(avx2)});
#endif
#if defined(BITFOLD_HAVE_NEON)
  isas.push_back({"neon", true, true, BITFOLD_FILL(neon)});
#endif
  isas.push_back({"scalar", true, true, BITFOLD_FILL(scalar)});
  return isas;
}

Kernels choose() {
  const std::vector<Isa> isas = known_isas();
  const char* wanted = std::getenv("BITFOLD_ISA");
  std::string usable;
  for (const Isa& isa : isas) {
    if (isa.available) usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
  }
  for (const Isa& isa : isas) {
    const bool chosen = wanted == nullptr || *wanted == '\0' ? isa.wanted : std::string(wanted) == isa.name;
    if (chosen && isa.available) {
      Kernels kernels{};
      isa.fill(kernels);
      return kernels;
    }
  }
  throw std::invalid_argument("BITFOLD_ISA is '" + std::string(wanted) + "'; on this CPU it must be one of " + usable);
}

}  // namespace

std::vector<IsaInfo> isas() {
  std::vector<IsaInfo> infos;
  for (const Isa& isa : known_isas()) infos.push_back({isa.name, isa.available});
  return infos;
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace bitfold::cpu
