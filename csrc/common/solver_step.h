// One element of a guided solver step; reference twin tgdp_fast.ops.guided_step.guided_step_reference.
#pragma once

#include "portable.h"

namespace tgdp {

// The guidance and clamp of one evaluation.
struct Guidance {
  float weight = 0.0f;  // of the gradient
  float alpha = 1.0f;
  float sigma = 0.0f;
  float lowest = 0.0f, highest = 0.0f;  // limits of x0
};

// epsilon' = epsilon - weight * gradient and x0 = (x - sigma epsilon') / alpha, limited if kClamp; 5 FLOPs, 6 more for
// the clamp. The quotient is one, for 1 / alpha may overflow. NaN stays NaN.
template <bool kGradient, bool kClamp>
TGDP_FUNCTION void guide(const Guidance& guidance, float x, float epsilon, float gradient, float& guided, float& x0) {
  guided = kGradient ? epsilon - guidance.weight * gradient : epsilon;
  x0 = (x - guidance.sigma * guided) / guidance.alpha;
  if (!kClamp) return;
  float limited = x0 < guidance.lowest ? guidance.lowest : x0;
  limited = limited > guidance.highest ? guidance.highest : limited;
  // Recomputed where the clamp acts only: elsewhere the round trip through x0 would cost digits at small sigma.
  const float recomputed = (x - guidance.alpha * limited) / guidance.sigma;
  guided = limited == x0 ? guided : recomputed;
  x0 = limited;
}

// A row of the solver's matrix times the values at its columns; 2 kTerms FLOPs. From zero on, so that there is one way
// only to fuse products and sums, and zero terms change nothing, given or left out.
template <int kTerms>
TGDP_FUNCTION float matrix_row(const float (&coefficients)[kTerms], const float (&values)[kTerms]) {
  float sum = 0.0f;
  for (int term = 0; term < kTerms; ++term) sum += coefficients[term] * values[term];
  return sum;
}

}  // namespace tgdp
