#include "mlp_backward.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {
namespace {

// Rows of a block, such that its activations, slopes and tangents stay in an L2 cache of about 1 MiB.
int64_t block_rows(const MlpShape& shape, int64_t batch, bool with_tangent) {
  int64_t width = 0;
  for (int64_t w : shape.widths) width += padded(w);
  const int64_t bytes_per_row = width * (with_tangent ? 16 : 8);
  const int64_t fitting = std::clamp<int64_t>((int64_t{1} << 20) / bytes_per_row / 16 * 16, 16, 128);
  const int64_t share = (batch + at::get_num_threads() - 1) / at::get_num_threads();
  return std::min(fitting, rounded_rows(std::max<int64_t>(share, 1)));
}

// What one thread sums over its blocks, per layer and, last, for the head.
struct Sums {
  Sums(const MlpShape& shape, Arena& arena) : size(arena.used()) {
    for (int64_t l = 0; l <= shape.depth(); ++l) {
      // Few inputs: as columns [inputs, padded H_1].
      const bool few = l == 0 && shape.inputs <= kFew;
      weights.push_back(arena.take<float>(few ? shape.inputs * padded(shape.widths[0])
                                              : shape.out(l) * padded(shape.in(l))));
    }
    for (int64_t l = 0; l <= shape.depth(); ++l) biases.push_back(arena.take<float>(padded(shape.out(l))));
    size = arena.used() - size;
  }
  void clear() const { std::fill_n(reinterpret_cast<unsigned char*>(weights[0]), size, static_cast<unsigned char>(0)); }

  std::vector<float*> weights, biases;
  int64_t size;  // bytes of all, which are contiguous
};

// Working memory of one thread. Operands hold a block's rows, then, with a tangent, as many rows of the tangent.
struct Memory {
  Memory(const MlpShape& shape, Precision precision, int64_t rows, bool with_tangent, Arena& arena) {
    const int64_t stacked = rows * (with_tangent ? 2 : 1);
    int64_t widest = std::max(shape.widest(), padded(shape.outputs));
    if (shape.inputs <= kFew) {
      few_x = {arena.take<float>(stacked * kPadding), kPadding};
    } else {
      input = arena.take_operand(precision, stacked, padded(shape.inputs));
      widest = std::max(widest, padded(shape.inputs));
    }
    if (shape.outputs <= kFew) {
      few_cotangents = {arena.take<float>(stacked * kPadding), kPadding};
    } else {
      cotangents = arena.take_operand(precision, rows, padded(shape.outputs));
    }
    line = {arena.take<float>(padded(shape.outputs)), padded(shape.outputs)};
    totals = arena.take<double>(shape.outputs);
    for (int64_t l = 0; l < shape.depth(); ++l) {
      const int64_t width = padded(shape.widths[l]);
      activations.push_back(arena.take_operand(precision, stacked, width));
      // In float also for bf16: they multiply sums of two terms that may cancel.
      slopes.push_back(arena.take_slopes(Precision::f32, rows, width));
      curved.push_back({with_tangent ? arena.take<float>(rows * width) : nullptr, width});
    }
    for (Operand& operand : bars) operand = arena.take_operand(precision, stacked, shape.widest());
    panels.push_back({arena.take<float>(stacked * kPanel), nullptr});
    transposed = arena.take<unsigned char>(packed_bytes(precision, stacked, widest));
    pairs = arena.take<unsigned char>(packed_bytes(precision, stacked, widest));
    right = arena.take<unsigned char>(packed_bytes(precision, stacked, widest));
  }
  Floats few_x;
  Operand input;
  // Of the outputs, then, with a tangent, rows of ones: the head's gradient is their product with activations and
  // tangents. Few outputs are in float.
  Floats few_cotangents;
  Operand cotangents;
  Floats line;
  double* totals;
  std::vector<Operand> activations;
  std::vector<Slopes> slopes;
  std::vector<Floats> curved;
  Operand bars[2];
  std::vector<Panel> panels;
  unsigned char *transposed, *pairs, *right;
};

class Backward {
 public:
  Backward(const MlpCall& call, const PackedMlp& mlp, const Rows& output_cotangent, const Rows& gradient_cotangent,
           const std::vector<Rows>& pre_activations, const MlpGradients& gradients)
      : call_(call), mlp_(mlp), shape_(mlp.shape()), output_cotangent_(output_cotangent),
        gradient_cotangent_(gradient_cotangent), pre_activations_(pre_activations), gradients_(gradients),
        with_tangent_(gradient_cotangent.data != nullptr), precision_(mlp.precision()) {}

