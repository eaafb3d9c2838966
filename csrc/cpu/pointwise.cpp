#include "pointwise.h"

#include "capability.h"

namespace tgdp {

const Pointwise& pointwise() {
  static const Pointwise& chosen =
      best_copy(pointwise_copies::baseline(), pointwise_copies::avx2(), pointwise_copies::avx512());
  return chosen;
}

}  // namespace tgdp
