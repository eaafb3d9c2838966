// The CUDA kernels as implementations of the operators that bindings.cpp defines. Needs a torch that was built with
// CUDA.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <list>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "operators.h"

namespace {

using at::Tensor;

void check(const char* error) { TORCH_CHECK(error == nullptr, "tgdp_fast: ", error); }

Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

void run_step(const tgdp::SolverStep& step, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check(tgdp_cuda_guided_step(&step, c10::cuda::getCurrentCUDAStream().stream()));
}

// Pointers to the weights and biases of an MLP with inputs and first bias like those given, with contiguous rows.
// Copies stay alive with it; memory that is freed later is not used again before this stream has got there.
class HeldNetwork {
 public:
  HeldNetwork() = default;
  HeldNetwork(const HeldNetwork&) = delete;

  void hold(const Tensor& x, const Tensor& first_bias, at::TensorList weight_list, at::TensorList bias_list) {
    widths_ = tgdp::checked_widths(x, first_bias, weight_list, bias_list);
    for (const Tensor& weight : weight_list) {
      const Tensor& matrix = in_rows(weight);
      weights_.push_back(matrix.const_data_ptr());
      strides_.push_back(matrix.stride(0));
    }
    for (const Tensor& entries : bias_list) {
      held_.push_back(entries.contiguous());
      biases_.push_back(held_.back().const_data_ptr());
    }
  }

  const Tensor& in_rows(const Tensor& matrix) {
    held_.push_back(matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous());
    return held_.back();
  }

  tgdp::NetworkCall call() const {
    return {static_cast<int64_t>(widths_.size()), widths_.data(), weights_.data(), strides_.data(), biases_.data()};
  }
  const std::vector<int64_t>& widths() const { return widths_; }

 private:
  std::vector<int64_t> widths_, strides_;
  std::vector<const void*> weights_, biases_;
  std::list<Tensor> held_;  // a list: nothing in it may move
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_value_and_grad(const Tensor& x, const Tensor& first_bias,
                                                                   at::TensorList weights, at::TensorList biases,
                                                                   bool save_pre_activations, bool /*bf16x3*/) {
  const c10::cuda::CUDAGuard guard(x.device());
  HeldNetwork network;
  network.hold(x, first_bias, weights, biases);
  TORCH_CHECK_VALUE(weights.back().size(0) == 1, "tgdp_fast: the last of weights must have one row");
  tgdp::MlpValueAndGradCall call;
  call.dtype = tgdp::dtype_of(x);
  call.batch = x.size(0);
  call.inputs = x.size(1);
  call.network = network.call();
  const Tensor& rows = network.in_rows(x);
  call.x = rows.const_data_ptr();
  call.x_stride = rows.stride(0);
  const Tensor& bias = network.in_rows(first_bias.dim() == 1 ? first_bias.unsqueeze(0) : first_bias);
  call.first_bias = bias.const_data_ptr();
  call.first_bias_stride = bias.size(0) == 1 ? 0 : bias.stride(0);
  Tensor value = at::empty({call.batch}, x.options());
  Tensor gradient = at::empty({call.batch, call.inputs}, x.options());
  std::vector<Tensor> kept;
  std::vector<void*> kept_data;
  for (int64_t width : network.widths()) {
    if (!save_pre_activations) break;
    kept.push_back(at::empty({call.batch, width}, x.options()));
    kept_data.push_back(kept.back().mutable_data_ptr());
  }
  call.value = value.mutable_data_ptr();
  call.gradient = gradient.mutable_data_ptr();
  call.keep = save_pre_activations ? kept_data.data() : nullptr;
  tgdp::LaunchPlan plan;
  check(tgdp_cuda_mlp_plan(&call, &plan));
  const Tensor scratch = at::empty({plan.scratch_bytes}, x.options().dtype(at::kByte));
  call.scratch = scratch.mutable_data_ptr();
  check(tgdp_cuda_mlp_value_and_grad(&call, c10::cuda::getCurrentCUDAStream().stream()));
  return {value, gradient, kept};
}

class CudaTrajectory {
 public:
  using Call = tgdp::TrajectoryKernelCall;

  explicit CudaTrajectory(at::Device device) : guard_(device) {}

  tgdp::TrajectoryNetworkCall network(const Tensor& x, const tgdp::NetworkTensors& tensors) {
    HeldNetwork& network = networks_[count_++];
    // The checks take inputs of the weights' dtype, on their device.
    const auto options = x.options().dtype(tensors.weights[0].scalar_type());
    network.hold(at::empty({0, x.size(1)}, options), at::empty({1, tensors.weights[0].size(0)}, options),
                 tensors.weights, tensors.biases);
    tgdp::check_first_biases(x, tensors, network.widths()[0]);
    const auto dtype = tgdp::dtype_of(tensors.weights[0]);
    TORCH_CHECK_VALUE(count_ == 1 || dtype == dtype_, "tgdp_fast: both networks must have one dtype");
    dtype_ = dtype;
    tgdp::TrajectoryNetworkCall call;
    call.network = network.call();
    const Tensor& of_evaluations = network.in_rows(tensors.evaluation_bias);
    call.evaluation_bias = of_evaluations.const_data_ptr<float>();
    call.evaluation_bias_stride = of_evaluations.stride(0);
    if (tensors.sample_bias) {
      const Tensor& of_samples = network.in_rows(*tensors.sample_bias);
      call.sample_bias = of_samples.const_data_ptr<float>();
      call.sample_bias_stride = of_samples.stride(0);
    }
    return call;
  }

