#include "mlp_backward.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {
namespace {

// Rows of a block, such that its activations, slopes and tangents stay in a level-2 cache of about 1 MiB.
int64_t block_rows(const MlpShape& shape, int64_t batch, bool with_tangent) {
  int64_t width = 0;
  for (int64_t w : shape.widths) width += padded(w);
  const int64_t bytes_per_row = width * (with_tangent ? 16 : 8);
  const int64_t fitting = std::clamp<int64_t>((int64_t{1} << 20) / bytes_per_row / 16 * 16, 16, 128);
  const int64_t share = (batch + at::get_num_threads() - 1) / at::get_num_threads();
  return std::min(fitting, rounded_rows(std::max<int64_t>(share, 1)));
}

// What one thread sums over its blocks.
struct Sums {
  Sums(const MlpShape& shape, Arena& arena) {
    for (int64_t l = 0; l < shape.depth(); ++l) {
      // Few inputs are kept as columns [inputs, padded H_1].
      const bool few = l == 0 && shape.inputs <= kFew;
      weights.push_back(arena.take<float>(few ? shape.inputs * padded(shape.widths[0])
                                              : shape.widths[l] * padded(shape.in(l))));
    }
    const int64_t begin = arena.used();
    for (int64_t l = 0; l < shape.depth(); ++l) biases.push_back(arena.take<float>(padded(shape.widths[l])));
    head = arena.take<float>(padded(shape.widths.back()));
    head_bias = arena.take<float>(1);
    small_bytes = arena.used() - begin;
  }
  std::vector<float*> weights, biases;
  float *head, *head_bias;
  int64_t small_bytes;  // of biases, head and head_bias, which lie together
};

// Working memory of one thread. Operands hold a block's rows, then, with a tangent, as many rows of the tangent.
struct Memory {
  Memory(const MlpShape& shape, Products products, int64_t rows, bool with_tangent, Arena& arena) {
    const int64_t stacked = rows * (with_tangent ? 2 : 1);
    const bool few = shape.inputs <= kFew;
    int64_t widest = shape.widest();
    if (few) {
      few_x = arena.take<float>(stacked * kPadding);
    } else {
      input = arena.take_operand(products, stacked, padded(shape.inputs));
      widest = std::max(widest, padded(shape.inputs));
    }
    for (int64_t l = 0; l < shape.depth(); ++l) {
      const int64_t width = padded(shape.widths[l]);
      activations.push_back(arena.take_operand(products, stacked, width));
      // In float also for bf16: they multiply sums of two terms that may cancel.
      slopes.push_back(arena.take_slopes(Products::f32, rows, width));
      curved.push_back(with_tangent ? arena.take<float>(rows * width) : nullptr);
    }
    for (Operand& operand : bars) operand = arena.take_operand(products, stacked, shape.widest());
    panel = arena.take<float>(stacked * kPanel);
    cotangent = arena.take<float>(rows);
    turned = arena.take<unsigned char>(packed_bytes(products, stacked, widest));
    pairs = arena.take<unsigned char>(packed_bytes(products, stacked, widest));
    right = arena.take<unsigned char>(packed_bytes(products, stacked, widest));
  }
  float* few_x = nullptr;
  Operand input;
  std::vector<Operand> activations;
  std::vector<Slopes> slopes;
  std::vector<float*> curved;
  Operand bars[2];
  float *panel, *cotangent;
  unsigned char *turned, *pairs, *right;
};

class Backward {
 public:
  Backward(const MlpCall& call, const PackedMlp& mlp, const Rows& value_cotangent, const Rows& gradient_cotangent,
           const std::vector<Rows>& pre_activations, const MlpGradients& gradients)
      : call_(call), mlp_(mlp), shape_(mlp.shape()), value_cotangent_(value_cotangent),
        gradient_cotangent_(gradient_cotangent), pre_activations_(pre_activations), gradients_(gradients),
        with_tangent_(gradient_cotangent.data != nullptr), p_(static_cast<int>(mlp.products())) {}

