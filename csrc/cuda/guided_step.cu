// Which kernel of guided_step.cuh serves a call.
#include "guided_step.cuh"

#include "launch.h"

namespace tgdp::cuda {
namespace {

template <typename X, typename Network, int kSlots, int kCount>
const char* run(const GuidedStepCall& call, void* stream) {
  StepArguments<kSlots> arguments{};
  const bool noisy = call.noise_scale != 0.0f;
  arguments.elements = call.elements;
  arguments.sample_size = noisy ? call.noise.sample_size : call.elements;
  arguments.samples = noisy ? call.elements / call.noise.sample_size : 1;
  arguments.chunks_per_sample = (arguments.sample_size + kCount - 1) / kCount;
  arguments.slots = static_cast<int>(call.slots);
  arguments.x = call.x;
  arguments.epsilon = call.epsilon;
  arguments.gradient = call.gradient;
  for (int64_t slot = 0; slot < call.slots; ++slot) arguments.history[slot] = call.history[slot];
  for (int64_t i = 0; i < (1 + call.slots) * (2 + call.slots); ++i) arguments.matrix[i] = call.matrix[i];
  arguments.guidance = call.guidance;
  arguments.clamp = call.clamp;
  arguments.noise_scale = call.noise_scale;
  arguments.sample_index = call.noise.samples;
  arguments.key_low = call.noise.key_low;
  arguments.key_high = call.noise.key_high;
  arguments.evaluation = call.noise.evaluation;
  arguments.x_next = call.x_next;
  arguments.history_next = call.history_next;
  arguments.x0 = call.x0;
  const int64_t chunks = arguments.samples * arguments.chunks_per_sample;
  const int64_t blocks = (chunks + kStepThreads - 1) / kStepThreads;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  return launch(&guided_step_kernel<X, Network, kSlots, kCount>,
                static_cast<uint32_t>(blocks < kMostBlocks ? blocks : kMostBlocks), kStepThreads, 0, stream, arguments);
}

template <typename X, typename Network>
const char* run(const GuidedStepCall& call, void* stream) {
  // As many elements as make the narrower type 16 bytes, where that is not too many registers.
  constexpr int kCount = sizeof(typename X::Storage) == 2 ? 8 : 4;
  switch (call.slots) {
    case 0:
      return run<X, Network, 0, kCount>(call, stream);
    case 1:
      return run<X, Network, 1, kCount>(call, stream);
    default:
      return run<X, Network, 2, kCount>(call, stream);
  }
}

const char* run(const GuidedStepCall& call, void* stream) {
  bool special = call.slots <= 2 && (call.gradient.data == nullptr || call.gradient.dtype == call.epsilon.dtype);
  for (int64_t slot = 0; slot < call.slots; ++slot) {
    special = special && (call.history[slot].data == nullptr || call.history[slot].dtype == call.x.dtype);
  }
  if (special && call.x.dtype == Dtype::f32) {
    if (call.epsilon.dtype == Dtype::f32) return run<F32, F32>(call, stream);
    if (call.epsilon.dtype == Dtype::bf16) return run<F32, Bf16>(call, stream);
    return run<F32, F16>(call, stream);
  }
  if (special && call.x.dtype == Dtype::bf16 && call.epsilon.dtype == Dtype::bf16) return run<Bf16, Bf16>(call, stream);
  if (special && call.x.dtype == Dtype::f16 && call.epsilon.dtype == Dtype::f16) return run<F16, F16>(call, stream);
  return run<AnyElement, AnyElement, -1, 4>(call, stream);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_guided_step(const tgdp::GuidedStepCall* call, void* stream) {
  if (call->elements == 0) return nullptr;
  if (call->slots > tgdp::cuda::kMostSlots) return "guided_step: at most 16 history slots";
  return tgdp::cuda::run(*call, stream);
}
