// The native CPU operators as PyTorch sees them. Public functions, reference twins and argument checks that a user
// reads are in tgdp_fast/ops; here a wrong tensor is only kept from reaching a kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "cpu/mlp_backward.h"
#include "cpu/mlp_value_and_grad.h"

namespace {

using at::Tensor;

tgdp::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return tgdp::Dtype::f32;
    case at::kBFloat16:
      return tgdp::Dtype::bf16;
    case at::kHalf:
      return tgdp::Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "tgdp_fast: tensors must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// A 2-D tensor whose rows lie in one piece; anything else is copied into `hold`, which keeps the copy alive.
tgdp::Rows rows_of(const Tensor& tensor, std::vector<Tensor>& hold) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.device().is_cpu(), "tgdp_fast: expected a 2-D CPU tensor");
  const bool in_rows = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  hold.push_back(in_rows ? tensor : tensor.contiguous());
  const Tensor& held = hold.back();
  return {const_cast<void*>(held.const_data_ptr()), held.size(0) == 1 ? held.size(1) : held.stride(0), dtype_of(held)};
}

tgdp::MlpCall mlp_call(const Tensor& x, const Tensor& first_bias, at::TensorList weights, at::TensorList biases,
                       std::vector<Tensor>& hold) {
  TORCH_CHECK_VALUE(weights.size() >= 2 && biases.size() + 1 == weights.size(),
                    "tgdp_fast: weights must be L + 1 matrices and biases L vectors, L >= 1");
  tgdp::MlpCall call;
  call.batch = x.size(0);
  call.shape.inputs = x.size(1);
  int64_t width = x.size(1);
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == width && weight.size(0) > 0,
                      "tgdp_fast: weights[", l, "] must have ", width, " columns");
    width = weight.size(0);
    TORCH_CHECK_VALUE(l == 0 || (biases[l - 1].dim() == 1 && biases[l - 1].size(0) == width),
                      "tgdp_fast: biases[", l, "] must have ", width, " entries");
    if (l + 1 < weights.size()) call.shape.widths.push_back(width);
    call.weights.push_back(rows_of(weight, hold));
    if (l > 0) call.biases.push_back(rows_of(biases[l - 1].unsqueeze(0), hold));
  }
  call.shape.outputs = width;
  const Tensor bias = first_bias.dim() == 1 ? first_bias.unsqueeze(0) : first_bias;
  TORCH_CHECK_VALUE(bias.dim() == 2 && bias.size(1) == call.shape.widths[0] &&
                        (bias.size(0) == 1 || bias.size(0) == call.batch),
                    "tgdp_fast: first_bias must be [H_1], [1, H_1] or [B, H_1]");
  for (const Tensor& tensor : {x, bias}) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == weights[0].scalar_type(), "tgdp_fast: all dtypes must be equal");
  }
  for (const Tensor& tensor : weights) TORCH_CHECK_VALUE(tensor.scalar_type() == x.scalar_type(), "tgdp_fast: dtypes");
  for (const Tensor& tensor : biases) TORCH_CHECK_VALUE(tensor.scalar_type() == x.scalar_type(), "tgdp_fast: dtypes");
  call.x = rows_of(x, hold);
  call.first_bias = rows_of(bias, hold);
  if (bias.size(0) == 1) call.first_bias.stride = 0;
  return call;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_value_and_grad(const Tensor& x, const Tensor& first_bias,
                                                                   at::TensorList weights, at::TensorList biases,
                                                                   bool save_pre_activations, bool with_gradient,
                                                                   bool split) {
  std::vector<Tensor> hold;
  tgdp::MlpCall call = mlp_call(x, first_bias, weights, biases, hold);
  TORCH_CHECK_VALUE(call.shape.outputs == 1, "tgdp_fast: the last of weights must have one row");
  call.split = split;
  Tensor value = at::empty({call.batch}, x.options());
  Tensor gradient = at::empty({with_gradient ? call.batch : 0, call.shape.inputs}, x.options());
  std::vector<Tensor> kept;
  std::vector<tgdp::Rows> keep;
  if (save_pre_activations) {
    for (int64_t width : call.shape.widths) {
      kept.push_back(at::empty({call.batch, width}, x.options()));
      keep.push_back({kept.back().mutable_data_ptr(), width, call.x.dtype});
    }
  }
  const tgdp::Rows value_rows{value.mutable_data_ptr(), 1, call.x.dtype};
  tgdp::Rows gradient_rows{nullptr, call.shape.inputs, call.x.dtype};
  if (with_gradient) gradient_rows.data = gradient.mutable_data_ptr();
  tgdp::mlp_value_and_grad(call, value_rows, gradient_rows, keep);
  return {value, gradient, kept};
}

