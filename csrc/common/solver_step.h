// One guided solver step: its values, as CPU and CUDA kernels take them, and the arithmetic of one element. Reference
// twin tgdp_fast.ops.guided_step.guided_step_reference.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "portable.h"

namespace tgdp {

// Contiguous elements; null: not read.
struct Elements {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// The guidance and clamp of one evaluation.
struct Guidance {
  float weight = 0.0f;  // of the gradient
  float alpha = 1.0f;
  float sigma = 0.0f;
  bool clamp = false;
  float lowest = 0.0f, highest = 0.0f;  // limits of x0, with a clamp
};

// Coordinates of noise for samples of one size; see tgdp_fast/ops/noise.py.
struct NoiseCoordinates {
  int64_t sample_size = 1;
  const int64_t* samples = nullptr;  // null: 0, 1, 2, ..
  uint32_t key_low = 0, key_high = 0, evaluation = 0;
};

struct SolverStep {
  int64_t elements = 0;
  int64_t slots = 0;  // of the history
  Elements x, epsilon, gradient;
  const Elements* history = nullptr;  // one per slot
  const float* matrix = nullptr;      // [1 + slots, 2 + slots]
  Guidance guidance;
  float noise_scale = 0.0f;
  NoiseCoordinates noise;
  // Outputs in the dtype of x; the slots of the history follow one another.
  void* x_next = nullptr;
  void* history_next = nullptr;
  void* x0 = nullptr;
};

// epsilon' = epsilon - weight * gradient and x0 = (x - sigma epsilon') / alpha, limited if kClamp; 5 FLOPs, 6 more for
// the clamp. A single quotient, because 1 / alpha may overflow. NaN stays NaN.
template <bool kGradient, bool kClamp>
TGDP_FUNCTION void guide(const Guidance& guidance, float x, float epsilon, float gradient, float& guided, float& x0) {
  guided = kGradient ? epsilon - guidance.weight * gradient : epsilon;
  x0 = (x - guidance.sigma * guided) / guidance.alpha;
  if (!kClamp) return;
  float limited = x0 < guidance.lowest ? guidance.lowest : x0;
  limited = limited > guidance.highest ? guidance.highest : limited;
  // Recomputed only where the clamp acts: elsewhere the round trip through x0 would cost digits at small sigma.
  const float recomputed = (x - guidance.alpha * limited) / guidance.sigma;
  guided = limited == x0 ? guided : recomputed;
  x0 = limited;
}

// A row of the solver's matrix times the values at its columns; 2 kTerms FLOPs. The sum starts from zero, so that there
// is only one way to fuse multiplications and additions, and a zero term changes nothing, whether it is given or left
// out.
template <int kTerms>
TGDP_FUNCTION float matrix_row(const float (&coefficients)[kTerms], const float (&values)[kTerms]) {
  float sum = 0.0f;
  for (int term = 0; term < kTerms; ++term) sum += coefficients[term] * values[term];
  return sum;
}

}  // namespace tgdp
