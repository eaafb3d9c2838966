#include "instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../common/portable.h"

namespace tgdp {
namespace {

Capability detect() {
#if defined(TGDP_X86_COPIES)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Capability::baseline;
  }
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512) return Capability::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
#else
  return Capability::baseline;
#endif
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Capability limit() {
  const char* name = std::getenv("TGDP_CPU_CAPABILITY");
  for (int i = 0; name != nullptr && i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Capability>(i);
  }
  return Capability::avx512_bf16;
}

}  // namespace

Capability capability() {
  static const Capability chosen = std::min(detect(), limit());
  return chosen;
}

const char* capability_name() { return kNames[static_cast<int>(capability())]; }

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
    using namespace instruction_sets;
    InstructionSet best = baseline;
    const InstructionSet* const higher[] = {&avx2, &avx512, &avx512_bf16};
    for (int i = 0; i < static_cast<int>(capability()); ++i) {
      if (higher[i]->pointwise != nullptr) best.pointwise = higher[i]->pointwise;
      if (higher[i]->guided_step != nullptr) best.guided_step = higher[i]->guided_step;
      if (higher[i]->long_convolution != nullptr) best.long_convolution = higher[i]->long_convolution;
      if (higher[i]->residual_block != nullptr) best.residual_block = higher[i]->residual_block;
    }
    return best;
  }();
  return chosen;
}

}  // namespace tgdp
