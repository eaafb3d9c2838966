// Which kernel of mlp_value_and_grad.cuh serves a call, and how it is launched.
#include "mlp_value_and_grad.cuh"

#include <type_traits>

#include "launch.h"

namespace tgdp::cuda {
namespace {

// How a call is cut up; blocks 0: it does not fit.
struct Plan {
  int rows = 0, pitch = 0;
  int64_t blocks = 0;
  size_t shared_bytes = 0, scratch_bytes = 0;
};

template <typename Tile>
Plan plan_with(const MlpValueAndGradCall& call, const Limits& limits) {
  // What the system takes of a multiprocessor's memory for every block.
  constexpr size_t kReserved = 1024;
  int widest = 0;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const int width = static_cast<int>(call.widths[layer]);
    if (width > widest) widest = width;
  }
  Plan plan;
  plan.rows = Tile::kRows;
  plan.pitch = rounded_up(widest, Tile::kDepth) + Tile::kPadding;
  const int layers = static_cast<int>(call.layers);
  const size_t of_multiprocessor = static_cast<size_t>(limits.shared_per_multiprocessor);
  plan.shared_bytes = mlp_layout<Tile>(layers, plan.pitch, true).bytes;
  size_t resident = of_multiprocessor / (plan.shared_bytes + kReserved);
  const bool slopes_in_shared = resident >= kResident;
  if (!slopes_in_shared) {
    plan.shared_bytes = mlp_layout<Tile>(layers, plan.pitch, false).bytes;
    resident = of_multiprocessor / (plan.shared_bytes + kReserved);
  }
  if (plan.shared_bytes > static_cast<size_t>(limits.shared_per_block)) return plan;
  const int64_t most = limits.multiprocessors * static_cast<int64_t>(resident < kResident ? 1 : kResident);
  const int64_t needed = (call.batch + Tile::kRows - 1) / Tile::kRows;
  plan.blocks = needed < most ? needed : most;
  if (!slopes_in_shared) plan.scratch_bytes = plan.blocks * slope_words<Tile>(layers, plan.pitch) * sizeof(uint32_t);
  return plan;
}

template <typename Tile>
const char* run(const MlpValueAndGradCall& call, const Plan& plan, void* stream) {
  MlpArguments arguments{};
  arguments.batch = call.batch;
  arguments.inputs = static_cast<int>(call.inputs);
  arguments.layers = static_cast<int>(call.layers);
  arguments.pitch = plan.pitch;
  arguments.x = {call.x, call.x_stride};
  arguments.first_bias = {call.first_bias, call.first_bias_stride};
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    arguments.widths[layer] = static_cast<int>(call.widths[layer]);
    arguments.biases[layer] = call.biases[layer];
    arguments.keep[layer] = call.keep == nullptr ? nullptr : call.keep[layer];
  }
  for (int64_t layer = 0; layer <= call.layers; ++layer) {
    arguments.weights[layer] = {call.weights[layer], call.weight_strides[layer]};
  }
  arguments.value = call.value;
  arguments.gradient = call.gradient;
  arguments.scratch = plan.scratch_bytes > 0 ? static_cast<uint32_t*>(call.scratch) : nullptr;
  return launch(&mlp_value_and_grad_kernel<Tile>, static_cast<uint32_t>(plan.blocks), kProductThreads,
                plan.shared_bytes, stream, arguments);
}

// Calls body(tile, plan) with the tile to use: many rows, unless they do not fit or leave multiprocessors idle.
template <typename Large, typename Small, typename Body>
const char* with_rows(const MlpValueAndGradCall& call, const Limits& limits, const Body& body) {
  const Plan large = plan_with<Large>(call, limits);
  const bool few = call.batch <= static_cast<int64_t>(limits.multiprocessors) * Small::kRows;
  if (large.blocks > 0 && !few) return body(static_cast<Large*>(nullptr), large);
  const Plan small = plan_with<Small>(call, limits);
  if (small.blocks > 0) return body(static_cast<Small*>(nullptr), small);
  return "mlp_value_and_grad: the layers are too wide for the shared memory of this device";
}

template <typename Body>
const char* with_tile(const MlpValueAndGradCall& call, const Body& body) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (call.layers < 1 || call.layers > kMostLayers) return "mlp_value_and_grad: 1 to 8 hidden layers";
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    if (call.widths[layer] < 1 || call.widths[layer] > kMost) return "mlp_value_and_grad: widths are from 1 to 2^30";
  }
  if (call.inputs > kMost) return "mlp_value_and_grad: at most 2^30 inputs";
  Limits limits{};
  if (const char* error = device_limits(limits)) return error;
  if (call.dtype == Dtype::bf16) return with_rows<TensorCoreTile<Bf16, 64>, TensorCoreTile<Bf16, 32>>(call, limits, body);
  if (call.dtype == Dtype::f16) return with_rows<TensorCoreTile<F16, 64>, TensorCoreTile<F16, 32>>(call, limits, body);
  return with_rows<FloatTile<32>, FloatTile<16>>(call, limits, body);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_mlp_value_and_grad(const tgdp::MlpValueAndGradCall* call, void* stream) {
  if (call->batch == 0) return nullptr;
  return tgdp::cuda::with_tile(*call, [&](auto* tile, const tgdp::cuda::Plan& plan) -> const char* {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (plan.scratch_bytes > 0 && call->scratch == nullptr) return "mlp_value_and_grad: no scratch memory";
    return tgdp::cuda::run<Tile>(*call, plan, stream);
  });
}

const char* tgdp_cuda_mlp_scratch(const tgdp::MlpValueAndGradCall* call, int64_t* bytes) {
  *bytes = 0;
  if (call->batch == 0) return nullptr;
  return tgdp::cuda::with_tile(*call, [&](auto*, const tgdp::cuda::Plan& plan) -> const char* {
    *bytes = static_cast<int64_t>(plan.scratch_bytes);
    return nullptr;
  });
}
