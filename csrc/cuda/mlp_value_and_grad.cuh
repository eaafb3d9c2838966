// Value and input gradient of a SiLU MLP with one output, all layers forward and backward for a block of rows:
// reference twin tgdp_fast.ops.mlp_value_and_grad.mlp_value_and_grad_reference.
//
// With P weights of b bytes, D inputs, widths H_l and N rows: 4 N P FLOPs in matmuls, about 30 N sum(H_l) for
// activations; from and to memory b N (2 D + 1) bytes, the weights once, and what is kept. The weights come from the L2
// cache twice per block of kRows rows, so there are 2 kRows / b FLOPs per byte of that traffic.
//
// At width 512 a block has 158 KB of shared memory for 64 rows of 16-bit or 32 rows of float32 elements (sm_80, sm_90,
// sm_100), and 92 KB for half as many rows (sm_86). Slopes are in shared memory while two blocks fit on an SM (up to
// four layers of width 128 on sm_90).
#pragma once

#include "mlp_layers.cuh"

namespace tgdp::cuda {

// Elements, pitch and strides in elements of the dtype of the tile.
struct MlpArguments {
  int64_t batch;
  Network network;
  int pitch;  // of activations in shared memory
  Matrix x, first_bias;
  void *value, *gradient;  // [batch], [batch, inputs]
  void* keep[kMostLayers];  // [batch, H_l] of z_l, or null
  uint32_t* scratch;        // slopes of a block after those of another; null: they are in shared memory
};

template <typename Element>
TGDP_DEVICE void store_one(typename Element::Storage* to, float value) {
  if constexpr (Element::kDtype == Dtype::f32) {
    *to = value;
  } else {
    *to = Element::from_float(value);
  }
}

// Columns [column, column + kAdjacent) of a row in global memory, those below `columns`.
template <typename Tile>
TGDP_DEVICE void store_row(typename Tile::Storage* row, int column, int columns,
                           const float (&values)[Tile::kAdjacent]) {
  if constexpr (Tile::kAdjacent == 2) {
    if (column + 1 < columns && reinterpret_cast<uintptr_t>(row + column) % 4 == 0) {
      *reinterpret_cast<uint32_t*>(row + column) = Tile::pack(values);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kAdjacent; ++i) {
    if (column + i < columns) store_one<typename Tile::Element>(row + column + i, values[i]);
  }
}

// Blocks that an SM has registers for.
template <typename Tile>
constexpr int kMlpResident = sizeof(typename Tile::Storage) == 2 && Tile::kRows > 64 ? 1 : 2;

// What a block keeps in shared memory: parts of f of its rows. Parts of x use the memory of the second layer.
template <typename Tile>
constexpr size_t kMlpOwnBytes = Tile::kColumnWarps * Tile::kRows * sizeof(float);
template <typename Tile>
constexpr int kPartOfX = Tile::kRows * (Tile::kDepth + Tile::kPadding);
template <typename Tile>
constexpr size_t kPartsOfXBytes = size_t{kStages} * kPartOfX<Tile> * sizeof(typename Tile::Storage);

template <typename Tile>
class MlpBlock {
 public:
  using Element = typename Tile::Element;
  using Storage = typename Tile::Storage;
  static constexpr int kAdjacent = Tile::kAdjacent;

  TGDP_DEVICE MlpBlock(const MlpArguments& call, const LayersLayout& layout)
      : call_(call), layers_(layout, call.pitch, call.scratch, BlockMatmuls<Tile>(layout)) {
    sums_ = shared_array<float>(0, Tile::kColumnWarps * Tile::kRows);
    parts_of_x_ = shared_array<Storage>(layout.next, static_cast<size_t>(kStages) * kPartOfX<Tile>);
  }

  TGDP_DEVICE void run(int64_t first_row) {
    first_row_ = first_row;
    float sums[Tile::kHeldRows];
#pragma unroll
    for (int held = 0; held < Tile::kHeldRows; ++held) sums[held] = 0.0f;
    const Network& network = call_.network;
    for (int layer = 0; layer < network.layers; ++layer) forward(layer, sums);
    write_values(sums);
    for (int layer = network.layers - 1; layer > 0; --layer) layers_.backward(network, layer);
    layers_.gradient(network, [&](int row, int column, const float(&values)[kAdjacent]) {
      if (first_row_ + row >= call_.batch) return;
      auto* to = static_cast<Storage*>(call_.gradient) + (first_row_ + row) * network.inputs;
      store_row<Tile>(to, column, network.inputs, values);
    });
  }

 private:
  // The last layer leaves its delta.
  TGDP_DEVICE void forward(int layer, float (&sums)[Tile::kHeldRows]) {
    const Network& network = call_.network;
    const int width = network.widths[layer];
    const bool last = layer + 1 == network.layers;
    const auto activate = [&](int row, int column, int held, int64_t place, const float(&z)[kAdjacent],
                              float(&out)[kAdjacent]) {
      float slopes[kAdjacent];
#pragma unroll
      for (int i = 0; i < kAdjacent; ++i) {
        const float s = sigmoid_for<Element>(z[i]);
        slopes[i] = silu_slope(z[i], s);
        out[i] = z[i] * s;
        if (last) {
          const float weight = entry<Element>(network.weights[network.layers].data, column + i, width);
          sums[held] += out[i] * weight;
          out[i] = slopes[i] * weight;
        }
      }
      if (call_.keep[layer] != nullptr && first_row_ + row < call_.batch) {
        store_row<Tile>(static_cast<Storage*>(call_.keep[layer]) + (first_row_ + row) * width, column, width, z);
      }
      if (!last) layers_.keep_slopes(place, slopes);
    };
    if (layer > 0) {
      layers_.next(network, layer, activate);
      return;
    }
    layers_.first(
        network,
        [&](int k, int stage) {
          load_tile<Tile, PaddedTile<Tile::kDepth, Tile::kPadding>, Tile::kRows, Tile::kDepth>(
              parts_of_x_ + stage * kPartOfX<Tile>, call_.x, first_row_, k, call_.batch, network.inputs);
        },
        [&](int, int stage) {
          return LeftOperand<Storage>{parts_of_x_ + stage * kPartOfX<Tile>, Tile::kDepth + Tile::kPadding};
        },
        [&](int row, int column) {
          if (first_row_ + row >= call_.batch) return 0.0f;
          const auto* bias = static_cast<const Storage*>(call_.first_bias.data);
          return entry<Element>(bias + (first_row_ + row) * call_.first_bias.stride, column, width);
        },
        activate);
  }

  // f of all rows from what the threads hold of it.
  TGDP_DEVICE void write_values(float (&sums)[Tile::kHeldRows]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int held = 0; held < Tile::kHeldRows; ++held) {
#pragma unroll
      for (int bits = 1; bits < Tile::kLanesOfRow; bits *= 2) {
        sums[held] += __shfl_xor_sync(0xffffffffu, sums[held], bits);
      }
      if (lane % Tile::kLanesOfRow == 0) sums_[Tile::column_warp() * Tile::kRows + Tile::row_of(held)] = sums[held];
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row < Tile::kRows && first_row_ + row < call_.batch) {
      float value = entry<Element>(call_.network.biases[call_.network.layers - 1], 0, 1);
#pragma unroll
      for (int warp = 0; warp < Tile::kColumnWarps; ++warp) value += sums_[warp * Tile::kRows + row];
      store_one<Element>(static_cast<Storage*>(call_.value) + first_row_ + row, value);
    }
  }

  const MlpArguments& call_;
  Layers<Tile> layers_;
  Shared<float> sums_;
  Shared<Storage> parts_of_x_;
  int64_t first_row_ = 0;
};

template <typename Tile>
__global__ void __launch_bounds__(kMatmulThreads, kMlpResident<Tile>)
    mlp_value_and_grad_kernel(const __grid_constant__ MlpArguments call) {
  const LayersLayout layout = layers_layout<Tile>(kMlpOwnBytes<Tile>, kPartsOfXBytes<Tile>, call.network.layers,
                                                  call.pitch, call.scratch == nullptr);
  MlpBlock<Tile> block(call, layout);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows; row < call.batch;
       row += static_cast<int64_t>(gridDim.x) * Tile::kRows) {
    block.run(row);
  }
}

}  // namespace tgdp::cuda
