// The host interface of the CUDA kernels: plain data in, null or an error message out, which is valid until the
// thread's next call. Memory is that of the device, `stream` a cudaStream_t; nothing waits for the device. Host arrays
// that a call points to are read before the function returns.
#pragma once

#include "../common/long_convolution_call.h"
#include "../common/solver_step.h"
#include "../common/trajectory.h"

namespace tgdp {

// The layers of a SiLU MLP; strides are elements between rows, here and below.
struct NetworkCall {
  int64_t layers = 0;                       // hidden ones; 0: there is no network
  const int64_t* widths = nullptr;          // [layers]
  const void* const* weights = nullptr;     // [layers + 1] of W_1 .. W_L, head
  const int64_t* weight_strides = nullptr;  // [layers + 1]
  const void* const* biases = nullptr;      // [layers] of b_2 .. b_L, head
};

struct MlpValueAndGradCall {
  Dtype dtype = Dtype::f32;  // of all tensors
  int64_t batch = 0, inputs = 0;
  NetworkCall network;
  const void* x = nullptr;  // [batch, inputs]
  int64_t x_stride = 0;
  const void* first_bias = nullptr;  // [batch, H_1], or one row with stride 0
  int64_t first_bias_stride = 0;
  void* value = nullptr;        // [batch]
  void* gradient = nullptr;     // [batch, inputs]
  void* const* keep = nullptr;  // [layers] of z_l [batch, H_l], or null
  void* scratch = nullptr;      // as many bytes as the plan says
};

struct TrajectoryNetworkCall {
  NetworkCall network;
  const float* evaluation_bias = nullptr;  // [evaluations, H_1]
  int64_t evaluation_bias_stride = 0;
  const float* sample_bias = nullptr;  // [batch, H_1], or null
  int64_t sample_bias_stride = 0;
};

struct TrajectoryKernelCall : Trajectory {
  Dtype dtype = Dtype::f32;  // of weights and biases
  TrajectoryNetworkCall score, guidance;
  int* first_failure = nullptr;  // in device memory: lowered to the first evaluation that diverged
  void* scratch = nullptr;       // as many bytes as the plan says
};

// How a call is divided into blocks on a device.
struct LaunchPlan {
  int64_t blocks = 0, rows = 0;          // rows of a batch per block
  int64_t panel = 0, depth = 0;          // columns of results, and of operands, that a block handles at a time
  int64_t shared_bytes = 0;              // of a block
  int64_t scratch_bytes = 0;             // in all
  int64_t cluster = 1;                   // blocks with the same rows that share the columns of layers
};

}  // namespace tgdp

extern "C" {

// Reference twin tgdp_fast.ops.guided_step.guided_step_reference. At most 16 slots.
const char* tgdp_cuda_guided_step(const tgdp::SolverStep* call, void* stream);

// Reference twin tgdp_fast.ops.mlp_value_and_grad.mlp_value_and_grad_reference. At most 8 layers, as wide as shared
// memory allows: 512 on every device from sm_80 on.
const char* tgdp_cuda_mlp_value_and_grad(const tgdp::MlpValueAndGradCall* call, void* stream);

// The plan on the current device, or why the call cannot be served; of its pointers, only the one to widths is read.
const char* tgdp_cuda_mlp_plan(const tgdp::MlpValueAndGradCall* call, tgdp::LaunchPlan* plan);

// Reference twin tgdp_fast.ops.trajectory.trajectory_reference. At most 4 slots and 8 layers; state and layers in
// shared memory. By clusters of blocks for few samples where the device has them; the results are the same bit for bit.
const char* tgdp_cuda_trajectory(const tgdp::TrajectoryKernelCall* call, void* stream);

// As tgdp_cuda_mlp_plan.
const char* tgdp_cuda_trajectory_plan(const tgdp::TrajectoryKernelCall* call, tgdp::LaunchPlan* plan);

// Reference twin tgdp_fast.ops.long_convolution.long_convolution_reference. 256, 512 or 1024 points; spectra are
// [channels, M] pairs, aligned to 8 bytes or, in float16, to 4. y has the dtype of u or, with float16 spectra, is bfloat16
// or float16 of wider or float16 numbers.
const char* tgdp_cuda_long_convolution(const tgdp::LongConvolutionCall* call, void* stream);
}
