// Value and input gradient of a SiLU perceptron with one output, all layers forward and back for a block of rows: reference
// twin tgdp_fast.ops.mlp_value_and_grad.mlp_value_and_grad_reference.
//
// With P weights of b bytes, D inputs, widths H_l and N rows: 4 N P FLOPs in products, about 30 N sum(H_l) for
// activations; from and to memory b N (2 D + 1) bytes, the weights once, and what is kept. The weights come from the
// level-2 cache twice per block of kRows rows, so there are 2 kRows / b FLOPs per byte of that traffic.
//
// Shared memory holds two layers' activations, [kRows, widest] each, and three tiles of weights. At width 512 that is
// 161 KB for 64 rows of 16-bit or 32 rows of float32 elements (sm_80, sm_90, sm_100), and 96 KB for half as many rows
// (sm_86). Slopes, silu' of all layers but the last, are in shared memory too while two blocks fit on a multiprocessor (up
// to four layers of width 128 on sm_90), else in global scratch memory, which stays in the level-2 cache; either way a
// thread reads only what it wrote itself. For 16-bit elements they are float16: at most 1.1, and more exact than bfloat16.
#pragma once

#include "../common/silu.h"
#include "tile_product.cuh"

namespace tgdp::cuda {

constexpr int kMostLayers = 8;
// Blocks that a multiprocessor has registers for.
constexpr int kResident = 2;

// Elements, pitches and strides in elements of the dtype of the tile.
struct MlpArguments {
  int64_t batch;
  int inputs, layers, widths[kMostLayers];
  int pitch;  // of activations in shared memory
  Matrix x, first_bias, weights[kMostLayers + 1];
  const void* biases[kMostLayers];  // of layers 2 .., then of the head
  void *value, *gradient;           // [batch], [batch, inputs]
  void* keep[kMostLayers];          // [batch, H_l] of z_l, or null
  uint32_t* scratch;                // slopes of a block after those of another; null: they are in shared memory
};

// Byte offsets in shared memory.
struct MlpLayout {
  size_t current, next, stages, sums, slopes, bytes;
};

// Words of slopes of one block.
template <typename Tile>
TGDP_FUNCTION size_t slope_words(int layers, int pitch) {
  const int panels = (pitch - Tile::kPadding + kPanel - 1) / kPanel;
  return static_cast<size_t>(layers - 1) * panels * Tile::kHeld * kProductThreads;
}

template <typename Tile>
TGDP_FUNCTION MlpLayout mlp_layout(int layers, int pitch, bool with_slopes) {
  constexpr size_t kSize = sizeof(typename Tile::Storage);
  const size_t activations = static_cast<size_t>(Tile::kRows) * pitch * kSize;
  // Parts of x are where the second layer's activations will be.
  const size_t parts_of_x = static_cast<size_t>(kStages) * Tile::kRows * (Tile::kDepth + Tile::kPadding) * kSize;
  MlpLayout layout{};
  layout.current = 0;
  layout.next = activations;
  layout.stages = layout.next + (activations > parts_of_x ? activations : parts_of_x);
  layout.sums = layout.stages + kStages * kStageElements<Tile> * kSize;
  layout.slopes = layout.sums + Tile::kColumnWarps * Tile::kRows * sizeof(float);
  layout.bytes = layout.slopes + (with_slopes ? slope_words<Tile>(layers, pitch) * sizeof(uint32_t) : 0);
  return layout;
}

// The rough sigmoid is enough for what is rounded to bfloat16.
template <typename Element>
TGDP_DEVICE float sigmoid_for(float z) {
  if constexpr (Element::kDtype == Dtype::bf16) {
    return rough_sigmoid(z);
  } else {
    return sigmoid(z);
  }
}

TGDP_DEVICE uint32_t slope_word(const float (&slopes)[2]) { return F16::pack(slopes[0], slopes[1]); }
TGDP_DEVICE uint32_t slope_word(const float (&slopes)[1]) { return bit_cast<uint32_t>(slopes[0]); }
TGDP_DEVICE void slopes_of(uint32_t word, float (&slopes)[2]) {
  slopes[0] = F16::to_float(static_cast<uint16_t>(word));
  slopes[1] = F16::to_float(static_cast<uint16_t>(word >> 16));
}
TGDP_DEVICE void slopes_of(uint32_t word, float (&slopes)[1]) { slopes[0] = bit_cast<float>(word); }

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
TGDP_DEVICE void store_row(typename Tile::Storage* row, int column, int columns, const float (&values)[Tile::kAdjacent]) {
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

template <typename Tile>
class MlpBlock {
 public:
  using Element = typename Tile::Element;
  using Storage = typename Tile::Storage;
  static constexpr int kAdjacent = Tile::kAdjacent;

  TGDP_DEVICE explicit MlpBlock(const MlpArguments& call) : call_(call) {
    const bool with_slopes = call.scratch == nullptr;
    const MlpLayout layout = mlp_layout<Tile>(call.layers, call.pitch, with_slopes);
    const size_t activations = static_cast<size_t>(Tile::kRows) * call.pitch;
    current_ = shared_array<Storage>(layout.current, activations);
    next_ = shared_array<Storage>(layout.next, activations);
    parts_of_x_ = shared_array<Storage>(layout.next, static_cast<size_t>(kStages) * kPartOfX);
    stages_ = shared_array<Storage>(layout.stages, static_cast<size_t>(kStages) * kStageElements<Tile>);
    sums_ = shared_array<float>(layout.sums, Tile::kColumnWarps * Tile::kRows);
    words_ = slope_words<Tile>(call.layers, call.pitch);
    if (with_slopes) shared_slopes_ = shared_array<uint32_t>(layout.slopes, words_);
  }

  TGDP_DEVICE void run(int64_t first_row) {
    first_row_ = first_row;
    float sums[Tile::kHeldRows];
#pragma unroll
    for (int held = 0; held < Tile::kHeldRows; ++held) sums[held] = 0.0f;
    for (int layer = 0; layer < call_.layers; ++layer) forward(layer, sums);
    write_values(sums);
    for (int layer = call_.layers - 1; layer >= 0; --layer) backward(layer);
  }

 private:
  static constexpr int kPartOfX = Tile::kRows * (Tile::kDepth + Tile::kPadding);

  TGDP_DEVICE int width(int layer) const { return call_.widths[layer]; }
  // Columns of activations that products read.
  TGDP_DEVICE int padded(int layer) const { return rounded_up(width(layer), Tile::kDepth); }

  TGDP_DEVICE LeftFactor<Storage> activations(int k) const { return {current_ + k, call_.pitch}; }

  TGDP_DEVICE void swap() {
    const Shared<Storage> other = current_;
    current_ = next_;
    next_ = other;
  }

  // Position of the slopes that this thread holds: its own words lie kProductThreads apart.
  TGDP_DEVICE int64_t slope_index(int layer, int panel, int number) const {
    const int panels = (call_.pitch - Tile::kPadding + kPanel - 1) / kPanel;
    return (static_cast<int64_t>(layer * panels + panel) * Tile::kHeld + number) * kProductThreads + threadIdx.x;
  }
  TGDP_DEVICE uint32_t* scratch() const { return call_.scratch + static_cast<int64_t>(blockIdx.x) * words_; }
  TGDP_DEVICE void keep_slopes(int64_t index, uint32_t word) {
    if (call_.scratch == nullptr) {
      shared_slopes_[index] = word;
    } else {
      scratch()[index] = word;
    }
  }
  TGDP_DEVICE uint32_t kept_slopes(int64_t index) {
    return call_.scratch == nullptr ? static_cast<uint32_t>(shared_slopes_[index]) : scratch()[index];
  }

  // From current_ to next_, or for the first layer from x to current_; the last layer leaves delta_L there.
  TGDP_DEVICE void forward(int layer, float (&sums)[Tile::kHeldRows]) {
    const Shared<Storage> to = layer == 0 ? current_ : next_;
    const bool last = layer + 1 == call_.layers;
    const auto finish = [&](int first_column, int panel, Tile& tile) {
      tile.each([&](int row, int column, int held, int number, const float(&products)[kAdjacent]) {
        column += first_column;
        if (column >= padded(layer)) return;
        float z[kAdjacent], out[kAdjacent], slopes[kAdjacent];
#pragma unroll
        for (int i = 0; i < kAdjacent; ++i) {
          z[i] = products[i] + bias(layer, row, column + i);
          const float s = sigmoid_for<Element>(z[i]);
          slopes[i] = silu_slope(z[i], s);
          out[i] = z[i] * s;
          if (last) {
            const float weight = element(static_cast<const Storage*>(call_.weights[call_.layers].data), column + i, layer);
            sums[held] += out[i] * weight;
            out[i] = slopes[i] * weight;
          }
        }
        if (call_.keep[layer] != nullptr && first_row_ + row < call_.batch) {
          store_row<Tile>(static_cast<Storage*>(call_.keep[layer]) + (first_row_ + row) * width(layer), column, width(layer), z);
        }
        if (!last) keep_slopes(slope_index(layer, panel, number), slope_word(slopes));
        Tile::store(to + (row * call_.pitch + column), out);
      });
    };
    if (layer == 0) {
      product<Tile, false>(
          call_.weights[0], width(0), call_.inputs, stages_,
          [&](int k, int stage) {
            load_tile<Tile, Tile::kRows, Tile::kDepth>(parts_of_x_ + stage * kPartOfX, call_.x, first_row_, k, call_.batch,
                                                       call_.inputs);
          },
          [&](int, int stage) {
            return LeftFactor<Storage>{parts_of_x_ + stage * kPartOfX, Tile::kDepth + Tile::kPadding};
          },
          finish);
    } else {
      product<Tile, false>(
          call_.weights[layer], width(layer), width(layer - 1), stages_, [](int, int) {},
          [&](int k, int) { return activations(k); }, finish);
      swap();
    }
  }

  // delta of a layer in current_ to that of the layer below, or to the gradient.
  TGDP_DEVICE void backward(int layer) {
    const auto left = [&](int k, int) { return activations(k); };
    const auto nothing = [](int, int) {};
    if (layer == 0) {
      product<Tile, true>(call_.weights[0], call_.inputs, width(0), stages_, nothing, left,
                          [&](int first_column, int, Tile& tile) {
                            tile.each([&](int row, int column, int, int, const float(&values)[kAdjacent]) {
                              if (first_row_ + row >= call_.batch) return;
                              auto* to = static_cast<Storage*>(call_.gradient) + (first_row_ + row) * call_.inputs;
                              store_row<Tile>(to, first_column + column, call_.inputs, values);
                            });
                          });
      return;
    }
    product<Tile, true>(call_.weights[layer], width(layer - 1), width(layer), stages_, nothing, left,
                        [&](int first_column, int panel, Tile& tile) {
                          tile.each([&](int row, int column, int, int number, const float(&values)[kAdjacent]) {
                            column += first_column;
                            if (column >= padded(layer - 1)) return;
                            float slopes[kAdjacent], delta[kAdjacent];
                            slopes_of(kept_slopes(slope_index(layer - 1, panel, number)), slopes);
#pragma unroll
                            for (int i = 0; i < kAdjacent; ++i) delta[i] = slopes[i] * values[i];
                            Tile::store(next_ + (row * call_.pitch + column), delta);
                          });
                        });
    swap();
  }

  // f of all rows from what the threads hold of it.
  TGDP_DEVICE void write_values(float (&sums)[Tile::kHeldRows]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int held = 0; held < Tile::kHeldRows; ++held) {
#pragma unroll
      for (int bits = 1; bits < Tile::kLanesOfRow; bits *= 2) sums[held] += __shfl_xor_sync(0xffffffffu, sums[held], bits);
      if (lane % Tile::kLanesOfRow == 0) sums_[Tile::column_warp() * Tile::kRows + Tile::row_of(held)] = sums[held];
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row < Tile::kRows && first_row_ + row < call_.batch) {
      float value = Element::to_float(static_cast<const Storage*>(call_.biases[call_.layers - 1])[0]);
#pragma unroll
      for (int warp = 0; warp < Tile::kColumnWarps; ++warp) value += sums_[warp * Tile::kRows + row];
      store_one<Element>(static_cast<Storage*>(call_.value) + first_row_ + row, value);
    }
  }

  // Zero past the width of the layer.
  TGDP_DEVICE float element(const Storage* from, int column, int layer) const {
    return column < width(layer) ? Element::to_float(from[column]) : 0.0f;
  }
  TGDP_DEVICE float bias(int layer, int row, int column) const {
    if (layer > 0) return element(static_cast<const Storage*>(call_.biases[layer - 1]), column, layer);
    if (first_row_ + row >= call_.batch) return 0.0f;
    return element(static_cast<const Storage*>(call_.first_bias.data) + (first_row_ + row) * call_.first_bias.stride,
                   column, layer);
  }

  const MlpArguments& call_;
  Shared<Storage> current_, next_, parts_of_x_, stages_;
  Shared<float> sums_;
  Shared<uint32_t> shared_slopes_;
  size_t words_;
  int64_t first_row_ = 0;
};

template <typename Tile>
__global__ void __launch_bounds__(kProductThreads, kResident) mlp_value_and_grad_kernel(const __grid_constant__ MlpArguments call) {
  MlpBlock<Tile> block(call);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows; row < call.batch;
       row += static_cast<int64_t>(gridDim.x) * Tile::kRows) {
    block.run(row);
  }
}

}  // namespace tgdp::cuda
