// The layers of a SiLU MLP for a block of rows in shared memory, forward and backward: what the kernels of
// mlp_value_and_grad.cuh and trajectory.cuh are made of.
//
// Shared memory holds two layers' activations, [kRows, widest] each, and three tiles of weights, which come from the L2
// cache once per matmul. Slopes, silu' of all layers but the last, are in shared memory too where the plan has room for
// them, else in global scratch memory, which stays in the L2 cache; either way a thread reads only what it wrote
// itself. For 16-bit elements they are float16: at most 1.1, and more accurate than bfloat16.
#pragma once

#include "../common/silu.h"
#include "tile_matmul.cuh"

namespace tgdp::cuda {

constexpr int kMostLayers = 8;

// Strides in elements of the dtype of the tile.
struct Network {
  int inputs, layers, widths[kMostLayers];
  Matrix weights[kMostLayers + 1];  // the last is the head
  const void* biases[kMostLayers];  // of layers 2 .., then of the head
};

// Elements between rows of activations.
template <typename Tile>
TGDP_FUNCTION int pitch_for(int widest) {
  return rounded_up(widest, Tile::kDepth) + Tile::kPadding;
}

// Columns of a layer per block, when `blocks` blocks share it; whole pieces of 16 bytes.
TGDP_FUNCTION int columns_of_block(int padded, int blocks) { return rounded_up((padded + blocks - 1) / blocks, 8); }

// Byte offsets in shared memory, behind what a kernel keeps there itself; panels of the widest layer per block, and
// words of its slopes.
struct LayersLayout {
  size_t current, next, stages, slopes, bytes;
  int panels;
  size_t slope_words;
};

// least_next: minimum bytes for the second layer; blocks: that share a layer; stages: of weights.
template <typename Tile>
TGDP_FUNCTION LayersLayout layers_layout(size_t own_bytes, size_t least_next, int layers, int pitch, bool with_slopes,
                                         int blocks = 1, int stages = kStages) {
  constexpr size_t kSize = sizeof(typename Tile::Storage);
  const size_t activations = static_cast<size_t>(Tile::kRows) * pitch * kSize;
  LayersLayout layout{};
  layout.current = (own_bytes + 15) / 16 * 16;
  layout.next = layout.current + activations;
  layout.stages = layout.next + (activations > least_next ? activations : least_next);
  layout.slopes = layout.stages + static_cast<size_t>(stages) * kStageElements<Tile> * kSize;
  layout.panels = (columns_of_block(pitch - Tile::kPadding, blocks) + Tile::kPanel - 1) / Tile::kPanel;
  layout.slope_words = static_cast<size_t>(layers > 1 ? layers - 1 : 0) * layout.panels * Tile::kHeld * kMatmulThreads;
  layout.bytes = layout.slopes + (with_slopes ? layout.slope_words * sizeof(uint32_t) : 0);
  return layout;
}

// The rough sigmoid is enough for numbers that are rounded to bfloat16.
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

// An entry of a vector; zero past its end.
template <typename Element>
TGDP_DEVICE float entry(const void* vector, int index, int count) {
  return index < count ? Element::to_float(static_cast<const typename Element::Storage*>(vector)[index]) : 0.0f;
}

// Columns [first, end) of a matmul.
struct Columns {
  int first, end;
};

// Matmuls of a block that computes all columns of its layers, one after the other.
template <typename Tile>
class BlockMatmuls {
 public:
  using Storage = typename Tile::Storage;

  TGDP_DEVICE explicit BlockMatmuls(const LayersLayout& layout)
      : stages_(shared_array<Storage>(layout.stages, static_cast<size_t>(kStages) * kStageElements<Tile>)) {}

  // Of the `padded` columns of a layer, those of this block.
  TGDP_DEVICE Columns columns(int padded) const { return {0, padded}; }

