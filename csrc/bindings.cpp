// The native CPU operators as PyTorch sees them. Public functions, reference twins and the argument checks for users
// are in tgdp_fast/ops; the checks here only keep wrong tensors from reaching a kernel.
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/guided_step.h"
#include "cpu/instruction_set.h"
#include "cpu/long_convolution.h"
#include "cpu/mlp_backward.h"
#include "cpu/mlp_forward.h"
#include "cpu/pool.h"
#include "cpu/residual_block.h"
#include "cpu/trajectory.h"
#include "operators.h"

namespace {

using at::Tensor;
using tgdp::dtype_of;
using tgdp::noise_coordinates;

// A 2-D tensor with contiguous rows; any other is copied. `hold` keeps it alive.
tgdp::Rows rows_of(const Tensor& tensor, std::vector<Tensor>& hold) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.device().is_cpu(), "tgdp_fast: expected a 2-D CPU tensor");
  const bool in_rows = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  hold.push_back(in_rows ? tensor : tensor.contiguous());
  const Tensor& held = hold.back();
  return {const_cast<void*>(held.const_data_ptr()), held.size(0) == 1 ? held.size(1) : held.stride(0), dtype_of(held)};
}

tgdp::MlpCall mlp_call(const Tensor& x, const Tensor& first_bias, at::TensorList weights, at::TensorList biases,
                       std::vector<Tensor>& hold) {
  tgdp::MlpCall call;
  call.shape.widths = tgdp::checked_widths(x, first_bias, weights, biases);
  call.batch = x.size(0);
  call.shape.inputs = x.size(1);
  call.shape.outputs = weights.back().size(0);
  for (const Tensor& weight : weights) call.weights.push_back(rows_of(weight, hold));
  for (const Tensor& bias : biases) call.biases.push_back(rows_of(bias.unsqueeze(0), hold));
  const Tensor bias = first_bias.dim() == 1 ? first_bias.unsqueeze(0) : first_bias;
  call.x = rows_of(x, hold);
  call.first_bias = rows_of(bias, hold);
  if (bias.size(0) == 1) call.first_bias.stride = 0;
  return call;
}

