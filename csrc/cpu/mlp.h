// A SiLU MLP packed for block-wise evaluation, and the evaluation of one block of rows: all layers forward and back
// without leaving the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "matmul.h"

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

// Up to this many inputs, or outputs of a gradient, are handled without a matmul.
constexpr int64_t kFew = 8;

// Rows for callers that use a packed matrix many times, or in ways that need it.
constexpr int64_t kAlwaysPack = int64_t{1} << 62;

// Weights of hidden layers and head, packed for matmuls of a precision, and float copies of the biases. The memory
// belongs to the calling thread and is used again by its next PackedMlp of the same slot.
class PackedMlp {
 public:
  // weights: depth + 1 matrices, the last the head [outputs, H_L]; biases: depth vectors, of layers 2.. and the head.
  // with_gradient: packs what the backward pass needs. `rows`: how many rows will be computed; for few of them packing
  // costs more than it gains, so matmuls read the weights where they are, if they can.
  PackedMlp(const MlpShape& shape, Precision precision, const std::vector<Rows>& weights,
            const std::vector<Rows>& biases, bool with_gradient, int64_t rows, int slot);

  const MlpShape& shape() const { return shape_; }
  Precision precision() const { return precision_; }
  // Rows of a packed matrix that a matmul runs over: bf16 takes them in pairs, of which the padding is zero.
  int64_t matmul_depth(int64_t depth) const { return precision_ == Precision::f32 ? depth : (depth + 1) / 2 * 2; }
  bool few_inputs() const { return shape_.inputs <= kFew; }
  bool few_outputs() const { return shape_.outputs <= kFew; }

  // Right operand of a_l-1 W_l^T (layer 0 is the first) and of delta_l W_l; layer depth() is the head.
  const PackedMatrix& forward(int64_t layer) const { return forward_[layer]; }
  const PackedMatrix& backward(int64_t layer) const { return backward_[layer]; }
  // W_l itself as a left operand, where it is not packed for forward(l); ld 0 otherwise.
  const Operand& left(int64_t layer) const { return left_[layer]; }
  // For at most kTinyRows rows nothing is packed, and operands are float.
  bool tiny() const { return tiny_; }
  const Rows& weight(int64_t layer) const { return weights_[layer]; }
  const float* bias(int64_t layer) const { return biases_[layer]; }  // of layers 1 .. depth, padded
  ConstFloats head() const { return head_; }                         // a head with few rows, padded
  ConstFloats first_columns() const { return first_columns_; }       // W_1^T [inputs, padded], few inputs only

 private:
  // A weight to pack, as columns of its transpose and as rows; either may be null.
  struct Job {
    int64_t layer;
    unsigned char *transposed, *plain;
  };
  std::vector<Job> lay_out(const std::vector<Rows>& biases, bool with_gradient, int64_t rows, Arena& arena);
  Job place_weight(int64_t layer, bool with_gradient, int64_t rows, Arena& arena);
  void pack(const std::vector<Job>& jobs) const;

  MlpShape shape_;
  Precision precision_;
  bool tiny_;
  std::vector<Rows> weights_;
  std::vector<PackedMatrix> forward_, backward_;
  std::vector<Operand> left_;
  std::vector<const float*> biases_;
  ConstFloats head_, first_columns_;
};

// Columns of a layer that are computed and then activated at a time, while they are in the L1 cache.
constexpr int64_t kPanel = 64;

// What a thread needs for one panel.
struct Panel {
  float* data;        // [rows, kPanel]
  float* transposed;  // the same transposed
  Floats z() const { return {data, kPanel}; }
};

// Working memory for blocks of up to `rows` rows. With several workers their threads share the panels of a layer, for
// a batch of too few rows to share those.
struct MlpBlock {
  MlpBlock(const MlpShape& shape, Precision precision, int64_t rows, bool with_gradient, int64_t workers, Arena& arena);

  std::vector<Panel> panels;   // one per worker
  Operand input;               // [rows, padded(inputs)]; none for few inputs
  Operand a, b;                // [rows, widest layer], alternating
  std::vector<Slopes> slopes;  // of all layers but the last
  unsigned char* transposed;   // an activation
  float* part;                 // [panels, rows]: what each panel of the last hidden layer adds to the value
};

// The first layer's inputs and bias of one block.
struct MlpInput {
  ConstFloats few_x;  // [rows, kPadding] for few inputs; else the block's `input` holds them
  ConstFloats bias;   // [rows, padded H_1]
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

// Rows of a block, rounded up to one of a few sizes: each size of a matmul is compiled once per thread.
int64_t rounded_rows(int64_t rows);

}  // namespace tgdp
