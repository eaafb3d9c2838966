// The native CPU operators as PyTorch sees them. Public functions, reference twins and argument checks that a user
// reads are in tgdp_fast/ops; here a wrong tensor is only kept from reaching a kernel.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

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

}  // namespace

// A fragment: the package also defines operators of this namespace in Python.
TORCH_LIBRARY_FRAGMENT(tgdp_fast, library) {
  library.def(
      "mlp_value_and_grad(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations, "
      "bool with_gradient, bool split) -> (Tensor, Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(tgdp_fast, CPU, library) {
  library.impl("mlp_value_and_grad", &mlp_value_and_grad);
}
