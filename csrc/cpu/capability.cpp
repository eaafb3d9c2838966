#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace tgdp {
namespace {

Capability detect() {
#if defined(__x86_64__) && defined(__GNUC__)
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

Capability limit() {
  const char* name = std::getenv("TGDP_CPU_CAPABILITY");
  if (name != nullptr && std::strcmp(name, "baseline") == 0) return Capability::baseline;
  if (name != nullptr && std::strcmp(name, "avx2") == 0) return Capability::avx2;
  if (name != nullptr && std::strcmp(name, "avx512") == 0) return Capability::avx512;
  return Capability::avx512_bf16;
}

}  // namespace

Capability capability() {
  static const Capability chosen = std::min(detect(), limit());
  return chosen;
}

}  // namespace tgdp
