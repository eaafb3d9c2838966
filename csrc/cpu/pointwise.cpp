#include "pointwise.h"

#include <cstdlib>
#include <cstring>

namespace tgdp {
namespace {

const Pointwise* choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const struct {
    bool present;
    const Pointwise* functions;
  } best_first[] = {{avx512 && __builtin_cpu_supports("avx512bf16"), capabilities::avx512_bf16()},
                    {avx512, capabilities::avx512()},
                    {avx2, capabilities::avx2()}};
  const char* limit = std::getenv("TGDP_CPU_CAPABILITY");
  bool allowed = limit == nullptr;
  for (const auto& candidate : best_first) {
    if (candidate.functions == nullptr) continue;
    allowed = allowed || std::strcmp(limit, candidate.functions->name) == 0;
    if (allowed && candidate.present) return candidate.functions;
  }
#endif
  return capabilities::baseline();
}

}  // namespace

const Pointwise& pointwise() {
  static const Pointwise* chosen = choose();
  return *chosen;
}

}  // namespace tgdp