// Tensors for pre-activations, [B, H_l] per layer, and in `rows` where kernels write them; none unless wanted.
std::vector<Tensor> pre_activations_of(const tgdp::MlpCall& call, const Tensor& x, bool wanted,
                                       std::vector<tgdp::Rows>& rows) {
  std::vector<Tensor> kept;
  if (!wanted) return kept;
  for (int64_t width : call.shape.widths) {
    kept.push_back(tgdp::empty_output({call.batch, width}, x.options()));
    rows.push_back({kept.back().mutable_data_ptr(), width, call.x.dtype});
  }
  return kept;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_value_and_grad(const Tensor& x, const Tensor& first_bias,
                                                                   at::TensorList weights, at::TensorList biases,
                                                                   bool save_pre_activations, bool bf16x3) {
  std::vector<Tensor> hold;
  tgdp::MlpCall call = mlp_call(x, first_bias, weights, biases, hold);
  TORCH_CHECK_VALUE(call.shape.outputs == 1, "tgdp_fast: the last of weights must have one row");
  call.bf16x3 = bf16x3;
  Tensor value = x.new_empty({call.batch});
  Tensor gradient = tgdp::empty_output({call.batch, call.shape.inputs}, x.options());
  std::vector<tgdp::Rows> keep;
  std::vector<Tensor> kept = pre_activations_of(call, x, save_pre_activations, keep);
  tgdp::mlp_value_and_grad(call, {value.mutable_data_ptr(), 1, call.x.dtype},
                           {gradient.mutable_data_ptr(), call.shape.inputs, call.x.dtype}, keep);
  return {value, gradient, kept};
}

std::tuple<Tensor, std::vector<Tensor>> mlp_forward(const Tensor& x, const Tensor& first_bias, at::TensorList weights,
                                                    at::TensorList biases, bool save_pre_activations) {
  std::vector<Tensor> hold;
  const tgdp::MlpCall call = mlp_call(x, first_bias, weights, biases, hold);
  Tensor output = tgdp::empty_output({call.batch, call.shape.outputs}, x.options());
  std::vector<tgdp::Rows> keep;
  std::vector<Tensor> kept = pre_activations_of(call, x, save_pre_activations, keep);
  tgdp::mlp_outputs(call, {output.mutable_data_ptr(), call.shape.outputs, call.x.dtype}, keep);
  return {output, kept};
}

// Gradients of those of x, first_bias, weights and biases, in this order, with needs_grad.
std::vector<Tensor> mlp_backward(const std::optional<Tensor>& output_cotangent,
                                 const std::optional<Tensor>& gradient_cotangent, const Tensor& x,
                                 const Tensor& first_bias, at::TensorList weights, at::TensorList pre_activations,
                                 const c10::List<bool>& needs_grad, bool bf16x3) {
  std::vector<Tensor> hold;
  // Gradients depend on the biases only through the pre-activations.
  std::vector<Tensor> biases;
  for (size_t l = 1; l < weights.size(); ++l) biases.push_back(x.new_zeros({weights[l].size(0)}));
  tgdp::MlpCall call = mlp_call(x, first_bias, weights, biases, hold);
  call.bf16x3 = bf16x3;
  const auto depth = call.shape.widths.size();
  TORCH_CHECK_VALUE(pre_activations.size() == depth && needs_grad.size() == 2 * depth + 3,
                    "tgdp_fast: pre_activations must be L tensors and needs_grad 2 L + 3 flags");
  const auto checked = [&](const Tensor& tensor, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == x.scalar_type(), "tgdp_fast: got ",
                      tensor.sizes(), " of ", tensor.scalar_type(), ", expected ", sizes, " of ", x.scalar_type());
    return rows_of(tensor, hold);
  };
  tgdp::Rows output_rows, gradient_rows;
  if (output_cotangent) output_rows = checked(*output_cotangent, {call.batch, call.shape.outputs});
  if (gradient_cotangent) gradient_rows = checked(*gradient_cotangent, x.sizes());
  std::vector<tgdp::Rows> kept;
  for (size_t l = 0; l < depth; ++l) kept.push_back(checked(pre_activations[l], {call.batch, call.shape.widths[l]}));
  std::vector<Tensor> results;
  size_t next = 0;
  const auto result = [&](const Tensor& like) {
    tgdp::Rows rows;
    rows.dtype = call.x.dtype;
    rows.stride = like.size(-1);
    if (!needs_grad[next++]) return rows;
    results.push_back(tgdp::empty_output(like.sizes(), x.options()));
    rows.data = results.back().mutable_data_ptr();
    return rows;
  };
  tgdp::MlpGradients gradients;
  gradients.x = result(x);
  gradients.first_bias = result(first_bias);
  // By its shape: the stride is also 0 of an expanded bias, which has a gradient for each sample.
  if (first_bias.dim() == 1 || first_bias.size(0) == 1) gradients.first_bias.stride = 0;
  for (const Tensor& weight : weights) gradients.weights.push_back(result(weight));
  for (const Tensor& bias : biases) gradients.biases.push_back(result(bias));
  tgdp::mlp_backward(call, output_rows, gradient_rows, kept, gradients);
  return results;
}

std::vector<Tensor> mlp_value_and_grad_backward(const std::optional<Tensor>& value_cotangent,
                                                const std::optional<Tensor>& gradient_cotangent, const Tensor& x,
                                                const Tensor& first_bias, at::TensorList weights,
                                                at::TensorList pre_activations, const c10::List<bool>& needs_grad,
                                                bool bf16x3) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.back().size(0) == 1,
                    "tgdp_fast: the last of weights must have one row");
  TORCH_CHECK_VALUE(!value_cotangent || value_cotangent->dim() == 1, "tgdp_fast: value_cotangent must be [B]");
  const auto output_cotangent = value_cotangent ? std::optional<Tensor>(value_cotangent->unsqueeze(1)) : std::nullopt;
  return mlp_backward(output_cotangent, gradient_cotangent, x, first_bias, weights, pre_activations, needs_grad,
                      bf16x3);
}

std::vector<Tensor> mlp_forward_backward(const Tensor& output_cotangent, const Tensor& x, const Tensor& first_bias,
                                         at::TensorList weights, at::TensorList pre_activations,
                                         const c10::List<bool>& needs_grad) {
  return mlp_backward(output_cotangent, std::nullopt, x, first_bias, weights, pre_activations, needs_grad, false);
}

class CpuTrajectory {
 public:
  using Call = tgdp::TrajectoryCall;

