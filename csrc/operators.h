// Shared by the bindings of all devices: checks of tensors, and kernel arguments made of them.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <torch/version.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/long_convolution_call.h"
#include "common/solver_step.h"
#include "common/trajectory.h"

#define TGDP_TEXT_OF(value) #value
#define TGDP_TEXT(value) TGDP_TEXT_OF(value)

// What tgdp_fast/runtime/native.py looks for in the file before it loads it: ABIs of torch differ between minor
// versions.
#define TGDP_STAMP(further)                                                                                   \
  extern "C" __attribute__((visibility("default"), used)) const char tgdp_stamp[] =                           \
      "tgdp_fast was built for torch " TGDP_TEXT(TORCH_VERSION_MAJOR) "." TGDP_TEXT(TORCH_VERSION_MINOR) further

// The operators register themselves when the library is loaded; this only makes it a Python module.
#define TGDP_PYTHON_MODULE(name)                                                                  \
  extern "C" __attribute__((visibility("default"))) PyObject* PyInit_##name() {                   \
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, #name, nullptr, -1,      nullptr,     \
                                     nullptr,               nullptr, nullptr, nullptr};           \
    return PyModule_Create(&definition);                                                          \
  }

namespace tgdp {

using at::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "tgdp_fast: tensors must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The tensor, contiguous and in a dtype that kernels read; `hold` keeps it alive.
inline Elements elements_of(const Tensor& tensor, at::Device device, std::vector<Tensor>& hold) {
  TORCH_CHECK_VALUE(tensor.device() == device, "tgdp_fast: expected a tensor on ", device);
  const auto type = tensor.scalar_type();
  const bool known = type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
  hold.push_back((known ? tensor : tensor.to(at::kFloat)).contiguous());
  return {hold.back().const_data_ptr(), dtype_of(hold.back())};
}

inline uint32_t word_of(int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 0xffffffff, "tgdp_fast: words of keys and evaluations have 32 bits");
  return static_cast<uint32_t>(value);
}

// Without samples, they are 0, 1, 2, ..; `hold` keeps them alive.
inline NoiseCoordinates noise_coordinates(at::Device device, int64_t sample_size, const std::optional<Tensor>& samples,
                                          int64_t batch, int64_t key_low, int64_t key_high, int64_t evaluation,
                                          Tensor& hold) {
  TORCH_CHECK_VALUE(sample_size >= 0 && sample_size <= int64_t{4} << 32, "tgdp_fast: at most 2^34 elements per sample");
  NoiseCoordinates noise{sample_size, nullptr, word_of(key_low), word_of(key_high), word_of(evaluation)};
  if (samples) {
    TORCH_CHECK_VALUE(samples->scalar_type() == at::kLong && samples->dim() == 1 && samples->size(0) == batch &&
                          samples->device() == device,
                      "tgdp_fast: samples must be a 1-D int64 tensor, one number per sample, on ", device);
    hold = samples->contiguous();
    noise.samples = hold.const_data_ptr<int64_t>();
  }
  return noise;
}

// Widths of the hidden layers of an MLP, after checking its tensors: L + 1 weights, the last the head, and L biases.
inline std::vector<int64_t> checked_widths(const Tensor& x, const Tensor& first_bias, at::TensorList weights,
                                           at::TensorList biases) {
  TORCH_CHECK_VALUE(weights.size() >= 2 && biases.size() + 1 == weights.size(),
                    "tgdp_fast: weights must be L + 1 matrices and biases L vectors, L >= 1");
  TORCH_CHECK_VALUE(x.dim() == 2, "tgdp_fast: x must be [B, D]");
  std::vector<int64_t> widths;
  int64_t width = x.size(1);
  const auto check = [&x](const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device(),
                      "tgdp_fast: all dtypes and devices must be equal");
  };
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == width && weight.size(0) > 0,
                      "tgdp_fast: weights[", l, "] must have ", width, " columns");
    width = weight.size(0);
    TORCH_CHECK_VALUE(l == 0 || (biases[l - 1].dim() == 1 && biases[l - 1].size(0) == width),
                      "tgdp_fast: biases[", l, "] must have ", width, " entries");
    if (l + 1 < weights.size()) widths.push_back(width);
    check(weight);
    if (l > 0) check(biases[l - 1]);
  }
  const int64_t rows = first_bias.dim() == 2 ? first_bias.size(0) : 1;
  TORCH_CHECK_VALUE((first_bias.dim() == 1 || first_bias.dim() == 2) && first_bias.size(-1) == widths[0] &&
                        (rows == 1 || rows == x.size(0)),
                    "tgdp_fast: first_bias must be [H_1], [1, H_1] or [B, H_1]");
  check(first_bias);
  return widths;
}

