// Which kernel of mlp_value_and_grad.cuh serves a call, and how it is launched.
#include "mlp_value_and_grad.cuh"

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "row_plan.h"

namespace tgdp::cuda {
namespace {

template <typename Tile>
const char* run(const MlpValueAndGradCall& call, const RowPlan& plan, void* stream) {
  MlpArguments arguments{};
  arguments.batch = call.batch;
  arguments.network = network_of(call.network, call.inputs);
  arguments.pitch = plan.pitch;
  arguments.x = {call.x, call.x_stride};
  arguments.first_bias = {call.first_bias, call.first_bias_stride};
  if (call.keep != nullptr) std::copy_n(call.keep, call.network.layers, arguments.keep);
  arguments.value = call.value;
  arguments.gradient = call.gradient;
  arguments.scratch = plan.scratch_bytes > 0 ? static_cast<uint32_t*>(call.scratch) : nullptr;
  return launch(&mlp_value_and_grad_kernel<Tile>, static_cast<uint32_t>(plan.blocks), kMatmulThreads,
                static_cast<size_t>(plan.shared_bytes), stream, arguments);
}

// Calls body(tile, plan) with the tile to use.
template <typename Body>
const char* with_tile(const MlpValueAndGradCall& call, const Body& body) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const NetworkCall& network = call.network;
  if (network.layers < 1 || network.layers > kMostLayers) return "mlp_value_and_grad: 1 to 8 hidden layers";
  RowDemand demand;
  demand.batch = call.batch;
  demand.slope_layers = static_cast<int>(network.layers);
  for (int64_t layer = 0; layer < network.layers; ++layer) {
    const int64_t width = network.widths[layer];
    if (width < 1 || width > kMost) return "mlp_value_and_grad: widths are from 1 to 2^30";
    demand.widest = std::max(demand.widest, static_cast<int>(width));
  }
  if (call.inputs > kMost) return "mlp_value_and_grad: at most 2^30 inputs";
  const auto with_own = [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    RowDemand result = demand;
    result.resident = kMlpResident<Tile>;
    result.own_bytes = kMlpOwnBytes<Tile>;
    result.least_next = kPartsOfXBytes<Tile>;
    return result;
  };
  return with_cheapest(call.dtype, "mlp_value_and_grad: the layers are too wide for the shared memory of this device",
                       with_own, body);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_mlp_value_and_grad(const tgdp::MlpValueAndGradCall* call, void* stream) {
  if (call->batch == 0) return nullptr;
  return tgdp::cuda::with_tile(*call, [&](auto* tile, const tgdp::cuda::RowPlan& plan) -> const char* {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    if (plan.scratch_bytes > 0 && call->scratch == nullptr) return "mlp_value_and_grad: no scratch memory";
    return tgdp::cuda::run<Tile>(*call, plan, stream);
  });
}

const char* tgdp_cuda_mlp_plan(const tgdp::MlpValueAndGradCall* call, tgdp::LaunchPlan* plan) {
  return tgdp::cuda::with_tile(*call, [&](auto*, const tgdp::cuda::RowPlan& chosen) -> const char* {
    *plan = chosen;
    return nullptr;
  });
}
