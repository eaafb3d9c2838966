// The layers of a SiLU perceptron for a block of rows in shared memory, forward and back: what the kernels of
// mlp_value_and_grad.cuh and trajectory.cuh are made of.
//
// Shared memory holds two layers' activations, [kRows, widest] each, and three tiles of weights, which come from the
// level-2 cache once per product. Slopes, silu' of all layers but the last, are in shared memory too where the plan has room
// for them, else in global scratch memory, which stays in the level-2 cache; either way a thread reads only what it wrote
// itself. For 16-bit elements they are float16: at most 1.1, and more exact than bfloat16.
#pragma once

#include "../common/silu.h"
#include "tile_product.cuh"

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

// Words of slopes of one block.
template <typename Tile>
TGDP_FUNCTION size_t slope_words(int layers, int pitch) {
  const int panels = (pitch - Tile::kPadding + Tile::kPanel - 1) / Tile::kPanel;
  return static_cast<size_t>(layers > 1 ? layers - 1 : 0) * panels * Tile::kHeld * kProductThreads;
}

// Byte offsets in shared memory, behind what a kernel keeps there itself.
struct LayersLayout {
  size_t current, next, stages, slopes, bytes;
};

// least_next: bytes that the second layer's place has at least.
template <typename Tile>
TGDP_FUNCTION LayersLayout layers_layout(size_t own_bytes, size_t least_next, int layers, int pitch, bool with_slopes) {
  constexpr size_t kSize = sizeof(typename Tile::Storage);
  const size_t activations = static_cast<size_t>(Tile::kRows) * pitch * kSize;
  LayersLayout layout{};
  layout.current = (own_bytes + 15) / 16 * 16;
  layout.next = layout.current + activations;
  layout.stages = layout.next + (activations > least_next ? activations : least_next);
  layout.slopes = layout.stages + kStages * kStageElements<Tile> * kSize;
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

// A vector's entry; zero past its end.
template <typename Element>
TGDP_DEVICE float entry(const void* vector, int index, int count) {
  return index < count ? Element::to_float(static_cast<const typename Element::Storage*>(vector)[index]) : 0.0f;
}

template <typename Tile>
class Layers {
 public:
  using Element = typename Tile::Element;
  using Storage = typename Tile::Storage;
  static constexpr int kAdjacent = Tile::kAdjacent;

  // scratch: slopes of a block after those of another; null: they are in shared memory.
  TGDP_DEVICE Layers(const LayersLayout& layout, int layers, int pitch, uint32_t* scratch)
      : pitch_(pitch), panels_((pitch - Tile::kPadding + Tile::kPanel - 1) / Tile::kPanel) {
    const size_t activations = static_cast<size_t>(Tile::kRows) * pitch;
    current_ = shared_array<Storage>(layout.current, activations);
    next_ = shared_array<Storage>(layout.next, activations);
    stages_ = shared_array<Storage>(layout.stages, static_cast<size_t>(kStages) * kStageElements<Tile>);
    const size_t words = slope_words<Tile>(layers, pitch);
    if (scratch == nullptr) {
      shared_slopes_ = shared_array<uint32_t>(layout.slopes, words);
    } else {
      scratch_ = scratch + static_cast<int64_t>(blockIdx.x) * words;
    }
  }

  // A place for the inputs, [kRows, inputs] with zeros up to a multiple of kDepth, and their row stride.
  TGDP_DEVICE Shared<Storage> inputs() const { return current_; }
  TGDP_DEVICE int pitch() const { return pitch_; }

  // Layer 0 from a left factor that load_left and left give as to product().
  //
  // For this and all others, activate(row, column, row among those held, place of slopes, z, out) makes activations of
  // pre-activations, kAdjacent columns from `column` on; columns past the width have z = 0. The first layer's bias is
  // first_bias(row, column), zero past the width.
  template <typename LoadLeft, typename Left, typename FirstBias, typename Activate>
  TGDP_DEVICE void first(const Network& network, const LoadLeft& load_left, const Left& left, const FirstBias& first_bias,
                         const Activate& activate) {
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

  // The head: finish(row, column, products) for columns up to a multiple of kPanel, without bias.
  template <typename Finish>
  TGDP_DEVICE void head(const Network& network, int outputs, const Finish& finish) {
    product<Tile, false>(network.weights[network.layers], outputs, network.widths[network.layers - 1], stages_, Nothing{},
                         Activations{current_, pitch_}, [&](int first_column, int, Tile& tile) {
                           tile.each([&](int row, int column, int, int, const float(&values)[kAdjacent]) {
                             finish(row, first_column + column, values);
                           });
                         });
  }

  // From delta of a layer > 0, which activate() has left, to that of the layer below.
  TGDP_DEVICE void down(const Network& network, int layer) {
    const int padded = rounded_up(network.widths[layer - 1], Tile::kDepth);
    product<Tile, true>(network.weights[layer], network.widths[layer - 1], network.widths[layer], stages_, Nothing{},
                        Activations{current_, pitch_}, [&](int first_column, int panel, Tile& tile) {
                          tile.each([&](int row, int column, int, int number, const float(&values)[kAdjacent]) {
                            column += first_column;
                            if (column >= padded) return;
                            float slopes[kAdjacent], delta[kAdjacent];
                            slopes_of(kept_slopes(slope_place(layer - 1, panel, number)), slopes);
#pragma unroll
                            for (int i = 0; i < kAdjacent; ++i) delta[i] = slopes[i] * values[i];
                            Tile::store(next_ + (row * pitch_ + column), delta);
                          });
                        });
    swap();
  }

  // From delta of layer 0 to the gradient: finish(row, column, values) for columns up to a multiple of kPanel.
  template <typename Finish>
  TGDP_DEVICE void gradient(const Network& network, const Finish& finish) {
    product<Tile, true>(network.weights[0], network.inputs, network.widths[0], stages_, Nothing{},
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
    TGDP_DEVICE LeftFactor<Storage> operator()(int k, int) const { return {data + k, pitch}; }
  };

  TGDP_DEVICE void swap() {
    const Shared<Storage> other = current_;
    current_ = next_;
    next_ = other;
  }

  // A thread's own words lie kProductThreads apart.
  TGDP_DEVICE int64_t slope_place(int layer, int panel, int number) const {
    return (static_cast<int64_t>(layer * panels_ + panel) * Tile::kHeld + number) * kProductThreads + threadIdx.x;
  }
  TGDP_DEVICE uint32_t kept_slopes(int64_t place) {
    return scratch_ == nullptr ? static_cast<uint32_t>(shared_slopes_[place]) : scratch_[place];
  }

  template <typename LoadLeft, typename Left, typename Bias, typename Activate>
  TGDP_DEVICE void forward(const Network& network, int layer, int depth, const LoadLeft& load_left, const Left& left,
                           Shared<Storage> to, const Bias& bias, const Activate& activate) {
    const int padded = rounded_up(network.widths[layer], Tile::kDepth);
    product<Tile, false>(network.weights[layer], network.widths[layer], depth, stages_, load_left, left,
                         [&](int first_column, int panel, Tile& tile) {
                           tile.each([&](int row, int column, int held, int number, const float(&products)[kAdjacent]) {
                             column += first_column;
                             if (column >= padded) return;
                             float z[kAdjacent], out[kAdjacent];
#pragma unroll
                             for (int i = 0; i < kAdjacent; ++i) z[i] = products[i] + bias(row, column + i);
                             activate(row, column, held, slope_place(layer, panel, number), z, out);
                             Tile::store(to + (row * pitch_ + column), out);
                           });
                         });
  }

  int pitch_, panels_;
  Shared<Storage> current_, next_, stages_;
  Shared<uint32_t> shared_slopes_{};
  uint32_t* scratch_ = nullptr;
};

}  // namespace tgdp::cuda
