// A whole trajectory but for its networks, as CPU and CUDA kernels take it. Reference twin
// tgdp_fast.ops.trajectory.trajectory_reference.
#pragma once

#include <stdint.h>

#include "portable.h"

namespace tgdp {

struct Trajectory {
  int64_t batch = 0, size = 0, slots = 0, evaluations = 0;
  const float* x = nullptr;               // [batch, size]
  const int64_t* sample_index = nullptr;  // [batch]
  const float* table = nullptr;           // [evaluations, kEvaluationNumbers + (1 + slots) (2 + slots)]
  bool clamp = false;
  float lowest = 0.0f, highest = 0.0f;  // limits of x0, with a clamp
  float gradient_norm_limit = 0.0f;     // of |guidance_weight| times the gradient, per sample; 0: none
  uint32_t key_low = 0, key_high = 0;
  float* out = nullptr;  // [batch, size]
};

// A row of the table; the solver's matrix [1 + slots, 2 + slots] follows these numbers.
struct Evaluation {
  float input_scale, output_scale;  // epsilon = input_scale x + output_scale network(x)
  float guidance_weight;            // of the guidance network's input gradient; 0: that network does not run
  float alpha, sigma, noise_scale;
  const float* matrix;
};

constexpr int kEvaluationNumbers = 6;

TGDP_FUNCTION Evaluation evaluation_at(const Trajectory& call, int64_t k) {
  const float* row = call.table + k * (kEvaluationNumbers + (1 + call.slots) * (2 + call.slots));
  return {row[0], row[1], row[2], row[3], row[4], row[5], row + kEvaluationNumbers};
}

}  // namespace tgdp