  // As tile_matmul() for columns `own` of `columns`.
  template <bool kTransposed, typename LoadLeft, typename Left, typename Finish>
  TGDP_DEVICE void matmul(const Matrix& weight, Columns, int columns, int depth, const LoadLeft& load_left,
                           const Left& left, const Finish& finish) {
    cuda::tile_matmul<Tile, kTransposed>(weight, columns, depth, stages_, load_left, left, finish);
  }

  // Blocks that share a layer give each other their columns.
  TGDP_DEVICE void exchange(Shared<Storage>, int, Columns) const {}

 private:
  Shared<Storage> stages_;
};

// Matmuls: BlockMatmuls, or the counterpart for blocks that share their layers.
template <typename Tile, typename Matmuls = BlockMatmuls<Tile>>
class Layers {
 public:
  using Element = typename Tile::Element;
  using Storage = typename Tile::Storage;
  static constexpr int kAdjacent = Tile::kAdjacent;

  // scratch: slopes of a block after those of another; null: they are in shared memory.
  TGDP_DEVICE Layers(const LayersLayout& layout, int pitch, uint32_t* scratch, const Matmuls& matmuls)
      : matmuls_(matmuls), pitch_(pitch), panels_(layout.panels) {
    const size_t activations = static_cast<size_t>(Tile::kRows) * pitch;
    current_ = shared_array<Storage>(layout.current, activations);
    next_ = shared_array<Storage>(layout.next, activations);
    if (scratch == nullptr) {
      shared_slopes_ = shared_array<uint32_t>(layout.slopes, layout.slope_words);
    } else {
      scratch_ = scratch + static_cast<int64_t>(blockIdx.x) * layout.slope_words;
    }
  }

  // Memory for the inputs, [kRows, inputs] with zeros up to a multiple of kDepth, and their row stride.
  TGDP_DEVICE Shared<Storage> inputs() const { return current_; }
  TGDP_DEVICE int pitch() const { return pitch_; }

  // Layer 0 from a left operand, given by load_left and left as to tile_matmul().
  //
  // For this and all other layers, activate(row, column, row among those held, place of slopes, z, out) computes
  // activations from pre-activations, kAdjacent columns from `column` on; columns past the width have z = 0. The first
  // layer's bias is first_bias(row, column), zero past the width.
  template <typename LoadLeft, typename Left, typename FirstBias, typename Activate>
  TGDP_DEVICE void first(const Network& network, const LoadLeft& load_left, const Left& left,
                         const FirstBias& first_bias, const Activate& activate) {
    forward(network, 0, network.inputs, load_left, left, current_, first_bias, activate);
  }

  // The same from inputs().
  template <typename FirstBias, typename Activate>
  TGDP_DEVICE void first(const Network& network, const FirstBias& first_bias, const Activate& activate) {
    forward(network, 0, network.inputs, Nothing{}, Activations{current_, pitch_}, next_, first_bias, activate);
    swap();
  }

  // A later layer.
  template <typename Activate>
  TGDP_DEVICE void next(const Network& network, int layer, const Activate& activate) {
    const auto bias = [&](int, int column) {
      return entry<Element>(network.biases[layer - 1], column, network.widths[layer]);
    };
    forward(network, layer, network.widths[layer - 1], Nothing{}, Activations{current_, pitch_}, next_, bias, activate);
    swap();
  }

  // The head: finish(row, column, values) for columns up to a multiple of kPanel, without bias.
  template <typename Finish>
  TGDP_DEVICE void head(const Network& network, int outputs, const Finish& finish) {
    matmuls_.template matmul<false>(
        network.weights[network.layers], {0, outputs}, outputs, network.widths[network.layers - 1], Nothing{},
        Activations{current_, pitch_}, [&](int first_column, int, Tile& tile) {
          tile.each([&](int row, int column, int, int, const float(&values)[kAdjacent]) {
            finish(row, first_column + column, values);
          });
        });
  }

