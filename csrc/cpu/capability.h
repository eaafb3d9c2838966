// Which of the copies of a kernel, compiled once per instruction set, this processor runs.
#pragma once

namespace tgdp {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best that the processor has; TGDP_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 lowers the choice.
Capability capability();
const char* capability_name();

// The best copy that is allowed and was compiled; copies in the order of Capability, and all but the baseline may be
// missing.
template <typename Table, int kCopies>
const Table& best_copy(const Table* const (&copies)[kCopies]) {
  int best = static_cast<int>(capability());
  best = best < kCopies ? best : kCopies - 1;
  while (best > 0 && copies[best] == nullptr) --best;
  return *copies[best];
}

}  // namespace tgdp
