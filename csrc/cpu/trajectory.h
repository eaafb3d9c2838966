// All evaluations of score network, guidance network and solver for a block of samples before the next block:
// reference twin tgdp_fast.ops.trajectory.trajectory_reference.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "guided_step.h"
#include "mlp.h"

namespace tgdp {

// A perceptron whose first bias is a row per evaluation plus, where there are labels, a row per sample.
struct TrajectoryNetwork {
  MlpShape shape;
  std::vector<Rows> weights, biases;
  Rows evaluation_bias;             // [evaluations, H_1]
  std::optional<Rows> sample_bias;  // [batch, H_1]
};

// Host coefficients of one evaluation; epsilon = input_scale x + output_scale network(x).
struct TrajectoryEvaluation {
  float input_scale, output_scale;
  float guidance_weight;  // of the guidance network's input gradient; 0: that network does not run
  float alpha, sigma, noise_scale;
  std::vector<float> matrix;  // [1 + slots, 2 + slots]
};

struct TrajectoryCall {
  int64_t batch = 0, size = 0, slots = 0;
  const float* x = nullptr;               // [batch, size]
  const int64_t* sample_index = nullptr;  // [batch]
  TrajectoryNetwork score;
  std::optional<TrajectoryNetwork> guidance;
  std::vector<TrajectoryEvaluation> evaluations;
  std::optional<std::pair<float, float>> clamp;
  std::optional<float> gradient_norm_limit;  // of |guidance_weight| times the gradient, per sample
  uint64_t seed = 0;
  bool split = false;
};

// out [batch, size]; returns the first evaluation after which a sample was not finite, or -1.
//
// Per sample and evaluation 2 P FLOPs for the score network and 4 P for the guidance network, P weights; from and to
// memory only x, once, and the weights from cache once per block of rows. A sample does not depend on its block.
int64_t trajectory(const TrajectoryCall& call, float* out);

}  // namespace tgdp
