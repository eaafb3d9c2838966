// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), step 3 of the
// specification in tgdp_fast/ops/noise.py; reference twin tgdp_fast.ops.noise.philox4x32.
#pragma once

#include "portable.h"

namespace tgdp {

// A 32-bit word in the low half of 64 bits; the high half is arbitrary. The 32x32->64 bit multiplication then leaves
// its two words where the next round needs them, and a vector unit needs no shuffles.
struct ScalarWords {
  using Word = uint64_t;
  static TGDP_FUNCTION Word product(Word word, uint32_t factor) { return (word & 0xffffffffu) * factor; }
};

// Ten rounds on c0..c3, in place; only their low halves count. Words is ScalarWords, or has a vector of 64-bit words:
// 2 multiplications, 2 shifts and 4 exclusive ors per round.
template <typename Words>
TGDP_FUNCTION void philox4x32(typename Words::Word& c0, typename Words::Word& c1, typename Words::Word& c2,
                              typename Words::Word& c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const typename Words::Word p0 = Words::product(c0, 0xD2511F53u);
    const typename Words::Word p1 = Words::product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace tgdp