  // Adds the block of rows [row, row + rows) to the sums.
  void block(int64_t row, int64_t rows, Memory& memory, const Sums& sums) const {
    load_cotangents(row, rows, memory, sums);
    load_inputs(call_.x.from_row(row), 0, rows, memory);
    if (with_tangent_) load_inputs(gradient_cotangent_.from_row(row), rows, rows, memory);
    for (int64_t l = 0; l < shape_.depth(); ++l) forward(row, rows, l, memory);
    head(rows, memory, sums);
    for (int64_t l = shape_.depth() - 1; l >= lowest(); --l) backward(row, rows, l, memory, sums);
    if (gradients_.x.data != nullptr) {
      const Operand zbar = with_ld(memory.bars[0], padded(shape_.widths[0]));
      input_gradient(mlp_, memory.panels, zbar, rows, {rows, gradients_.x.from_row(row)});
    }
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

  // Inputs in float where they are few.
  void load_inputs(const Rows& from, int64_t first, int64_t rows, Memory& memory) const {
    if (mlp_.few_inputs()) {
      pointwise().load_float(from, rows, shape_.inputs, {memory.few_x.row(first), kPadding});
    } else {
      pointwise().load[precision_](from, rows, shape_.inputs, memory.input.from_row(first));
    }
  }

  void load_cotangents(int64_t row, int64_t rows, Memory& memory, const Sums& sums) const {
    const int64_t size = shape_.outputs;
    const bool zeros = output_cotangent_.data == nullptr;
    const Rows from = zeros ? output_cotangent_ : output_cotangent_.from_row(row);
    // Width 0 reads nothing and gives zeros.
    const int64_t present = zeros ? 0 : size;
    if (mlp_.few_outputs()) {
      pointwise().load_float(from, rows, present, memory.few_cotangents);
      if (with_tangent_) {
        const Floats ones{memory.few_cotangents.row(rows), kPadding};
        std::fill_n(ones.data, rows * kPadding, 0.0f);
        for (int64_t r = 0; r < rows; ++r) ones.row(r)[0] = 1.0f;
      }
    } else {
      pointwise().load[precision_](from, rows, present, memory.cotangents);
    }
    if (gradients_.biases.back().data == nullptr || zeros) return;
    std::fill_n(memory.totals, size, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      pointwise().load_float(from.from_row(r), 1, size, memory.line);
      for (int64_t c = 0; c < size; ++c) memory.totals[c] += memory.line.data[c];
    }
    for (int64_t c = 0; c < size; ++c) sums.biases.back()[c] += static_cast<float>(memory.totals[c]);
  }

  // a_l, silu'(z_l) and, with a tangent, v_l = W_l u_l-1, u_l and silu''(z_l) v_l.
  void forward(int64_t row, int64_t rows, int64_t l, Memory& memory) const {
    const int64_t width = padded(shape_.widths[l]);
    const Operand& to = memory.activations[l];
    const Rows z = pre_activations_[l].from_row(row);
    if (!with_tangent_) {
      pointwise().recall[precision_](z, shape_.widths[l], {}, rows, width, to, {}, memory.slopes[l], {});
      return;
    }
    const Floats panel = memory.panels[0].z();
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (l == 0 && mlp_.few_inputs()) {
        pointwise().few_inputs({memory.few_x.row(rows), kPadding}, shape_.inputs, mlp_.first_columns().from(column),
                               rows, columns, panel);
      } else {
        const Operand& below = l == 0 ? memory.input : memory.activations[l - 1];
        matmul(precision_, rows, columns, mlp_.matmul_depth(shape_.in(l)), below.from_row(rows), mlp_.forward(l),
               column, panel.data, panel.ld);
      }
      pointwise().recall[precision_](z.from(column), shape_.widths[l] - column, panel, rows, columns, to.from(column),
                                     to.from_row(rows).from(column), memory.slopes[l].from(column),
                                     memory.curved[l].from(column));
    }
  }

