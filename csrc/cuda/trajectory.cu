// Which kernel of trajectory.cuh serves a call, and how it is launched.
#include "trajectory.cuh"

#include <type_traits>

#include "launch.h"
#include "row_plan.h"

namespace tgdp::cuda {
namespace {

TrajectoryLayers layers_of(const TrajectoryNetworkCall& call, int64_t inputs) {
  TrajectoryLayers layers{};
  layers.network.inputs = static_cast<int>(inputs);
  layers.network.layers = static_cast<int>(call.layers);
  if (call.layers == 0) return layers;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    layers.network.widths[layer] = static_cast<int>(call.widths[layer]);
    layers.network.biases[layer] = call.biases[layer];
  }
  for (int64_t layer = 0; layer <= call.layers; ++layer) {
    layers.network.weights[layer] = {call.weights[layer], call.weight_strides[layer]};
  }
  layers.evaluation_bias = {call.evaluation_bias, call.evaluation_bias_stride};
  layers.sample_bias = {call.sample_bias, call.sample_bias_stride};
  return layers;
}

template <typename Tile>
const char* run(const TrajectoryKernelCall& call, const RowPlan& plan, void* stream) {
  TrajectoryArguments arguments{};
  arguments.batch = call.batch;
  arguments.size = static_cast<int>(call.size);
  arguments.slots = static_cast<int>(call.slots);
  arguments.evaluations = static_cast<int>(call.evaluations);
  arguments.pitch = plan.pitch;
  arguments.score = layers_of(call.score, call.size);
  arguments.guidance = layers_of(call.guidance, call.size);
  arguments.x = call.x;
  arguments.sample_index = call.sample_index;
  arguments.table = call.table;
  arguments.clamp = call.clamp;
  arguments.lowest = call.lowest;
  arguments.highest = call.highest;
  arguments.gradient_norm_limit = call.gradient_norm_limit;
  arguments.key_low = call.key_low;
  arguments.key_high = call.key_high;
  arguments.out = call.out;
  arguments.first_failure = call.first_failure;
  arguments.scratch = plan.scratch_bytes > 0 ? static_cast<uint32_t*>(call.scratch) : nullptr;
  return launch(&trajectory_kernel<Tile>, static_cast<uint32_t>(plan.blocks), kProductThreads, static_cast<size_t>(plan.shared_bytes), stream,
                arguments);
}

// Calls body(tile, plan) with the tile to use.
template <typename Body>
const char* with_tile(const TrajectoryKernelCall& call, const Body& body) {
  constexpr int64_t kMost = 1 << 20;
  if (call.size < 1 || call.size > kMost) return "trajectory: samples have 1 to 2^20 elements";
  if (call.slots > kMostTrajectorySlots) return "trajectory: at most 4 history slots";
  RowDemand demand;
  demand.batch = call.batch;
  demand.widest = static_cast<int>(call.size);
  demand.slope_layers = static_cast<int>(call.guidance.layers);
  for (const TrajectoryNetworkCall* network : {&call.score, &call.guidance}) {
    const bool none = network == &call.guidance && network->layers == 0;
    if (!none && (network->layers < 1 || network->layers > kMostLayers)) return "trajectory: 1 to 8 hidden layers";
    for (int64_t layer = 0; layer < network->layers; ++layer) {
      if (network->widths[layer] < 1 || network->widths[layer] > kMost) return "trajectory: widths are from 1 to 2^20";
      if (network->widths[layer] > demand.widest) demand.widest = static_cast<int>(network->widths[layer]);
    }
  }
  const auto with_own = [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    RowDemand result = demand;
    result.resident = kTrajectoryResident<Tile>;
    result.own_bytes = trajectory_own_bytes<Tile>(static_cast<int>(call.size), static_cast<int>(call.slots));
    return result;
  };
  return with_cheapest(call.dtype, "trajectory: samples and layers are too wide for the shared memory of this device", with_own,
                       body);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_trajectory(const tgdp::TrajectoryKernelCall* call, void* stream) {
  if (call->batch == 0) return nullptr;
  return tgdp::cuda::with_tile(*call, [&](auto* tile, const tgdp::cuda::RowPlan& plan) -> const char* {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (plan.scratch_bytes > 0 && call->scratch == nullptr) return "trajectory: no scratch memory";
    return tgdp::cuda::run<Tile>(*call, plan, stream);
  });
}

const char* tgdp_cuda_trajectory_plan(const tgdp::TrajectoryKernelCall* call, tgdp::LaunchPlan* plan) {
  return tgdp::cuda::with_tile(*call, [&](auto*, const tgdp::cuda::RowPlan& chosen) -> const char* {
    *plan = chosen;
    return nullptr;
  });
}
