// The CUDA kernels as implementations of the operators that bindings.cpp defines. Needs a torch that was built with CUDA.
#include <Python.h>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "cuda/launch.h"
#include "operators.h"

namespace {

using at::Tensor;

void check(const char* error) { TORCH_CHECK(error == nullptr, "tgdp_fast: ", error); }

Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

std::tuple<Tensor, Tensor, Tensor> guided_step(const Tensor& x, const Tensor& epsilon,
                                               const std::optional<Tensor>& gradient,
                                               const std::optional<Tensor>& history, at::ArrayRef<double> matrix,
                                               double noise_scale, double guidance_weight, double alpha, double sigma,
                                               std::optional<at::ArrayRef<double>> clamp, int64_t key_low,
                                               int64_t key_high, const std::optional<Tensor>& sample_index,
                                               int64_t evaluation) {
  const c10::cuda::CUDAGuard guard(x.device());
  return tgdp::guided_step_operator(x, epsilon, gradient, history, matrix, noise_scale, guidance_weight, alpha, sigma,
                                    clamp, key_low, key_high, sample_index, evaluation, &allocate,
                                    [](const tgdp::GuidedStepCall& call) {
                                      check(tgdp_cuda_guided_step(&call, c10::cuda::getCurrentCUDAStream().stream()));
                                    });
}

// The rows of a matrix in one piece; a copy is kept alive by `hold`. Memory that is freed later is not used again before
// this stream has come so far.
const Tensor& in_rows(const Tensor& matrix, std::vector<Tensor>& hold) {
  hold.push_back(matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous());
  return hold.back();
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_value_and_grad(const Tensor& x, const Tensor& first_bias,
                                                                   at::TensorList weights, at::TensorList biases,
                                                                   bool save_pre_activations, bool /*split*/) {
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<int64_t> widths = tgdp::checked_widths(x, first_bias, weights, biases);
  TORCH_CHECK_VALUE(weights.back().size(0) == 1, "tgdp_fast: the last of weights must have one row");
  std::vector<Tensor> hold;
  hold.reserve(2 * weights.size() + 2);
  tgdp::MlpValueAndGradCall call;
  call.dtype = tgdp::dtype_of(x);
  call.batch = x.size(0);
  call.inputs = x.size(1);
  call.layers = static_cast<int64_t>(widths.size());
  call.widths = widths.data();
  const Tensor& rows = in_rows(x, hold);
  call.x = rows.const_data_ptr();
  call.x_stride = rows.stride(0);
  const Tensor& bias = in_rows(first_bias.dim() == 1 ? first_bias.unsqueeze(0) : first_bias, hold);
  call.first_bias = bias.const_data_ptr();
  call.first_bias_stride = bias.size(0) == 1 ? 0 : bias.stride(0);
  std::vector<const void*> weight_data, bias_data;
  std::vector<int64_t> weight_strides;
  for (const Tensor& weight : weights) {
    const Tensor& matrix = in_rows(weight, hold);
    weight_data.push_back(matrix.const_data_ptr());
    weight_strides.push_back(matrix.stride(0));
  }
  for (const Tensor& entries : biases) {
    hold.push_back(entries.contiguous());
    bias_data.push_back(hold.back().const_data_ptr());
  }
  call.weights = weight_data.data();
  call.weight_strides = weight_strides.data();
  call.biases = bias_data.data();
  Tensor value = at::empty({call.batch}, x.options());
  Tensor gradient = at::empty({call.batch, call.inputs}, x.options());
  std::vector<Tensor> kept;
  std::vector<void*> kept_data;
  for (int64_t width : widths) {
    if (!save_pre_activations) break;
    kept.push_back(at::empty({call.batch, width}, x.options()));
    kept_data.push_back(kept.back().mutable_data_ptr());
  }
  call.value = value.mutable_data_ptr();
  call.gradient = gradient.mutable_data_ptr();
  call.keep = save_pre_activations ? kept_data.data() : nullptr;
  int64_t scratch_bytes = 0;
  check(tgdp_cuda_mlp_scratch(&call, &scratch_bytes));
  const Tensor scratch = at::empty({scratch_bytes}, x.options().dtype(at::kByte));
  call.scratch = scratch.mutable_data_ptr();
  check(tgdp_cuda_mlp_value_and_grad(&call, c10::cuda::getCurrentCUDAStream().stream()));
  return {value, gradient, kept};
}

}  // namespace

TORCH_LIBRARY_IMPL(tgdp_fast, CUDA, library) {
  library.impl("guided_step", &guided_step);
  library.impl("mlp_value_and_grad", &mlp_value_and_grad);
}

// The operators register themselves when the library is loaded; this only makes it a Python module.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1,      nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
