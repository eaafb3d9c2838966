// Outputs of a SiLU MLP, and value and input gradient of one with a single output: reference twins
// tgdp_fast.ops.mlp.mlp_forward_reference and mlp_value_and_grad_reference.
#pragma once

#include <cstdint>
#include <vector>

#include "mlp.h"

namespace tgdp {

struct MlpCall {
  MlpShape shape;
  bool bf16x3 = false;  // matmuls of float32
  int64_t batch = 0;
  Rows x;                     // [batch, inputs]
  Rows first_bias;            // [batch, H_1], or stride 0
  std::vector<Rows> weights;  // W_1 .. W_L, head
  std::vector<Rows> biases;   // b_2 .. b_L, head
};

// value [batch]; gradient [batch, inputs]; keep: one [batch, H_l] per layer, or empty.
//
// 4 B P FLOPs in matmuls, P weights; memory read and written once: x, value, gradient, keep; the weights once per block
// of rows, from cache.
void mlp_value_and_grad(const MlpCall& call, const Rows& value, const Rows& gradient, const std::vector<Rows>& keep);

// output [batch, outputs]; keep as above. 2 B P FLOPs in matmuls, P weights; memory: x, output, keep.
void mlp_outputs(const MlpCall& call, const Rows& output, const std::vector<Rows>& keep);

}  // namespace tgdp