// The tensors of one network of a trajectory.
struct NetworkTensors {
  at::TensorList weights, biases;
  const Tensor& evaluation_bias;             // [T, H_1]
  const std::optional<Tensor>& sample_bias;  // [B, H_1]
};

inline void check_first_biases(const Tensor& x, const NetworkTensors& network, int64_t width) {
  const auto check = [&](const Tensor& bias, int64_t rows) {
    TORCH_CHECK_VALUE(bias.dim() == 2 && bias.size(0) == rows && bias.size(1) == width &&
                          bias.scalar_type() == at::kFloat && bias.device() == x.device(),
                      "tgdp_fast: biases of evaluations and samples must be float32 [T, H_1] and [B, H_1] on the "
                      "device of x");
  };
  check(network.evaluation_bias, network.evaluation_bias.size(0));
  if (network.sample_bias) check(*network.sample_bias, x.size(0));
}

// The operator trajectory. Device(x.device()) keeps what it holds of tensors alive; network(x, tensors) gives the
// networks of a Device::Call, which is derived from Trajectory, and run(call, x, bf16x3) the first evaluation that
// diverged, or -1.
template <typename Device>
std::tuple<Tensor, Tensor> trajectory_operator(
    const Tensor& x, at::TensorList score_weights, at::TensorList score_biases, const Tensor& score_evaluation_bias,
    const std::optional<Tensor>& score_sample_bias, at::TensorList guidance_weights, at::TensorList guidance_biases,
    const Tensor& guidance_evaluation_bias, const std::optional<Tensor>& guidance_sample_bias, const Tensor& table,
    int64_t history, const std::optional<std::vector<double>>& clamp, std::optional<double> gradient_norm_limit,
    int64_t seed, const Tensor& sample_index, bool bf16x3) {
  const bool guided = !guidance_weights.empty();
  TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat && x.size(1) > 0,
                    "tgdp_fast: x must be float32 [B, D]");
  TORCH_CHECK_VALUE(sample_index.dim() == 1 && sample_index.size(0) == x.size(0) &&
                        sample_index.scalar_type() == at::kLong && sample_index.device() == x.device(),
                    "tgdp_fast: sample_index must be int64 [B] on the device of x");
  // Before anything is computed from its square.
  TORCH_CHECK_VALUE(history >= 0 && table.dim() == 2 && history < table.size(1) &&
                        table.size(1) == kEvaluationNumbers + (1 + history) * (2 + history) &&
                        table.scalar_type() == at::kDouble && table.device().is_cpu(),
                    "tgdp_fast: table must be float64 [T, 6 + (1 + H) (2 + H)] on the CPU");
  TORCH_CHECK_VALUE(!score_weights.empty() && score_weights[0].dim() == 2 &&
                        (!guided || guidance_weights[0].dim() == 2),
                    "tgdp_fast: weights must be L + 1 matrices and biases L vectors, L >= 1");
  TORCH_CHECK_VALUE(score_evaluation_bias.dim() == 2 && score_evaluation_bias.size(0) == table.size(0) &&
                        (!guided || (guidance_evaluation_bias.dim() == 2 &&
                                     guidance_evaluation_bias.size(0) == table.size(0))),
                    "tgdp_fast: biases of evaluations must have as many rows as the table");
  TORCH_CHECK_VALUE(!clamp || clamp->size() == 2, "tgdp_fast: clamp must have two numbers");
  Device device(x.device());
  const Tensor state = x.contiguous(), indices = sample_index.contiguous();
  const Tensor numbers = table.to(at::kFloat).contiguous().to(x.device());
  Tensor out = x.new_empty(x.sizes());
  typename Device::Call call;
  call.batch = x.size(0);
  call.size = x.size(1);
  call.slots = history;
  call.evaluations = table.size(0);
  call.x = state.const_data_ptr<float>();
  call.sample_index = indices.const_data_ptr<int64_t>();
  call.table = numbers.const_data_ptr<float>();
  if (clamp) {
    call.clamp = true;
    call.lowest = static_cast<float>((*clamp)[0]);
    call.highest = static_cast<float>((*clamp)[1]);
  }
  call.gradient_norm_limit = static_cast<float>(gradient_norm_limit.value_or(0.0));
  call.key_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  call.key_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  call.out = out.mutable_data_ptr<float>();
  call.score = device.network(x, {score_weights, score_biases, score_evaluation_bias, score_sample_bias});
  TORCH_CHECK_VALUE(score_weights.back().size(0) == call.size, "tgdp_fast: the score network must have D outputs");
  if (guided) {
    call.guidance =
        device.network(x, {guidance_weights, guidance_biases, guidance_evaluation_bias, guidance_sample_bias});
    TORCH_CHECK_VALUE(guidance_weights.back().size(0) == 1, "tgdp_fast: the guidance network must have one output");
  }
  return {out, device.run(call, x, bf16x3)};
}