  // Adds the block of rows [row, row + rows) to the sums; first: the thread's first block, which starts them.
  void block(int64_t row, int64_t rows, bool first, Memory& memory, Sums& sums) const {
    load(row, rows, memory);
    for (int64_t l = 0; l < shape_.depth(); ++l) upwards(row, rows, l, memory);
    const Operand& top = memory.activations.back();
    Operand top_tangent = with_tangent_ ? top.from_row(rows) : Operand{};
    pointwise().head_gradient[p_](top, top_tangent, memory.cotangent, rows, padded(shape_.widths.back()), sums.head);
    double total = 0.0;
    for (int64_t r = 0; r < rows; ++r) total += memory.cotangent[r];
    *sums.head_bias += static_cast<float>(total);
    for (int64_t l = shape_.depth() - 1; l >= lowest(); --l) downwards(row, rows, l, first, memory, sums);
    if (gradients_.x.data != nullptr) input_gradients(row, rows, memory);
  }

 private:
  int64_t lowest() const {
    if (gradients_.x.data != nullptr || gradients_.first_bias.data != nullptr) return 0;
    for (int64_t l = 0; l < shape_.depth(); ++l) {
      if (gradients_.weights[l].data != nullptr || (l > 0 && gradients_.biases[l - 1].data != nullptr)) return l;
    }
    return shape_.depth();
  }

  int64_t stacked(int64_t rows) const { return with_tangent_ ? 2 * rows : rows; }

  void load(int64_t row, int64_t rows, Memory& memory) const {
    const int64_t inputs = shape_.inputs;
    if (value_cotangent_.data == nullptr) {
      std::fill(memory.cotangent, memory.cotangent + rows, 0.0f);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        float value[kPadding];
        pointwise().load_float(value_cotangent_.from_row(row + r), 1, 1, kPadding, value, kPadding);
        memory.cotangent[r] = value[0];
      }
    }
    if (mlp_.few_inputs()) {
      pointwise().load_float(call_.x.from_row(row), rows, inputs, kPadding, memory.few_x, kPadding);
      if (with_tangent_) {
        pointwise().load_float(gradient_cotangent_.from_row(row), rows, inputs, kPadding, memory.few_x + rows * kPadding,
                               kPadding);
      }
      return;
    }
    pointwise().load[p_](call_.x.from_row(row), rows, inputs, padded(inputs), memory.input);
    if (with_tangent_) {
      pointwise().load[p_](gradient_cotangent_.from_row(row), rows, inputs, padded(inputs), memory.input.from_row(rows));
    }
  }

