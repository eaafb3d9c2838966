// The derivative of outputs, or of value and input gradient, of a SiLU MLP with respect to all its inputs:
// reference twin tgdp_fast.ops.mlp_value_and_grad_backward_reference, whose names the code uses.
#pragma once

#include <vector>

#include "mlp_forward.h"

namespace tgdp {

// The gradients to compute; null data for those that are not needed. All have the dtype of the call.
struct MlpGradients {
  Rows x;                     // [batch, inputs]
  Rows first_bias;            // [batch, H_1]; stride 0: summed over the batch
  std::vector<Rows> weights;  // W_1 .. W_L, head
  std::vector<Rows> biases;   // b_2 .. b_L, head
};

// output_cotangent [batch, outputs] and, for a single output, gradient_cotangent [batch, inputs] may have null data for
// zeros; pre_activations as the forward functions kept them.
//
// Without gradient_cotangent 4 B P FLOPs in matmuls (6 B P with the gradient of x), with it 10 B P, P weights. A block
// of rows goes forward and backward through all layers in cache; each thread adds the gradients of its blocks to its
// own accumulators (4 P bytes), which are summed in the order of the threads.
void mlp_backward(const MlpCall& call, const Rows& output_cotangent, const Rows& gradient_cotangent,
                  const std::vector<Rows>& pre_activations, const MlpGradients& gradients);

}  // namespace tgdp