  explicit CpuTrajectory(at::Device) {}

  tgdp::TrajectoryNetwork network(const Tensor& x, const tgdp::NetworkTensors& tensors) {
    // The checks take an input of the weights' dtype.
    const auto& first = tensors.weights[0];
    const Tensor like = first.new_empty({0, x.size(1)});
    const Tensor bias = first.new_empty({1, first.size(0)});
    const tgdp::MlpCall call = mlp_call(like, bias, tensors.weights, tensors.biases, hold_);
    tgdp::check_first_biases(x, tensors, call.shape.widths[0]);
    tgdp::TrajectoryNetwork network{call.shape, call.weights, call.biases, rows_of(tensors.evaluation_bias, hold_), {}};
    if (tensors.sample_bias) network.sample_bias = rows_of(*tensors.sample_bias, hold_);
    return network;
  }

  Tensor run(Call& call, const Tensor& x, bool bf16x3) const {
    call.bf16x3 = bf16x3;
    return x.new_full({}, tgdp::trajectory(call), x.options().dtype(at::kLong));
  }

 private:
  std::vector<Tensor> hold_;
};

Tensor normal_range(const Tensor& samples, int64_t num_elements, int64_t first, int64_t count, int64_t key_low,
                    int64_t key_high, int64_t evaluation) {
  Tensor hold;
  const auto noise =
      noise_coordinates(at::kCPU, num_elements, samples, samples.numel(), key_low, key_high, evaluation, hold);
  int64_t elements = 0;
  const bool counted = !__builtin_mul_overflow(samples.numel(), num_elements, &elements);
  TORCH_CHECK_VALUE(counted && first >= 0 && count >= 0 && first <= elements && count <= elements - first,
                    "tgdp_fast: elements outside of the samples");
  Tensor out = tgdp::empty_output({count}, samples.options().dtype(at::kFloat));
  if (count > 0) tgdp::normals(noise, first, count, out.mutable_data_ptr<float>());
  return out;
}

void run_step(const tgdp::SolverStep& step, at::Device) { tgdp::guided_step(step); }

// Filters for long_convolution from their spectra, float64 [H, M, 2]: packed float32 and nothing, or with `half` packed
// float16 and scales.
std::tuple<Tensor, Tensor> pack_long_convolution(const Tensor& spectra, bool half) {
  TORCH_CHECK_VALUE(spectra.dim() == 3 && spectra.size(2) == 2 && spectra.scalar_type() == at::kDouble &&
                        spectra.device().is_cpu(),
                    "tgdp_fast: spectra must be float64 [H, M, 2] on the CPU");
  const int64_t channels = spectra.size(0), points = spectra.size(1);
  TORCH_CHECK_VALUE(tgdp::has_long_convolution(points), "tgdp_fast: no transform of ", points, " points");
  const Tensor held = spectra.contiguous();
  const int64_t size = tgdp::packed_filter_size(channels, points), groups = size / (2 * points * tgdp::kChannelGroup);
  // In huge pages, where there are any: each call reads all of it.
  Tensor packed = tgdp::empty_output({groups, points, 2, tgdp::kChannelGroup},
                                     spectra.options().dtype(half ? at::kHalf : at::kFloat));
  Tensor scales = spectra.new_empty({half ? groups * tgdp::kChannelGroup : 0}, spectra.options().dtype(at::kFloat));
  tgdp::pack_filters(held.const_data_ptr<double>(), channels, points, packed.mutable_data_ptr(),
                     half ? scales.mutable_data_ptr<float>() : nullptr);
  return {packed, scales};
}

// Filters of `channels` channels for signals of `length` positions.
tgdp::PackedFilters packed_filters(const Tensor& packed, const Tensor& scales, int64_t channels, int64_t length) {
  const bool half = packed.scalar_type() == at::kHalf;
  TORCH_CHECK_VALUE(packed.dim() == 4 && packed.size(2) == 2 && packed.size(3) == tgdp::kChannelGroup &&
                        packed.is_contiguous() && packed.device().is_cpu() &&
                        (half || packed.scalar_type() == at::kFloat),
                    "tgdp_fast: packed must be what pack_long_convolution gives");
  const int64_t points = packed.size(1), lanes = packed.size(0) * tgdp::kChannelGroup;
  TORCH_CHECK_VALUE(tgdp::has_long_convolution(points) && length <= points && channels <= lanes &&
                        channels > lanes - tgdp::kChannelGroup,
                    "tgdp_fast: packed must belong to the channels of u and have at least L points");
  TORCH_CHECK_VALUE(!half || (scales.dim() == 1 && scales.size(0) == lanes && scales.scalar_type() == at::kFloat &&
                              scales.is_contiguous() && scales.device().is_cpu()),
                    "tgdp_fast: scales must be what pack_long_convolution gives");
  return {packed.const_data_ptr(), half ? scales.const_data_ptr<float>() : nullptr, points};
}

