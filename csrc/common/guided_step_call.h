// What a kernel of guided_step is given; reference twin tgdp_fast.ops.guided_step.guided_step_reference.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "solver_step.h"

namespace tgdp {

// Elements in one piece of memory; null: not read.
struct Elements {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// Coordinates of noise for samples of one size; see tgdp_fast/ops/noise.py.
struct NoiseCoordinates {
  int64_t sample_size = 1;
  const int64_t* samples = nullptr;  // null: 0, 1, 2, ..
  uint32_t key_low = 0, key_high = 0, evaluation = 0;
};

struct GuidedStepCall {
  int64_t elements = 0;
  int64_t slots = 0;  // of the history
  Elements x, epsilon, gradient;
  const Elements* history = nullptr;  // one per slot
  const float* matrix = nullptr;      // [1 + slots, 2 + slots]
  Guidance guidance;
  bool clamp = false;
  float noise_scale = 0.0f;
  NoiseCoordinates noise;
  // Outputs in the dtype of x; the history's slots follow one another.
  void* x_next = nullptr;
  void* history_next = nullptr;
  void* x0 = nullptr;
  bool past_cache = false;  // write around the caches: for outputs that they could not keep; CPU only
};

}  // namespace tgdp