// Gradients of x, first_bias, weights and biases, in this order, of those with needs_grad.
std::vector<Tensor> mlp_value_and_grad_backward(const std::optional<Tensor>& value_cotangent,
                                                const std::optional<Tensor>& gradient_cotangent, const Tensor& x,
                                                const Tensor& first_bias, at::TensorList weights,
                                                at::TensorList pre_activations, c10::List<bool> needs_grad,
                                                bool split) {
  std::vector<Tensor> hold;
  // No gradient depends on the biases but through the pre-activations.
  std::vector<Tensor> biases;
  for (size_t l = 1; l < weights.size(); ++l) biases.push_back(at::zeros({weights[l].size(0)}, x.options()));
  tgdp::MlpCall call = mlp_call(x, first_bias, weights, biases, hold);
  call.split = split;
  const auto depth = call.shape.widths.size();
  TORCH_CHECK_VALUE(call.shape.outputs == 1 && pre_activations.size() == depth && needs_grad.size() == 2 * depth + 3,
                    "tgdp_fast: pre_activations must be L tensors and needs_grad 2 L + 3 flags");
  const auto check = [&](const Tensor& tensor, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == x.scalar_type(), "tgdp_fast: got ",
                      tensor.sizes(), " of ", tensor.scalar_type(), ", expected ", sizes, " of ", x.scalar_type());
  };
  tgdp::Rows value_rows, gradient_rows;
  if (value_cotangent.has_value()) {
    check(*value_cotangent, {call.batch});
    value_rows = rows_of(value_cotangent->contiguous().unsqueeze(1), hold);
  }
  if (gradient_cotangent.has_value()) {
    check(*gradient_cotangent, x.sizes());
    gradient_rows = rows_of(*gradient_cotangent, hold);
  }
  std::vector<tgdp::Rows> kept;
  for (size_t l = 0; l < depth; ++l) {
    check(pre_activations[l], {call.batch, call.shape.widths[l]});
    kept.push_back(rows_of(pre_activations[l], hold));
  }
  std::vector<Tensor> results;
  size_t next = 0;
  const auto result = [&](const Tensor& like) {
    tgdp::Rows rows;
    rows.dtype = call.x.dtype;
    rows.stride = like.size(-1);
    if (!needs_grad[next++]) return rows;
    results.push_back(at::empty(like.sizes(), x.options()));
    rows.data = results.back().mutable_data_ptr();
    return rows;
  };
  tgdp::MlpGradients gradients;
  gradients.x = result(x);
  gradients.first_bias = result(first_bias);
  if (call.first_bias.stride == 0) gradients.first_bias.stride = 0;
  for (const Tensor& weight : weights) gradients.weights.push_back(result(weight));
  for (const Tensor& bias : biases) gradients.biases.push_back(result(bias));
  tgdp::mlp_backward(call, value_rows, gradient_rows, kept, gradients);
  return results;
}

}  // namespace

// A fragment: the package also defines operators of this namespace in Python.
TORCH_LIBRARY_FRAGMENT(tgdp_fast, library) {
  library.def(
      "mlp_value_and_grad(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations, "
      "bool with_gradient, bool split) -> (Tensor, Tensor, Tensor[])");
  library.def(
      "mlp_value_and_grad_backward(Tensor? value_cotangent, Tensor? gradient_cotangent, Tensor x, Tensor first_bias, "
      "Tensor[] weights, Tensor[] pre_activations, bool[] needs_grad, bool split) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(tgdp_fast, CPU, library) {
  library.impl("mlp_value_and_grad", &mlp_value_and_grad);
  library.impl("mlp_value_and_grad_backward", &mlp_value_and_grad_backward);
}
