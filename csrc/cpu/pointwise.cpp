#include "pointwise.h"

#include "capability.h"

namespace tgdp {

const Pointwise& pointwise() {
  using namespace pointwise_copies;
  static const Pointwise& chosen = best_copy({baseline(), avx2(), avx512(), avx512_bf16()});
  return chosen;
}

}  // namespace tgdp