  // a_l, silu'(z_l) and, with a tangent, v_l = W_l u_l-1, u_l and silu''(z_l) v_l.
  void upwards(int64_t row, int64_t rows, int64_t l, Memory& memory) const {
    const int64_t width = padded(shape_.widths[l]);
    const Operand& to = memory.activations[l];
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (with_tangent_ && l == 0 && mlp_.few_inputs()) {
        pointwise().few_inputs(memory.few_x + rows * kPadding, kPadding, shape_.inputs, mlp_.first_columns() + column,
                               width, rows, columns, memory.panel, kPanel);
      } else if (with_tangent_) {
        const Operand& below = l == 0 ? memory.input : memory.activations[l - 1];
        multiply(mlp_.products(), rows, columns, mlp_.depth_of_product(shape_.in(l)), below.from_row(rows),
                 mlp_.forward(l), column, memory.panel, kPanel);
      }
      const Rows z = pre_activations_[l].from_row(row).from(column);
      pointwise().recall[p_](z, shape_.widths[l] - column, with_tangent_ ? memory.panel : nullptr, kPanel, rows, columns,
                             to.from(column), with_tangent_ ? to.from_row(rows).from(column) : Operand{},
                             memory.slopes[l].from(column), with_tangent_ ? memory.curved[l] + column : nullptr, width);
    }
  }

  // zbar_l and delta_l from those of the layer above, and what they give: dW_l, db_l.
  void downwards(int64_t row, int64_t rows, int64_t l, bool first, Memory& memory, Sums& sums) const {
    const int64_t width = padded(shape_.widths[l]);
    const Operand bars = with_ld(memory.bars[l % 2], width);
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (l + 1 == shape_.depth()) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            const float w = mlp_.head()[column + c];
            memory.panel[r * kPanel + c] = memory.cotangent[r] * w;
            if (with_tangent_) memory.panel[(rows + r) * kPanel + c] = w;
          }
        }
      } else {
        multiply(mlp_.products(), stacked(rows), columns, mlp_.depth_of_product(shape_.widths[l + 1]),
                 with_ld(memory.bars[(l + 1) % 2], padded(shape_.widths[l + 1])), mlp_.backward(l + 1), column,
                 memory.panel, kPanel);
      }
      pointwise().reverse[p_](memory.panel, with_tangent_ ? memory.panel + rows * kPanel : nullptr, kPanel,
                              memory.slopes[l].from(column), with_tangent_ ? memory.curved[l] + column : nullptr, width,
                              rows, columns, bars.from(column),
                              with_tangent_ ? bars.from_row(rows).from(column) : Operand{}, sums.biases[l] + column);
    }
    if (l == 0 && gradients_.first_bias.data != nullptr && gradients_.first_bias.stride != 0) {
      for (int64_t column = 0; column < width; column += kPanel) keep_rows(bars, row, rows, column, memory);
    }
    if (gradients_.weights[l].data == nullptr) return;
    const int64_t depth = stacked(rows), in = shape_.in(l);
    if (l == 0 && mlp_.few_inputs()) {
      if (first) std::fill(sums.weights[0], sums.weights[0] + in * width, 0.0f);
      pointwise().few_inputs_gradient[p_](bars, memory.few_x, kPadding, in, depth, width, sums.weights[0], width);
      return;
    }
    const Operand& below = l == 0 ? memory.input : memory.activations[l - 1];
    const Operand left = turned_left(mlp_.products(), bars, depth, shape_.widths[l], memory.turned, memory.pairs);
    const PackedMatrix right = paired(mlp_.products(), below, depth, padded(in), memory.right);
    multiply(mlp_.products(), shape_.widths[l], padded(in), mlp_.depth_of_product(depth), left, right, 0,
             sums.weights[l], padded(in), !first);
  }

  static Operand with_ld(Operand operand, int64_t ld) {
    operand.ld = ld;
    return operand;
  }

  // zbar_1 as the gradient of a first bias with one row per sample.
  void keep_rows(const Operand& zbar, int64_t row, int64_t rows, int64_t column, Memory& memory) const {
    const int64_t columns = std::min(kPanel, shape_.widths[0] - column);
    if (columns <= 0) return;
    Rows from;
    from.stride = zbar.ld;
    for (int part = 0; part < 2; ++part) {
      from.dtype = zbar.f32 != nullptr ? Dtype::f32 : Dtype::bf16;
      from.data = zbar.f32 != nullptr ? static_cast<void*>(zbar.f32 + column)
                                      : static_cast<void*>((part == 0 ? zbar.high : zbar.low) + column);
      if (part == 1 && zbar.low == nullptr) break;
      if (part == 0) {
        pointwise().load_float(from, rows, columns, padded(columns), memory.panel, kPanel);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        float low[kPanel];
        pointwise().load_float(from.from_row(r), 1, columns, padded(columns), low, kPanel);
        for (int64_t c = 0; c < columns; ++c) memory.panel[r * kPanel + c] += low[c];
      }
    }
    const Rows to = gradients_.first_bias.from_row(row).from(column);
    pointwise().store(memory.panel, kPanel, rows, columns, to);
  }

  void input_gradients(int64_t row, int64_t rows, Memory& memory) const {
    const Operand zbar = with_ld(memory.bars[0], padded(shape_.widths[0]));
    for (int64_t column = 0; column < shape_.inputs; column += kPanel) {
      const int64_t columns = std::min(kPanel, shape_.inputs - column);
      input_gradient(mlp_, zbar, rows, column, column + columns, memory.panel, kPanel);
      const Rows to = gradients_.x.from_row(row).from(column);
      pointwise().store(memory.panel, kPanel, rows, columns, to);
    }
  }

  const MlpCall& call_;
  const PackedMlp& mlp_;
  const MlpShape& shape_;
  const Rows &value_cotangent_, &gradient_cotangent_;
  const std::vector<Rows>& pre_activations_;
  const MlpGradients& gradients_;
  bool with_tangent_;
  int p_;
};

