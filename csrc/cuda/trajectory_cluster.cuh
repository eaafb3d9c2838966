// The trajectories of few samples by clusters of blocks: what trajectory.cuh computes, bit for bit, for sm_90 and
// newer.
//
// kRows samples belong to a cluster: each of its blocks computes 1 / kClusterBlocks of the columns of every layer, and
// everything else, heads, solver and noise, by itself. 256 samples thus occupy 128 SMs in place of 8. Per cluster and
// evaluation the weights come from the L2 cache once (score) and twice (guidance); the blocks exchange
// kRows (sum of widths, that of the guidance network's twice) elements through distributed shared memory.
#pragma once

#include "cluster_matmul.cuh"
#include "trajectory.cuh"

namespace tgdp::cuda {

// The matmuls of all evaluations in the order of TrajectoryBlock.
template <typename Tile>
class TrajectoryPasses {
 public:
  TGDP_DEVICE explicit TrajectoryPasses(const TrajectoryArguments& call) : call_(call), rank_(cluster_rank()) {
    count();
    describe();
  }

  TGDP_DEVICE const WeightPass& pass() const { return pass_; }

  TGDP_DEVICE void next() {
    if (++number_ == passes_) {
      number_ = 0;
      count();
    }
    describe();
  }

  bool done = false;

 private:
  // The matmuls of the next evaluation.
  TGDP_DEVICE void count() {
    done = ++evaluation_ == call_.evaluations;
    if (done) return;
    passes_ = call_.score.network.layers + 1 + (is_guided(call_, evaluation_) ? 2 * call_.guidance.network.layers : 0);
  }

  // Score network with head; guidance network, forward without head and backward.
  TGDP_DEVICE void describe() {
    if (done) return;
    const int layers = call_.guidance.network.layers, guided = number_ - call_.score.network.layers - 1;
    const Network& network = guided < 0 ? call_.score.network : call_.guidance.network;
    pass_.transposed = guided >= layers;
    const int layer = guided < 0 ? number_ : pass_.transposed ? 2 * layers - 1 - guided : guided;
    // Layer 0 reads the inputs, and the head has as many outputs.
    const auto width = [&](int of) { return of < 0 || of == network.layers ? network.inputs : network.widths[of]; };
    const int to = pass_.transposed ? layer - 1 : layer;
    pass_.weight = network.weights[layer];
    pass_.columns = width(to);
    pass_.depth = width(pass_.transposed ? layer : layer - 1);
    // Each block computes all inputs and outputs.
    const bool shared = to >= 0 && to < network.layers;
    pass_.own = shared ? columns_in_cluster(rounded_up(pass_.columns, Tile::kDepth), rank_) : Columns{0, pass_.columns};
  }

  const TrajectoryArguments& call_;
  WeightPass pass_{};
  int rank_, evaluation_ = -1, number_ = 0, passes_ = 0;
};

template <typename Tile>
TGDP_FUNCTION LayersLayout trajectory_cluster_layout(int64_t size, int64_t slots, int guidance_layers, int pitch) {
  return layers_layout<Tile>(trajectory_own_bytes<Tile>(size, slots), 0, guidance_layers, pitch, true, kClusterBlocks,
                             kClusterStages);
}

template <typename Tile>
__global__ void __launch_bounds__(kMatmulThreads, 1)
    trajectory_cluster_kernel(const __grid_constant__ TrajectoryArguments call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Matmuls = ClusterMatmuls<Tile, TrajectoryPasses<Tile>>;
  const LayersLayout layout =
      trajectory_cluster_layout<Tile>(call.size, call.slots, call.guidance.network.layers, call.pitch);
  TrajectoryBlock<Tile, Matmuls> block(call, layout, Matmuls(layout, TrajectoryPasses<Tile>(call)));
  // No block writes into the memory of one that has not started.
  cluster_barrier();
  block.run(static_cast<int64_t>(blockIdx.x / kClusterBlocks) * Tile::kRows, cluster_rank() == 0);
#endif
}

}  // namespace tgdp::cuda