Tensor long_convolution(const Tensor& u, const Tensor& packed, const Tensor& scales, bool gelu) {
  TORCH_CHECK_VALUE(u.dim() == 3 && u.device().is_cpu(), "tgdp_fast: u must be [B, H, L] on the CPU");
  const Tensor held = u.stride(2) == 1 || u.size(2) <= 1 ? u : u.contiguous();
  Tensor y = tgdp::empty_output(u.sizes(), u.options());
  tgdp::LongConvolutionCall call = tgdp::convolution_call(held, y, gelu);
  call.filters = packed_filters(packed, scales, call.channels, call.length);
  if (u.numel() > 0) tgdp::long_convolution(call);
  return y;
}

// The data of a contiguous CPU tensor of these sizes.
const void* checked_data(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.sizes() == sizes &&
                        tensor.scalar_type() == dtype,
                    "tgdp_fast: expected a contiguous CPU tensor of sizes ", sizes, " and dtype ", dtype, ", got ",
                    tensor.sizes(), " and ", tensor.scalar_type());
  return tensor.const_data_ptr();
}

const float* checked_floats(const Tensor& tensor, at::IntArrayRef sizes) {
  return static_cast<const float*>(checked_data(tensor, sizes, at::kFloat));
}

// One row per sample, `stride` apart, or one for all.
const float* bias_rows(const Tensor& bias, int64_t batch, at::IntArrayRef row, int64_t& stride) {
  TORCH_CHECK_VALUE(bias.dim() > 0 && (bias.size(0) == 1 || bias.size(0) == batch),
                    "tgdp_fast: a bias must have one row or one for each sample");
  stride = bias.size(0) == 1 ? 0 : bias.stride(0);
  return bias.size(0) == 0 ? nullptr : checked_floats(bias[0], row);
}

// Each layer: packed filters, their scales, mixture, and of each channel mixture bias, LayerNorm's weight and bias.
void residual_block(const Tensor& state, const Tensor& step_bias, const std::optional<Tensor>& label_bias,
                    const Tensor& convolution, at::TensorList first, double first_epsilon, at::TensorList second,
                    double second_epsilon, const Tensor& output, const Tensor& output_bias) {
  TORCH_CHECK_VALUE(state.dim() == 3 && output.dim() == 2 && state.size(2) > 0 && state.size(1) >= output.size(1) &&
                        output.size(1) > 0,
                    "tgdp_fast: state must be [B, C + S, L] and output [C + S, C]");
  tgdp::ResidualBlockCall call;
  call.batch = state.size(0);
  call.channels = output.size(1);
  call.skip = state.size(1) - call.channels;
  call.length = state.size(2);
  const at::ScalarType dtype = output.scalar_type();
  call.dtype = dtype_of(output);
  TORCH_CHECK_VALUE(dtype == at::kFloat || (dtype == at::kBFloat16 && tgdp::has_bf16_matmuls()),
                    "tgdp_fast: weights must be float32, or bfloat16 where the processor multiplies it");
  TORCH_CHECK_VALUE(dtype == at::kFloat || call.channels % 2 == 0, "tgdp_fast: C must be even for bfloat16");
  const int64_t rows = 2 * call.channels;
  call.state = const_cast<float*>(checked_floats(state, state.sizes()));
  call.step_bias = bias_rows(step_bias, call.batch, {3, rows}, call.step_stride);
  if (label_bias.has_value()) call.label_bias = bias_rows(*label_bias, call.batch, {rows}, call.label_stride);
  call.convolution = checked_data(convolution, {rows, 3 * call.channels}, dtype);
  const auto layer = [&](at::TensorList tensors, double epsilon) {
    TORCH_CHECK_VALUE(tensors.size() == 6, "tgdp_fast: a layer has six tensors");
    tgdp::S4Layer result;
    result.filters = packed_filters(tensors[0], tensors[1], rows, call.length);
    result.mixture = checked_data(tensors[2], {rows, rows}, dtype);
    result.mixture_bias = checked_floats(tensors[3], {rows});
    result.norm_weight = checked_floats(tensors[4], {rows});
    result.norm_bias = checked_floats(tensors[5], {rows});
    result.epsilon = static_cast<float>(epsilon);
    return result;
  };
  call.first = layer(first, first_epsilon);
  call.second = layer(second, second_epsilon);
  call.output = checked_data(output, {state.size(1), call.channels}, dtype);
  call.output_bias = checked_floats(output_bias, {state.size(1)});
  tgdp::residual_block(call);
}

}  // namespace

