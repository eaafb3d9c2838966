// All evaluations of score network, guidance network and solver for a block of samples before the next block:
// reference twin tgdp_fast.ops.trajectory.trajectory_reference.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/trajectory.h"
#include "guided_step.h"
#include "mlp.h"

namespace tgdp {

// An MLP whose first bias is a row per evaluation plus, where there are labels, a row per sample.
struct TrajectoryNetwork {
  MlpShape shape;
  std::vector<Rows> weights, biases;
  Rows evaluation_bias;             // [evaluations, H_1]
  std::optional<Rows> sample_bias;  // [batch, H_1]
};

struct TrajectoryCall : Trajectory {
  TrajectoryNetwork score;
  std::optional<TrajectoryNetwork> guidance;
  bool bf16x3 = false;  // matmuls of float32
};

// Returns the first evaluation after which a sample was not finite, or -1.
//
// Per sample and evaluation 2 P FLOPs for the score network and 4 P for the guidance network, P weights; from and to
// memory only x, once, and the weights from cache once per block of rows. A sample does not depend on its block.
int64_t trajectory(const TrajectoryCall& call);

}  // namespace tgdp