  // Sums of the head's weights.
  void head(int64_t rows, Memory& memory, const Sums& sums) const {
    if (gradients_.weights.back().data == nullptr) return;
    const Operand& top = memory.activations.back();
    const int64_t width = padded(shape_.widths.back());
    if (mlp_.few_outputs()) {
      pointwise().few_inputs_gradient[precision_](top, memory.few_cotangents, shape_.outputs, stacked(rows), width,
                                                  {sums.weights.back(), width});
    } else {
      add_outer(memory.cotangents, shape_.outputs, top, width, rows, memory, sums.weights.back());
    }
  }

  // sum [out, padded in] += above^T below over `depth` rows.
  void add_outer(const Operand& above, int64_t out, const Operand& below, int64_t in, int64_t depth, Memory& memory,
                 float* sum) const {
    const Operand left = transposed_left(precision_, above, depth, out, memory.transposed, memory.pairs);
    const PackedMatrix right = paired(precision_, below, depth, in, memory.right);
    matmul(precision_, out, in, mlp_.matmul_depth(depth), left, right, 0, sum, in, true);
  }

  // zbar_l and delta_l from those of the layer above, and what they give: dW_l, db_l.
  void backward(int64_t row, int64_t rows, int64_t l, Memory& memory, const Sums& sums) const {
    const int64_t width = padded(shape_.widths[l]);
    const Operand bars = with_ld(memory.bars[l % 2], width);
    const bool top = l + 1 == shape_.depth();
    const Operand above = top ? memory.cotangents : with_ld(memory.bars[(l + 1) % 2], padded(shape_.out(l + 1)));
    const Floats panel = memory.panels[0].z();
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (top && mlp_.few_outputs()) {
        pointwise().few_inputs(memory.few_cotangents, shape_.outputs, mlp_.head().from(column), stacked(rows), columns,
                               panel);
      } else {
        matmul(precision_, stacked(rows), columns, mlp_.matmul_depth(shape_.out(l + 1)), above, mlp_.backward(l + 1),
               column, panel.data, panel.ld);
      }
      Floats eta;
      Operand delta;
      if (with_tangent_) {
        eta = {panel.row(rows), panel.ld};
        delta = bars.from_row(rows).from(column);
      }
      pointwise().reverse[precision_](panel, eta, memory.slopes[l].from(column), memory.curved[l].from(column), rows,
                                      columns, bars.from(column), delta, sums.biases[l] + column);
    }
    if (l == 0 && gradients_.first_bias.data != nullptr && gradients_.first_bias.stride != 0) {
      store_first_bias(bars, row, rows, panel);
    }
    if (gradients_.weights[l].data == nullptr) return;
    const int64_t depth = stacked(rows), in = shape_.in(l);
    if (l == 0 && mlp_.few_inputs()) {
      pointwise().few_inputs_gradient[precision_](bars, memory.few_x, in, depth, width, {sums.weights[0], width});
    } else {
      const Operand& below = l == 0 ? memory.input : memory.activations[l - 1];
      add_outer(bars, shape_.widths[l], below, padded(in), depth, memory, sums.weights[l]);
    }
  }

