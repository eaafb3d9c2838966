// A SiLU perceptron packed for block-wise evaluation, and the evaluation of one block of rows: all layers forward and
// back without leaving the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "tile_product.h"

namespace tgdp {

struct MlpShape {
  int64_t inputs = 0;
  std::vector<int64_t> widths;  // of the hidden layers
  int64_t outputs = 1;          // of the head
  int64_t depth() const { return static_cast<int64_t>(widths.size()); }
  // Of a layer; layer depth() is the head.
  int64_t in(int64_t layer) const { return layer == 0 ? inputs : widths[layer - 1]; }
  int64_t out(int64_t layer) const { return layer == depth() ? outputs : widths[layer]; }
  int64_t widest() const;  // padded width of the widest hidden layer
};

// Inputs, or outputs of a gradient, up to this many are handled without a matrix product.
constexpr int64_t kFew = 8;

// Rows for callers that use a packed matrix many times, or in ways that need it.
constexpr int64_t kAlwaysPack = int64_t{1} << 62;

// Weights of hidden layers and head in packed form, for products with `products`; holds float copies of the biases.
// The memory belongs to the calling thread and is used again by its next PackedMlp of the same slot.
class PackedMlp {
 public:
  // weights: depth + 1 matrices, the last the head [outputs, H_L]; biases: depth vectors, of layers 2.. and the head.
  // with_gradient packs what the way back needs. `rows`: how many rows will be computed; for few of them packing costs
  // more than it gains, so products take the weights from where they are, if they can.
  PackedMlp(const MlpShape& shape, Products products, const std::vector<Rows>& weights,
            const std::vector<Rows>& biases, bool with_gradient, int64_t rows, int slot);

  const MlpShape& shape() const { return shape_; }
  Products products() const { return products_; }
  // Rows of a packed matrix that a product runs over: bf16 takes them in pairs, of which the padding is zero.
  int64_t depth_of_product(int64_t depth) const { return products_ == Products::f32 ? depth : (depth + 1) / 2 * 2; }
  bool few_inputs() const { return shape_.inputs <= kFew; }
  bool few_outputs() const { return shape_.outputs <= kFew; }

  // Right factor of a_l-1 W_l^T (layer 0 is the first) and of delta_l W_l; layer depth() is the head.
  const PackedMatrix& forward(int64_t layer) const { return forward_[layer]; }
  const PackedMatrix& backward(int64_t layer) const { return backward_[layer]; }
  // W_l itself as a left factor, where it is not packed for forward(l); ld 0 otherwise.
  const Operand& left(int64_t layer) const { return left_[layer]; }
  // For at most kTinyRows rows nothing is packed, and operands are float.
  bool tiny() const { return tiny_; }
  const Rows& weight(int64_t layer) const { return weights_[layer]; }
  const float* bias(int64_t layer) const { return biases_[layer]; }  // of layers 1 .. depth, padded
  const float* head() const { return head_; }                    // few rows of the head, padded
  const float* first_columns() const { return first_columns_; }  // W_1^T [inputs, padded], few inputs only

 private:
  static void small_layer(const Rows& weight, bool columns, int64_t in, int64_t out, float* to);

  MlpShape shape_;
  Products products_;
  bool tiny_;
  std::vector<Rows> weights_;
  std::vector<PackedMatrix> forward_, backward_;
  std::vector<Operand> left_;
  std::vector<const float*> biases_;
  const float* head_ = nullptr;
  const float* first_columns_ = nullptr;
};

// Columns of a layer that are computed and then activated at a time, while they are in the level-1 cache.
constexpr int64_t kPanel = 64;

// What a thread needs for one panel.
struct Panel {
  float* z;       // [rows, kPanel]
  float* turned;  // the same transposed
};

// Working memory for blocks of up to `rows` rows. With several workers their threads share the panels of a layer, for
// a batch of too few rows to share those.
struct MlpBlock {
  MlpBlock(const MlpShape& shape, Products products, int64_t rows, bool with_gradient, int64_t workers, Arena& arena);

  std::vector<Panel> panels;   // one per worker
  Operand input;               // [rows, padded(inputs)]; none for few inputs
  Operand a, b;                // [rows, widest layer], alternating
  std::vector<Slopes> slopes;  // of all layers but the last
  unsigned char* turned;       // a transposed activation
  float* part;                 // [panels, rows]: what each panel of the last hidden layer adds to the value
};

// The first layer's inputs and bias of one block.
struct MlpInput {
  const float* few_x = nullptr;  // [rows, kPadding] for few inputs; else the block's `input` holds them
  const float* bias = nullptr;   // [rows, padded H_1] with row stride bias_stride
  int64_t bias_stride = 0;       // 0: one bias for all rows
};

// Where the first `rows` rows of a block go.
struct FirstRows {
  int64_t rows = 0;
  Rows to;
};

// Where training keeps z_l of this block, its first `rows` rows; empty to keep nothing.
struct KeepPreActivations {
  int64_t rows = 0;
  std::vector<Rows> layers;
};

// value[r] = f(x_r) of `rows` rows, and delta_1 of the gradient, in block.a or block.b, which is returned.
Operand value_and_delta(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, float* value,
                        const KeepPreActivations& keep = {});

// The first to.rows rows of gradient [rows, inputs] = delta_1 W_1.
void input_gradient(const PackedMlp& mlp, const std::vector<Panel>& panels, const Operand& delta, int64_t rows,
                    const FirstRows& to);

// The first to.rows rows of [rows, outputs] = head(a_L), for networks with any number of outputs.
void outputs(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, const FirstRows& to,
             const KeepPreActivations& keep = {});

// Rows of a block, rounded up to one of a few sizes: each size of a product is compiled once per thread.
int64_t rounded_rows(int64_t rows);

}  // namespace tgdp
