// The trajectories of few samples by clusters of blocks: what trajectory.cuh computes, bit for bit, for sm_90 and newer.
//
// A block of kRows samples belongs to a cluster: each of its blocks makes 1 / kClusterBlocks of the columns of every layer,
// and all the rest, heads, solver and noise, by itself. 256 samples thus occupy 128 multiprocessors in place of 8. Per
// cluster and evaluation the weights come from the level-2 cache once (score) and twice (guidance); the blocks exchange
// kRows (sum of widths, that of the guidance network's twice) elements through distributed shared memory.
#pragma once

#include "cluster_matmul.cuh"
#include "trajectory.cuh"

namespace tgdp::cuda {

// The products of all evaluations in the order of TrajectoryBlock.
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
  // Of the evaluation to come.
  TGDP_DEVICE void count() {
    done = ++evaluation_ == call_.evaluations;
    if (done) return;
    passes_ = call_.score.network.layers + 1 + (is_guided(call_, evaluation_) ? 2 * call_.guidance.network.layers : 0);
  }

  // Score network with head; guidance network, up without head and down.
  TGDP_DEVICE void describe() {
    if (done) return;
    const int layers = call_.guidance.network.layers, up = number_ - call_.score.network.layers - 1;
    const Network& network = up < 0 ? call_.score.network : call_.guidance.network;
    pass_.transposed = up >= layers;
    const int layer = up < 0 ? number_ : pass_.transposed ? 2 * layers - 1 - up : up;
    // Layer 0 takes the inputs, and the head makes as many.
    const auto width = [&](int of) { return of < 0 || of == network.layers ? network.inputs : network.widths[of]; };
    const int to = pass_.transposed ? layer - 1 : layer;
    pass_.weight = network.weights[layer];
    pass_.columns = width(to);
    pass_.depth = width(pass_.transposed ? layer : layer - 1);
    // Each block makes all inputs and outputs.
    const bool shared = to >= 0 && to < network.layers;
    pass_.own = shared ? columns_in_cluster(rounded_up(pass_.columns, Tile::kDepth), rank_) : Columns{0, pass_.columns};
  }

  const TrajectoryArguments& call_;
  WeightPass pass_{};
  int rank_, evaluation_ = -1, number_ = 0, passes_ = 0;
};

template <typename Tile>
TGDP_FUNCTION LayersLayout trajectory_cluster_layout(int size, int slots, int guidance_layers, int pitch) {
  return layers_layout<Tile>(trajectory_own_bytes<Tile>(size, slots), 0, guidance_layers, pitch, true, kClusterBlocks,
                             kClusterStages);
}

template <typename Tile>
__global__ void __launch_bounds__(kProductThreads, 1)
    trajectory_cluster_kernel(const __grid_constant__ TrajectoryArguments call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Products = ClusterProducts<Tile, TrajectoryPasses<Tile>>;
  const LayersLayout layout =
      trajectory_cluster_layout<Tile>(static_cast<int>(call.size), static_cast<int>(call.slots), call.guidance.network.layers, call.pitch);
  TrajectoryBlock<Tile, Products> block(call, layout, Products(layout, TrajectoryPasses<Tile>(call)));
  // Nobody writes into the memory of a block that has not started.
  cluster_barrier();
  block.run(static_cast<int64_t>(blockIdx.x / kClusterBlocks) * Tile::kRows, cluster_rank() == 0);
#endif
}

}  // namespace tgdp::cuda
