#include "pointwise.h"

#include <cstdlib>
#include <cstring>

namespace tgdp {
namespace {

const Pointwise* choose() {
  const char* limit = std::getenv("TGDP_CPU_CAPABILITY");
  const auto allowed = [limit](int level) {
    if (limit == nullptr) return true;
    if (std::strcmp(limit, "baseline") == 0) return level <= 0;
    return std::strcmp(limit, "avx2") == 0 ? level <= 1 : true;
  };
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allowed(2) && has_avx512 && capabilities::avx512() != nullptr) return capabilities::avx512();
  if (allowed(1) && has_avx2 && capabilities::avx2() != nullptr) return capabilities::avx2();
#else
  (void)allowed;
#endif
  return capabilities::baseline();
}

}  // namespace

const Pointwise& pointwise() {
  static const Pointwise* chosen = choose();
  return *chosen;
}

}  // namespace tgdp
