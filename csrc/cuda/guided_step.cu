// Which kernel of guided_step.cuh serves a call.
#include "guided_step.cuh"

#include <algorithm>

#include "launch.h"

namespace tgdp::cuda {
namespace {

template <typename X, typename Network, int kSlots, int kCount>
const char* run(const SolverStep& step, void* stream) {
  StepArguments<kSlots> arguments{};
  arguments.step = step;
  const bool noisy = step.noise_scale != 0.0f;
  arguments.sample_size = noisy ? step.noise.sample_size : step.elements;
  arguments.samples = noisy ? step.elements / step.noise.sample_size : 1;
  arguments.chunks_per_sample = (arguments.sample_size + kCount - 1) / kCount;
  std::copy_n(step.history, step.slots, arguments.history);
  std::copy_n(step.matrix, (1 + step.slots) * (2 + step.slots), arguments.matrix);
  const int64_t chunks = arguments.samples * arguments.chunks_per_sample;
  const int64_t blocks = (chunks + kStepThreads - 1) / kStepThreads;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  return launch(&guided_step_kernel<X, Network, kSlots, kCount>,
                static_cast<uint32_t>(blocks < kMostBlocks ? blocks : kMostBlocks), kStepThreads, 0, stream, arguments);
}

template <typename X, typename Network>
const char* run(const SolverStep& step, void* stream) {
  // As many elements as fill 16 bytes of the narrower type, unless that takes too many registers.
  constexpr int kCount = sizeof(typename X::Storage) == 2 ? 8 : 4;
  switch (step.slots) {
    case 0:
      return run<X, Network, 0, kCount>(step, stream);
    case 1:
      return run<X, Network, 1, kCount>(step, stream);
    default:
      return run<X, Network, 2, kCount>(step, stream);
  }
}

const char* run(const SolverStep& step, void* stream) {
  bool special = step.slots <= 2 && (step.gradient.data == nullptr || step.gradient.dtype == step.epsilon.dtype);
  for (int64_t slot = 0; slot < step.slots; ++slot) {
    special = special && (step.history[slot].data == nullptr || step.history[slot].dtype == step.x.dtype);
  }
  if (special && step.x.dtype == Dtype::f32) {
    if (step.epsilon.dtype == Dtype::f32) return run<F32, F32>(step, stream);
    if (step.epsilon.dtype == Dtype::bf16) return run<F32, Bf16>(step, stream);
    return run<F32, F16>(step, stream);
  }
  if (special && step.x.dtype == Dtype::bf16 && step.epsilon.dtype == Dtype::bf16) return run<Bf16, Bf16>(step, stream);
  if (special && step.x.dtype == Dtype::f16 && step.epsilon.dtype == Dtype::f16) return run<F16, F16>(step, stream);
  return run<AnyElement, AnyElement, -1, 4>(step, stream);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_guided_step(const tgdp::SolverStep* step, void* stream) {
  if (step->elements == 0) return nullptr;
  if (step->slots > tgdp::cuda::kMostSlots) return "guided_step: at most 16 history slots";
  return tgdp::cuda::run(*step, stream);
}