  Tensor run(Call& call, const Tensor& x, bool /*bf16x3*/) const {
    constexpr int kNone = std::numeric_limits<int>::max();
    Tensor first_failure = at::empty({}, x.options().dtype(at::kInt)).fill_(kNone);
    call.dtype = dtype_;
    call.first_failure = first_failure.mutable_data_ptr<int>();
    tgdp::LaunchPlan plan;
    check(tgdp_cuda_trajectory_plan(&call, &plan));
    const Tensor scratch = at::empty({plan.scratch_bytes}, x.options().dtype(at::kByte));
    call.scratch = scratch.mutable_data_ptr();
    check(tgdp_cuda_trajectory(&call, c10::cuda::getCurrentCUDAStream().stream()));
    Tensor diverged = first_failure.to(at::kLong);
    return diverged.masked_fill_(diverged.eq(kNone), -1);
  }

 private:
  c10::cuda::CUDAGuard guard_;
  HeldNetwork networks_[2];
  int count_ = 0;
  tgdp::Dtype dtype_ = tgdp::Dtype::f32;
};

// Why the kernel cannot serve networks of these widths on a device, or an empty string.
std::string trajectory_refusal(int64_t device, at::ScalarType dtype, int64_t size, int64_t history,
                               at::IntArrayRef score_widths, at::IntArrayRef guidance_widths) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  tgdp::TrajectoryKernelCall call;
  call.dtype = dtype == at::kBFloat16 ? tgdp::Dtype::bf16 : dtype == at::kHalf ? tgdp::Dtype::f16 : tgdp::Dtype::f32;
  call.size = size;
  call.slots = history;
  call.score.network.layers = static_cast<int64_t>(score_widths.size());
  call.score.network.widths = score_widths.data();
  call.guidance.network.layers = static_cast<int64_t>(guidance_widths.size());
  call.guidance.network.widths = guidance_widths.data();
  tgdp::LaunchPlan plan;
  const char* reason = tgdp_cuda_trajectory_plan(&call, &plan);
  return reason == nullptr ? "" : reason;
}

// packed: [H, M, 2], float16 with scales [H], or float32 without. y: [B, H, L], with any strides but the last.
void long_convolution_into(const Tensor& u, const Tensor& packed, const Tensor& scales, bool gelu, bool saturate,
                           const Tensor& y) {
  const c10::cuda::CUDAGuard guard(u.device());
  TORCH_CHECK_VALUE(u.dim() == 3, "tgdp_fast: u must be [B, H, L]");
  const int64_t channels = u.size(1), length = u.size(2);
  const bool half = packed.scalar_type() == at::kHalf;
  TORCH_CHECK_VALUE(packed.dim() == 3 && packed.size(0) == channels && packed.size(1) >= length &&
                        packed.size(2) == 2 && packed.is_contiguous() && packed.device() == u.device() &&
                        (half || packed.scalar_type() == at::kFloat),
                    "tgdp_fast: packed must be [H, M, 2], float32 or float16, in one piece, with M at least L, on ",
                    u.device());
  TORCH_CHECK_VALUE(scales.dim() == 1 && scales.size(0) == (half ? channels : 0) &&
                        scales.scalar_type() == at::kFloat && scales.is_contiguous() && scales.device() == u.device(),
                    "tgdp_fast: scales must be float32, one for each channel of float16 spectra, on ", u.device());
  TORCH_CHECK_VALUE(y.sizes() == u.sizes() && y.device() == u.device() && (y.stride(2) == 1 || length <= 1),
                    "tgdp_fast: y must be [B, H, L] on ", u.device(), ", with the positions of a signal in one piece");
  const Tensor held = u.stride(2) == 1 || length <= 1 ? u : u.contiguous();
  tgdp::LongConvolutionCall call = tgdp::convolution_call(held, y, gelu);
  call.filters = {packed.const_data_ptr(), half ? scales.const_data_ptr<float>() : nullptr, packed.size(1)};
  call.saturate = saturate;
  check(tgdp_cuda_long_convolution(&call, c10::cuda::getCurrentCUDAStream().stream()));
}

Tensor long_convolution(const Tensor& u, const Tensor& packed, const Tensor& scales, bool gelu) {
  const c10::cuda::CUDAGuard guard(u.device());
  Tensor y = at::empty(u.sizes(), u.options());
  long_convolution_into(u, packed, scales, gelu, false, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tgdp_fast, library) {
  library.def(
      "cuda_trajectory_refusal(int device, ScalarType dtype, int size, int history, int[] score_widths, "
      "int[] guidance_widths) -> str",
      &trajectory_refusal);
  library.def(
      "cuda_long_convolution_(Tensor u, Tensor packed, Tensor scales, bool gelu, bool saturate, Tensor(a!) y) -> ()",
      &long_convolution_into);
}

TORCH_LIBRARY_IMPL(tgdp_fast, CUDA, library) {
  library.impl("guided_step", &tgdp::guided_step_operator<&allocate, &run_step>);
  library.impl("mlp_value_and_grad", &mlp_value_and_grad);
  library.impl("trajectory", &tgdp::trajectory_operator<CudaTrajectory>);
  library.impl("long_convolution", &long_convolution);
}

TGDP_STAMP(" and GPU architectures " TGDP_TEXT(GPU_ARCHITECTURES));
TGDP_PYTHON_MODULE(_cuda)
