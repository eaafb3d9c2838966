// Which of the copies of a kernel, compiled once per instruction set, this processor runs.
#pragma once

namespace tgdp {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best that the processor has; TGDP_CPU_CAPABILITY=baseline|avx2|avx512 lowers the choice.
Capability capability();

// The best copy that is allowed and was compiled; all but the baseline may be null.
template <typename Table>
const Table& best_copy(const Table* baseline, const Table* avx2, const Table* avx512) {
  if (capability() >= Capability::avx512 && avx512 != nullptr) return *avx512;
  if (capability() >= Capability::avx2 && avx2 != nullptr) return *avx2;
  return *baseline;
}

}  // namespace tgdp