  // From delta of a layer > 0, which activate() has left, to that of the layer below.
  TGDP_DEVICE void backward(const Network& network, int layer) {
    const int width = network.widths[layer - 1];
    const Columns own = matmuls_.columns(rounded_up(width, Tile::kDepth));
    matmuls_.template matmul<true>(
        network.weights[layer], own, width, network.widths[layer], Nothing{}, Activations{current_, pitch_},
        [&](int first_column, int panel, Tile& tile) {
          tile.each([&](int row, int column, int, int number, const float(&values)[kAdjacent]) {
            column += first_column;
            if (column >= own.end) return;
            float slopes[kAdjacent], delta[kAdjacent];
            slopes_of(kept_slopes(slope_place(layer - 1, panel, number)), slopes);
#pragma unroll
            for (int i = 0; i < kAdjacent; ++i) delta[i] = slopes[i] * values[i];
            Tile::store(next_ + (row * pitch_ + column), delta);
          });
        });
    matmuls_.exchange(next_, pitch_, own);
    swap();
  }

  // From delta of layer 0 to the gradient: finish(row, column, values) for columns up to a multiple of kPanel.
  template <typename Finish>
  TGDP_DEVICE void gradient(const Network& network, const Finish& finish) {
    matmuls_.template matmul<true>(
        network.weights[0], {0, network.inputs}, network.inputs, network.widths[0], Nothing{},
        Activations{current_, pitch_}, [&](int first_column, int, Tile& tile) {
          tile.each([&](int row, int column, int, int, const float(&values)[kAdjacent]) {
            finish(row, first_column + column, values);
          });
        });
  }

  TGDP_DEVICE void keep_slopes(int64_t place, const float (&slopes)[kAdjacent]) {
    const uint32_t word = slope_word(slopes);
    if (scratch_ == nullptr) {
      shared_slopes_[place] = word;
    } else {
      scratch_[place] = word;
    }
  }

 private:
  struct Nothing {
    TGDP_DEVICE void operator()(int, int) const {}
  };
  struct Activations {
    Shared<Storage> data;
    int pitch;
    TGDP_DEVICE LeftOperand<Storage> operator()(int k, int) const { return {data + k, pitch}; }
  };

  TGDP_DEVICE void swap() {
    const Shared<Storage> other = current_;
    current_ = next_;
    next_ = other;
  }

  // A thread's own words lie kMatmulThreads apart.
  TGDP_DEVICE int64_t slope_place(int layer, int panel, int number) const {
    return (static_cast<int64_t>(layer * panels_ + panel) * Tile::kHeld + number) * kMatmulThreads + threadIdx.x;
  }
  TGDP_DEVICE uint32_t kept_slopes(int64_t place) {
    return scratch_ == nullptr ? static_cast<uint32_t>(shared_slopes_[place]) : scratch_[place];
  }

  template <typename LoadLeft, typename Left, typename Bias, typename Activate>
  TGDP_DEVICE void forward(const Network& network, int layer, int depth, const LoadLeft& load_left, const Left& left,
                           Shared<Storage> to, const Bias& bias, const Activate& activate) {
    const int width = network.widths[layer];
    const Columns own = matmuls_.columns(rounded_up(width, Tile::kDepth));
    matmuls_.template matmul<false>(
        network.weights[layer], own, width, depth, load_left, left, [&](int first_column, int panel, Tile& tile) {
          tile.each([&](int row, int column, int held, int number, const float(&sums)[kAdjacent]) {
            column += first_column;
            if (column >= own.end) return;
            float z[kAdjacent], out[kAdjacent];
#pragma unroll
            for (int i = 0; i < kAdjacent; ++i) z[i] = sums[i] + bias(row, column + i);
            activate(row, column, held, slope_place(layer, panel, number), z, out);
            Tile::store(to + (row * pitch_ + column), out);
          });
        });
    matmuls_.exchange(to, pitch_, own);
  }

  Matmuls matmuls_;
  int pitch_, panels_;
  Shared<Storage> current_, next_;
  Shared<uint32_t> shared_slopes_{};
  uint32_t* scratch_ = nullptr;
};

}  // namespace tgdp::cuda
