// How kernels of mlp_layers.cuh divide a batch into blocks of rows, and which tile they use.
#pragma once

#include <type_traits>

#include "launch.h"
#include "mlp_layers.cuh"

namespace tgdp::cuda {

inline Network network_of(const NetworkCall& call, int64_t inputs) {
  Network network{};
  network.inputs = static_cast<int>(inputs);
  network.layers = static_cast<int>(call.layers);
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    network.widths[layer] = static_cast<int>(call.widths[layer]);
    network.biases[layer] = call.biases[layer];
    network.weights[layer] = {call.weights[layer], call.weight_strides[layer]};
  }
  if (call.layers > 0) network.weights[call.layers] = {call.weights[call.layers], call.weight_strides[call.layers]};
  return network;
}

// blocks 0: it does not fit.
struct RowPlan : LaunchPlan {
  int pitch = 0;
  int64_t cost = 0;  // time, in a unit of its own
};

// The properties of a kernel that decide its plan.
struct RowDemand {
  int64_t batch = 0;
  int widest = 0;       // of the rows that its activations hold
  int slope_layers = 0;  // layers of the network that is differentiated
  size_t own_bytes = 0, least_next = 0;
  int resident = 1;  // blocks that an SM has registers for
};

template <typename Tile>
RowPlan plan_rows(const RowDemand& demand, const Limits& limits) {
  // Shared memory of an SM that the system takes for every block.
  constexpr int64_t kReserved = 1024;
  RowPlan plan;
  plan.pitch = pitch_for<Tile>(demand.widest);
  plan.rows = Tile::kRows;
  plan.panel = Tile::kPanel;
  plan.depth = Tile::kDepth;
  const auto layout = [&](bool with_slopes) {
    return layers_layout<Tile>(demand.own_bytes, demand.least_next, demand.slope_layers, plan.pitch, with_slopes);
  };
  plan.shared_bytes = static_cast<int64_t>(layout(true).bytes);
  int64_t resident = limits.shared_per_sm / (plan.shared_bytes + kReserved);
  const bool slopes_in_shared = resident >= demand.resident;
  if (!slopes_in_shared) {
    plan.shared_bytes = static_cast<int64_t>(layout(false).bytes);
    resident = limits.shared_per_sm / (plan.shared_bytes + kReserved);
  }
  if (plan.shared_bytes > limits.shared_per_block) return plan;
  const int64_t at_once = int64_t{limits.sms} * (resident < demand.resident ? 1 : demand.resident);
  const int64_t needed = demand.batch > 0 ? (demand.batch + Tile::kRows - 1) / Tile::kRows : 1;
  plan.blocks = needed < at_once ? needed : at_once;
  if (!slopes_in_shared) {
    plan.scratch_bytes = plan.blocks * static_cast<int64_t>(layout(false).slope_words * sizeof(uint32_t));
  }
  // A block takes as long as its matmuls and as the arrival of the weights, about that of kRowsOfWeights more rows.
  // Blocks share the time of an SM.
  constexpr int64_t kRowsOfWeights = 48;
  const int64_t waves = (needed + at_once - 1) / at_once;
  const int64_t sharing = (plan.blocks + limits.sms - 1) / limits.sms;
  plan.cost = waves * sharing * (Tile::kRows + kRowsOfWeights) * rounded_up(demand.widest, Tile::kPanel);
  return plan;
}

// Calls body(tile, plan) with the cheapest of the plans that plan(tile) makes; false where none fits.
template <typename... Tiles, typename Plan, typename Body>
bool with_cheapest_of(const Plan& plan, const Body& body) {
  const RowPlan plans[] = {plan(static_cast<Tiles*>(nullptr))...};
  int best = -1, index = 0;
  for (int i = 0; i < static_cast<int>(sizeof...(Tiles)); ++i) {
    if (plans[i].blocks > 0 && (best < 0 || plans[i].cost < plans[best].cost)) best = i;
  }
  const auto consider = [&](auto* tile) {
    if (index == best) body(tile, plans[index]);
    ++index;
  };
  (consider(static_cast<Tiles*>(nullptr)), ...);
  return best >= 0;
}

// Calls body(tile, plan) with the cheapest tile of the dtype that fits on the current device; demand(tile) is a
// RowDemand. What body answers, or `too_wide` where none fits.
template <typename Demand, typename Body>
const char* with_cheapest(Dtype dtype, const char* too_wide, const Demand& demand, const Body& body) {
  Limits limits{};
  if (const char* error = device_limits(limits)) return error;
  const auto plan = [&](auto* tile) {
    return plan_rows<std::remove_pointer_t<decltype(tile)>>(demand(tile), limits);
  };
  const char* error = nullptr;
  const auto keep_error = [&](auto* tile, const RowPlan& plan) { error = body(tile, plan); };
  const auto for_tensor_cores = [&](auto element) {
    using E = decltype(element);
    return with_cheapest_of<TensorCoreTile<E, 32>, TensorCoreTile<E, 64>, TensorCoreTile<E, 96, 256>>(plan, keep_error);
  };
  const bool fits = dtype == Dtype::bf16  ? for_tensor_cores(Bf16{})
                    : dtype == Dtype::f16 ? for_tensor_cores(F16{})
                                          : with_cheapest_of<FloatTile<16>, FloatTile<32>>(plan, keep_error);
  return fits ? error : too_wide;
}

}  // namespace tgdp::cuda