// A fragment: the package also defines operators of this namespace in Python.
TORCH_LIBRARY_FRAGMENT(tgdp_fast, library) {
  library.def(
      "mlp_value_and_grad(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations, "
      "bool bf16x3) -> (Tensor, Tensor, Tensor[])");
  library.def(
      "mlp_value_and_grad_backward(Tensor? value_cotangent, Tensor? gradient_cotangent, Tensor x, Tensor first_bias, "
      "Tensor[] weights, Tensor[] pre_activations, bool[] needs_grad, bool bf16x3) -> Tensor[]");
  library.def(
      "mlp_forward(Tensor x, Tensor first_bias, Tensor[] weights, Tensor[] biases, bool save_pre_activations) -> "
      "(Tensor, Tensor[])");
  library.def(
      "mlp_backward(Tensor output_cotangent, Tensor x, Tensor first_bias, Tensor[] weights, "
      "Tensor[] pre_activations, bool[] needs_grad) -> Tensor[]");
  library.def(
      "trajectory(Tensor x, Tensor[] score_weights, Tensor[] score_biases, Tensor score_evaluation_bias, "
      "Tensor? score_sample_bias, Tensor[] guidance_weights, Tensor[] guidance_biases, "
      "Tensor guidance_evaluation_bias, Tensor? guidance_sample_bias, Tensor table, int history, float[]? clamp, "
      "float? gradient_norm_limit, int seed, Tensor sample_index, bool bf16x3) -> (Tensor, Tensor)");
  library.def(
      "guided_step(Tensor x, Tensor epsilon, Tensor? gradient, Tensor? history, float[] matrix, float noise_scale, "
      "float guidance_weight, float alpha, float sigma, float[]? clamp, SymInt key_low, SymInt key_high, "
      "Tensor? sample_index, SymInt evaluation) -> (Tensor, Tensor, Tensor)");
  library.def("pack_long_convolution(Tensor spectra, bool half) -> (Tensor, Tensor)");
  library.def("long_convolution(Tensor u, Tensor packed, Tensor scales, bool gelu) -> Tensor");
  library.def(
      "residual_block_(Tensor(a!) state, Tensor step_bias, Tensor? label_bias, Tensor convolution, Tensor[] first, "
      "float first_epsilon, Tensor[] second, float second_epsilon, Tensor output, Tensor output_bias) -> ()");
  library.def("has_bf16_matmuls() -> bool", []() { return tgdp::has_bf16_matmuls(); });
  library.def("cpu_capability() -> str", []() { return std::string(tgdp::capability_name()); });
  library.def(
      "normal_range(Tensor samples, SymInt num_elements, SymInt first, SymInt count, SymInt key_low, SymInt key_high, "
      "SymInt evaluation) -> Tensor");
}

TORCH_LIBRARY_IMPL(tgdp_fast, CPU, library) {
  library.impl("mlp_value_and_grad", &mlp_value_and_grad);
  library.impl("mlp_value_and_grad_backward", &mlp_value_and_grad_backward);
  library.impl("mlp_forward", &mlp_forward);
  library.impl("mlp_backward", &mlp_forward_backward);
  library.impl("trajectory", &tgdp::trajectory_operator<CpuTrajectory>);
  library.impl("guided_step", &tgdp::guided_step_operator<&tgdp::empty_output, &run_step>);
  library.impl("pack_long_convolution", &pack_long_convolution);
  library.impl("long_convolution", &long_convolution);
  library.impl("residual_block_", &residual_block);
  library.impl("normal_range", &normal_range);
}

TGDP_STAMP("");
TGDP_PYTHON_MODULE(_cpu)