// Of u and y [B, H, L], whose positions are contiguous; without filters.
inline LongConvolutionCall convolution_call(const Tensor& u, const Tensor& y, bool gelu) {
  LongConvolutionCall call;
  call.batch = u.size(0);
  call.channels = u.size(1);
  call.length = u.size(2);
  call.dtype = dtype_of(u);
  call.y_dtype = dtype_of(y);
  call.u = u.const_data_ptr();
  call.u_sample = u.stride(0);
  call.u_channel = u.stride(1);
  call.y = y.mutable_data_ptr();
  call.y_sample = y.stride(0);
  call.y_channel = y.stride(1);
  call.gelu = gelu;
  return call;
}

// The operator guided_step: kEmpty(sizes, options) gives memory for outputs, kRun(step, device) starts the kernel.
template <auto kEmpty, auto kRun>
std::tuple<Tensor, Tensor, Tensor> guided_step_operator(
    const Tensor& x, const Tensor& epsilon, const std::optional<Tensor>& gradient, const std::optional<Tensor>& history,
    at::ArrayRef<double> matrix, double noise_scale, double guidance_weight, double alpha, double sigma,
    std::optional<at::ArrayRef<double>> clamp, int64_t key_low, int64_t key_high,
    const std::optional<Tensor>& sample_index, int64_t evaluation) {
  SolverStep step;
  while ((1 + step.slots) * (2 + step.slots) < static_cast<int64_t>(matrix.size())) ++step.slots;
  const int64_t slots = step.slots, columns = 2 + slots;
  TORCH_CHECK_VALUE((1 + slots) * columns == static_cast<int64_t>(matrix.size()) && x.dim() >= 1,
                    "tgdp_fast: matrix must have (1 + H) (2 + H) entries and x a batch dimension");
  TORCH_CHECK_VALUE(epsilon.sizes() == x.sizes() && (!gradient || gradient->sizes() == x.sizes()),
                    "tgdp_fast: epsilon and gradient must have the shape of x");
  auto history_sizes = x.sizes().vec();
  history_sizes.insert(history_sizes.begin(), slots);
  TORCH_CHECK_VALUE(!history || history->sizes() == history_sizes, "tgdp_fast: history must have shape [H, *x.shape]");
  Tensor x_next = kEmpty(x.sizes(), x.options());
  Tensor history_next = kEmpty(history_sizes, x.options());
  Tensor x0 = kEmpty(x.sizes(), x.options());
  step.elements = x.numel();
  if (step.elements == 0) return {x_next, history_next, x0};

  std::vector<Tensor> hold;
  hold.reserve(4);
  step.x = elements_of(x, x.device(), hold);
  TORCH_CHECK_VALUE(x.scalar_type() == hold.back().scalar_type(), "tgdp_fast: no kernel for x in ", x.scalar_type());
  step.epsilon = elements_of(epsilon, x.device(), hold);
  if (gradient && guidance_weight != 0.0) step.gradient = elements_of(*gradient, x.device(), hold);
  const std::vector<float> coefficients(matrix.begin(), matrix.end());
  std::vector<Elements> slot_elements(slots);
  if (history && slots > 0) {
    const Elements all = elements_of(*history, x.device(), hold);
    for (int64_t slot = 0; slot < slots; ++slot) {
      bool used = false;
      for (int64_t row = 0; row <= slots; ++row) used |= coefficients[row * columns + 1 + slot] != 0.0f;
      if (!used) continue;
      const auto* data = static_cast<const char*>(all.data) + slot * step.elements * size_of(all.dtype);
      slot_elements[slot] = {data, all.dtype};
    }
  }
  step.matrix = coefficients.data();
  step.history = slot_elements.data();
  step.guidance = {static_cast<float>(guidance_weight), static_cast<float>(alpha), static_cast<float>(sigma)};
  if (clamp) {
    TORCH_CHECK_VALUE(clamp->size() == 2, "tgdp_fast: clamp must be two numbers");
    step.guidance.clamp = true;
    step.guidance.lowest = static_cast<float>((*clamp)[0]);
    step.guidance.highest = static_cast<float>((*clamp)[1]);
  }
  Tensor samples;
  step.noise_scale = static_cast<float>(noise_scale);
  if (step.noise_scale != 0.0f) {
    const int64_t batch = x.size(0);
    step.noise = noise_coordinates(x.device(), step.elements / batch, sample_index, batch, key_low, key_high,
                                   evaluation, samples);
  }
  step.x_next = x_next.mutable_data_ptr();
  step.history_next = history_next.mutable_data_ptr();
  step.x0 = x0.mutable_data_ptr();
  kRun(step, x.device());
  return {x_next, history_next, x0};
}

}  // namespace tgdp