  static Operand with_ld(Operand operand, int64_t ld) {
    operand.ld = ld;
    return operand;
  }

  // zbar_1 as the gradient of a first bias with one row per sample.
  void store_first_bias(const Operand& zbar, int64_t row, int64_t rows, Floats panel) const {
    const int64_t width = shape_.widths[0];
    const Rows to = gradients_.first_bias.from_row(row);
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      pointwise().unload[precision_](zbar.from(column), rows, padded(columns), panel);
      pointwise().store(panel, rows, columns, to.from(column));
    }
  }

  const MlpCall& call_;
  const PackedMlp& mlp_;
  const MlpShape& shape_;
  const Rows &output_cotangent_, &gradient_cotangent_;
  const std::vector<Rows>& pre_activations_;
  const MlpGradients& gradients_;
  bool with_tangent_;
  Precision precision_;
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
  for (int64_t l = 0; l <= shape.depth(); ++l) {
    const int64_t in = shape.in(l), out = shape.out(l);
    const Rows& to = gradients.weights[l];
    if (to.data != nullptr && l == 0 && in <= kFew) {
      const float* columns = total([&](Sums& s) { return s.weights[0]; }, in * padded(out));
      std::vector<float> rows(static_cast<size_t>(out * kPadding), 0.0f);
      for (int64_t d = 0; d < in; ++d) {
        for (int64_t r = 0; r < out; ++r) rows[r * kPadding + d] = columns[d * padded(out) + r];
      }
      pointwise().store({rows.data(), kPadding}, out, in, to);
    } else if (to.data != nullptr) {
      pointwise().store({total([&](Sums& s) { return s.weights[l]; }, out * padded(in)), padded(in)}, out, in, to);
    }
    const Rows& bias = l == 0 ? gradients.first_bias : gradients.biases[l - 1];
    if (bias.data == nullptr || (l == 0 && bias.stride != 0)) continue;
    pointwise().store({total([&](Sums& s) { return s.biases[l]; }, padded(out)), 0}, 1, out, bias);
  }
}

}  // namespace

void mlp_backward(const MlpCall& call, const Rows& output_cotangent, const Rows& gradient_cotangent,
                  const std::vector<Rows>& pre_activations, const MlpGradients& gradients) {
  const MlpShape& shape = call.shape;
  const Precision precision = matmul_precision(call.x.dtype, call.bf16x3);
  const bool with_tangent = gradient_cotangent.data != nullptr;
  const PackedMlp mlp(shape, precision, call.weights, call.biases, true, kAlwaysPack, 0);
  const int64_t rows_per_block = block_rows(shape, std::max<int64_t>(call.batch, 1), with_tangent);
  const int64_t blocks = (call.batch + rows_per_block - 1) / rows_per_block;
  const int64_t threads = std::clamp<int64_t>(blocks, 1, at::get_num_threads());
  Arena count(nullptr);
  for (int64_t t = 0; t < threads; ++t) Sums(shape, count);
  thread_local Scratch sums_scratch;
  Arena arena(sums_scratch.reserve(count.used()));
  std::vector<Sums> sums;
  for (int64_t t = 0; t < threads; ++t) sums.emplace_back(shape, arena);
  const Backward backward(call, mlp, output_cotangent, gradient_cotangent, pre_activations, gradients);
  // A fixed share of blocks per thread, so that repeated runs add in the same order.
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto memory = laid_out<Memory>(scratch, shape, precision, rows_per_block, with_tangent);
    for (int64_t t = begin; t < end; ++t) {
      sums[t].clear();
      for (int64_t index = blocks * t / threads; index < blocks * (t + 1) / threads; ++index) {
        const int64_t row = index * rows_per_block;
        backward.block(row, std::min(rows_per_block, call.batch - row), memory, sums[t]);
      }
    }
    release_matmul(precision);
  });
  finish(shape, sums, gradients);
}

}  // namespace tgdp
