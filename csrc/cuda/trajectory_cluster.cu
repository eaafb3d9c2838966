// When clusters serve a trajectory, and by which tile.
#include "trajectory_cluster.cuh"

#include <type_traits>

#include "trajectory_choice.h"

namespace tgdp::cuda {
namespace {

// Tiles of clusters: 64 columns are the share of one of eight blocks in a layer of width 512.
template <typename Element, int kRows>
using ClusterTile = TensorCoreTile<Element, kRows, 64, 16384>;
using FloatClusterTile = FloatTile<16, 64, 64>;

template <typename Tile>
RowPlan plan_clusters(const TrajectoryKernelCall& call, const RowDemand& demand, const Limits& limits) {
  RowPlan plan;
  plan.pitch = pitch_for<Tile>(demand.widest);
  plan.rows = Tile::kRows;
  plan.panel = Tile::kPanel;
  plan.depth = Tile::kDepth;
  plan.cluster = kClusterBlocks;
  const LayersLayout layout = trajectory_cluster_layout<Tile>(call.size, call.slots, demand.slope_layers, plan.pitch);
  plan.shared_bytes = static_cast<int64_t>(layout.bytes);
  if (plan.shared_bytes > limits.shared_per_block) return plan;
  const int64_t needed = call.batch > 0 ? (call.batch + Tile::kRows - 1) / Tile::kRows : 1;
  plan.blocks = needed * kClusterBlocks;
  // In the unit of plan_rows, in which a layer of width w takes cost w / 1024 cycles, four times that in float32: about
  // 1000 cycles until all blocks have met and the data has arrived, an eighth of the matmuls, and the exchange of kRows
  // w elements.
  constexpr int64_t kMeeting = 1000 * 1024 / (sizeof(typename Tile::Storage) == 4 ? 4 : 1);
  const int64_t at_once = limits.sms < kClusterBlocks ? 1 : limits.sms / kClusterBlocks;
  const int64_t waves = (needed + at_once - 1) / at_once;
  const int64_t matmuls = (Tile::kRows * 3 / 8 + 8) * rounded_up(demand.widest, 128);
  plan.cost = waves * (matmuls + kMeeting / rounded_up(demand.widest, 32));
  return plan;
}

}  // namespace

void consider_clusters(const TrajectoryKernelCall& call, const RowDemand& demand, const Limits& limits,
                       Choice& choice) {
  const auto plan = [&](auto* tile) {
    return plan_clusters<std::remove_pointer_t<decltype(tile)>>(call, demand, limits);
  };
  const auto consider = [&](auto* tile, const RowPlan& clusters) {
    if (choice.kernel != nullptr && choice.plan.cost <= clusters.cost) return;
    const auto kernel = &trajectory_cluster_kernel<std::remove_pointer_t<decltype(tile)>>;
    if (clusters_at_once(kernel, kClusterBlocks, kMatmulThreads, static_cast<size_t>(clusters.shared_bytes)) > 0) {
      choice = {clusters, kernel};
    }
  };
  if (call.dtype == Dtype::bf16) {
    with_cheapest_of<ClusterTile<Bf16, 16>, ClusterTile<Bf16, 32>, ClusterTile<Bf16, 64>>(plan, consider);
  } else if (call.dtype == Dtype::f16) {
    with_cheapest_of<ClusterTile<F16, 16>, ClusterTile<F16, 32>, ClusterTile<F16, 64>>(plan, consider);
  } else {
    with_cheapest_of<FloatClusterTile>(plan, consider);
  }
}

}  // namespace tgdp::cuda