// Adds the sums of all threads to the first one's and stores them.
void finish(const MlpShape& shape, std::vector<Sums>& sums, const MlpGradients& gradients) {
  const auto total = [&](auto&& pick, int64_t count) {
    float* result = pick(sums[0]);
    for (size_t t = 1; t < sums.size(); ++t) {
      const float* other = pick(sums[t]);
      at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) result[i] += other[i];
      });
    }
    return result;
  };
  for (int64_t l = 0; l < shape.depth(); ++l) {
    const Rows& to = gradients.weights[l];
    if (to.data != nullptr) {
      const int64_t in = shape.in(l), out = shape.widths[l];
      if (l == 0 && in <= kFew) {
        const float* columns = total([&](Sums& s) { return s.weights[0]; }, in * padded(out));
        std::vector<float> rows(static_cast<size_t>(out * kPadding), 0.0f);
        for (int64_t d = 0; d < in; ++d) {
          for (int64_t r = 0; r < out; ++r) rows[r * kPadding + d] = columns[d * padded(out) + r];
        }
        pointwise().store(rows.data(), kPadding, out, in, to);
      } else {
        const float* sum = total([&](Sums& s) { return s.weights[l]; }, out * padded(in));
        pointwise().store(sum, padded(in), out, in, to);
      }
    }
    const float* sum = total([&](Sums& s) { return s.biases[l]; }, padded(shape.widths[l]));
    const Rows* bias = l == 0 ? &gradients.first_bias : &gradients.biases[l - 1];
    if (bias->data != nullptr && (l > 0 || bias->stride == 0)) pointwise().store(sum, 0, 1, shape.widths[l], *bias);
  }
  const float* head = total([](Sums& s) { return s.head; }, padded(shape.widths.back()));
  if (gradients.weights.back().data != nullptr) pointwise().store(head, 0, 1, shape.widths.back(), gradients.weights.back());
  float head_bias[kPadding] = {*total([](Sums& s) { return s.head_bias; }, 1)};
  if (gradients.biases.back().data != nullptr) pointwise().store(head_bias, 0, 1, 1, gradients.biases.back());
}

}  // namespace

void mlp_backward(const MlpCall& call, const Rows& value_cotangent, const Rows& gradient_cotangent,
                  const std::vector<Rows>& pre_activations, const MlpGradients& gradients) {
  const MlpShape& shape = call.shape;
  const Products products = products_for(call.x.dtype, call.split);
  const bool with_tangent = gradient_cotangent.data != nullptr;
  const PackedMlp mlp(shape, products, call.weights, call.biases, true, kAlwaysPack, 0);
  const int64_t rows_per_block = block_rows(shape, std::max<int64_t>(call.batch, 1), with_tangent);
  const int64_t blocks = (call.batch + rows_per_block - 1) / rows_per_block;
  const int64_t threads = std::clamp<int64_t>(blocks, 1, at::get_num_threads());
  Arena count(nullptr);
  for (int64_t t = 0; t < threads; ++t) Sums(shape, count);
  thread_local Scratch sums_scratch;
  Arena arena(sums_scratch.reserve(count.used()));
  std::vector<Sums> sums;
  for (int64_t t = 0; t < threads; ++t) sums.emplace_back(shape, arena);
  const Backward backward(call, mlp, value_cotangent, gradient_cotangent, pre_activations, gradients);
  // A fixed share of blocks per thread, so that repeated runs add in the same order.
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Arena needed(nullptr);
    Memory(shape, products, rows_per_block, with_tangent, needed);
    Arena own(scratch.reserve(needed.used()));
    Memory memory(shape, products, rows_per_block, with_tangent, own);
    for (int64_t t = begin; t < end; ++t) {
      std::fill_n(reinterpret_cast<unsigned char*>(sums[t].biases[0]), sums[t].small_bytes, static_cast<unsigned char>(0));
      const int64_t from = blocks * t / threads, to = blocks * (t + 1) / threads;
      if (from == to) {  // An empty batch: gradients are zero.
        for (int64_t l = 0; l < shape.depth(); ++l) {
          const bool few = l == 0 && mlp.few_inputs();
          const int64_t size = few ? shape.inputs * padded(shape.widths[0]) : shape.widths[l] * padded(shape.in(l));
          std::fill_n(sums[t].weights[l], size, 0.0f);
        }
      }
      for (int64_t index = from; index < to; ++index) {
        const int64_t row = index * rows_per_block;
        backward.block(row, std::min(rows_per_block, call.batch - row), index == from, memory, sums[t]);
      }
    }
    release_products(products);
  });
  finish(shape, sums, gradients);
}

}  // namespace tgdp
