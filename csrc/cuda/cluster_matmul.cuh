// Matmuls of the layers of a network by a cluster of blocks: all have the same rows; each computes its own columns of a
// layer and writes them into the others' shared memory. In place of BlockMatmuls in mlp_layers.cuh; the sums are in the
// same order, so that results are the same bit for bit.
//
// Weights do not depend on what the layers compute: their tiles arrive in one stream that goes on across the ends of
// matmuls, and while blocks wait for each other.
#pragma once

#include "cluster.cuh"
#include "mlp_layers.cuh"

namespace tgdp::cuda {

// Stages of weights: with 16 KB each, what arrives from the L2 cache while blocks exchange a layer.
constexpr int kClusterStages = 4;

// The weights of a matmul: columns `own` of `columns`.
struct WeightPass {
  Matrix weight;
  Columns own;
  int columns, depth;
  bool transposed;
};

// Of the `padded` columns of a layer, those that a block computes; the last blocks may have none.
TGDP_DEVICE Columns columns_in_cluster(int padded, int rank) {
  const int count = columns_of_block(padded, kClusterBlocks), first = rank * count;
  return {first < padded ? first : padded, first + count < padded ? first + count : padded};
}

// Passes: the matmuls in the order in which they will be called; pass() is the current one, `done` whether there is
// none, next() moves on.
template <typename Tile, typename Passes>
class ClusterMatmuls {
 public:
  using Storage = typename Tile::Storage;

  TGDP_DEVICE ClusterMatmuls(const LayersLayout& layout, const Passes& passes)
      : stages_(shared_array<Storage>(layout.stages, static_cast<size_t>(kClusterStages) * kStageElements<Tile>)),
        passes_(passes) {
    for (int stage = 0; stage < kClusterStages - 1; ++stage) load(stage);
  }

  TGDP_DEVICE Columns columns(int padded) const { return columns_in_cluster(padded, cluster_rank()); }

  template <bool kTransposed, typename LoadLeft, typename Left, typename Finish>
  TGDP_DEVICE void matmul(const Matrix&, Columns own, int columns, int depth, const LoadLeft&, const Left& left,
                           const Finish& finish) {
    const int parts = parts_of(depth), steps = panels_of(own) * parts, end = own.end < columns ? own.end : columns;
    Tile tile;
    int column = own.first, panel = 0, part = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kClusterStages - 2>();
      // All threads' copies for this step have arrived, and none reads the stage of the last step any more.
      __syncthreads();
      load(stage_ == 0 ? kClusterStages - 1 : stage_ - 1);
      const auto operand = left(part * Tile::kDepth, stage_);
      // Not for columns that do not exist.
      if (column + Tile::first_column() < end) {
        tile.template multiply<kTransposed>(operand.data, operand.pitch, stages_ + stage_ * kStageElements<Tile>);
      }
      if (++stage_ == kClusterStages) stage_ = 0;
      if (++part == parts) {
        finish(column, panel, tile);
        tile.clear();
        part = 0;
        ++panel;
        column += Tile::kPanel;
      }
    }
    __syncthreads();
  }

  // A warp writes to one block, four rows at a time in pieces of 16 bytes, so that whole lines of 128 bytes go from
  // block to block.
  TGDP_DEVICE void exchange(Shared<Storage> layer, int pitch, Columns own) const {
    static_assert(kMatmulThreads == 32 * kClusterBlocks && Tile::kRows % 4 == 0);
    constexpr int kPiece = 16 / sizeof(Storage);
    const int lane = static_cast<int>(threadIdx.x) % 32, rank = static_cast<int>(threadIdx.x) / 32;
    if (rank != cluster_rank()) {
      for (int column = own.first + lane % 8 * kPiece; column < own.end; column += 8 * kPiece) {
        for (int row = lane / 8; row < Tile::kRows; row += 4) {
          const auto piece = shared_as<uint4>(layer + (row * pitch + column));
          store_to_block(rank, piece, *piece);
        }
      }
    }
    cluster_barrier();
  }

 private:
  // Without any depth, one part of zeros; without columns, one empty panel.
  static TGDP_DEVICE int parts_of(int depth) { return depth > 0 ? (depth + Tile::kDepth - 1) / Tile::kDepth : 1; }
  static TGDP_DEVICE int panels_of(Columns own) {
    return own.first < own.end ? (own.end - own.first + Tile::kPanel - 1) / Tile::kPanel : 1;
  }

  // The next tile of the stream.
  TGDP_DEVICE void load(int stage) {
    if (!passes_.done) {
      const WeightPass& pass = passes_.pass();
      const Shared<Storage> to = stages_ + stage * kStageElements<Tile>;
      const int column = pass.own.first + panel_ * Tile::kPanel, k = part_ * Tile::kDepth;
      const int end = pass.own.end < pass.columns ? pass.own.end : pass.columns;
      load_weights<Tile>(to, pass.weight, pass.transposed, k, column, pass.depth, end);
      if (++part_ == parts_of(pass.depth)) {
        part_ = 0;
        if (++panel_ == panels_of(pass.own)) {
          panel_ = 0;
          passes_.next();
        }
      }
    }
    // Empty groups too, so that a step always waits for the same number.
    commit_copies();
  }

  Shared<Storage> stages_;
  Passes passes_;
  int stage_ = 0;              // of the step to come
  int panel_ = 0, part_ = 0;  // of the tile to load
};

}  // namespace tgdp::cuda
