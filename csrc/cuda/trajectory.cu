// Which kernel of trajectory.cuh or trajectory_cluster.cuh serves a call, and how it is launched.
#include <algorithm>
#include <type_traits>

#include "trajectory_choice.h"

namespace tgdp::cuda {
namespace {

TrajectoryLayers layers_of(const TrajectoryNetworkCall& call, int64_t inputs) {
  return {network_of(call.network, inputs),
          {call.evaluation_bias, call.evaluation_bias_stride},
          {call.sample_bias, call.sample_bias_stride}};
}

// The cheapest plan that the current device takes; null, or why there is none.
const char* choose(const TrajectoryKernelCall& call, Choice& choice) {
  constexpr int64_t kMost = 1 << 20;
  const int64_t size = call.size, slots = call.slots;
  if (size < 1 || size > kMost) return "trajectory: samples have 1 to 2^20 elements";
  if (slots > kMostTrajectorySlots) return "trajectory: at most 4 history slots";
  RowDemand demand;
  demand.batch = call.batch;
  demand.widest = static_cast<int>(size);
  demand.slope_layers = static_cast<int>(call.guidance.network.layers);
  for (const NetworkCall* network : {&call.score.network, &call.guidance.network}) {
    const bool none = network == &call.guidance.network && network->layers == 0;
    if (!none && (network->layers < 1 || network->layers > kMostLayers)) return "trajectory: 1 to 8 hidden layers";
    for (int64_t layer = 0; layer < network->layers; ++layer) {
      const int64_t width = network->widths[layer];
      if (width < 1 || width > kMost) return "trajectory: widths are from 1 to 2^20";
      demand.widest = std::max(demand.widest, static_cast<int>(width));
    }
  }
  const auto with_own = [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    RowDemand result = demand;
    result.resident = kTrajectoryResident<Tile>;
    result.own_bytes = trajectory_own_bytes<Tile>(size, slots);
    return result;
  };
  const auto take = [&](auto* tile, const RowPlan& plan) -> const char* {
    choice = {plan, &trajectory_kernel<std::remove_pointer_t<decltype(tile)>>};
    return nullptr;
  };
  const char* error = with_cheapest(
      call.dtype, "trajectory: samples and layers are too wide for the shared memory of this device", with_own, take);
  Limits limits{};
  if (const char* no_device = device_limits(limits)) return no_device;
  consider_clusters(call, demand, limits, choice);
  return choice.kernel == nullptr ? error : nullptr;
}

const char* run(const TrajectoryKernelCall& call, const Choice& choice, void* stream) {
  const RowPlan& plan = choice.plan;
  TrajectoryArguments arguments{};
  static_cast<Trajectory&>(arguments) = call;
  arguments.pitch = plan.pitch;
  arguments.score = layers_of(call.score, call.size);
  arguments.guidance = layers_of(call.guidance, call.size);
  arguments.first_failure = call.first_failure;
  arguments.scratch = plan.scratch_bytes > 0 ? static_cast<uint32_t*>(call.scratch) : nullptr;
  return launch_clusters(choice.kernel, static_cast<uint32_t>(plan.cluster), static_cast<uint32_t>(plan.blocks),
                         kMatmulThreads, static_cast<size_t>(plan.shared_bytes), stream, arguments);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_trajectory(const tgdp::TrajectoryKernelCall* call, void* stream) {
  if (call->batch == 0) return nullptr;
  tgdp::cuda::Choice choice;
  if (const char* error = tgdp::cuda::choose(*call, choice)) return error;
  if (choice.plan.scratch_bytes > 0 && call->scratch == nullptr) return "trajectory: no scratch memory";
  return tgdp::cuda::run(*call, choice, stream);
}

const char* tgdp_cuda_trajectory_plan(const tgdp::TrajectoryKernelCall* call, tgdp::LaunchPlan* plan) {
  tgdp::cuda::Choice choice;
  if (const char* error = tgdp::cuda::choose(*call, choice)) return error;
  *plan = choice.plan;
  return nullptr;
}
