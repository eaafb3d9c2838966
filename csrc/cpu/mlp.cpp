#include "mlp.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {

int64_t MlpShape::widest() const { return padded(*std::max_element(widths.begin(), widths.end())); }

PackedMlp::PackedMlp(const MlpShape& shape, Products products, const std::vector<Rows>& weights,
                     const std::vector<Rows>& biases, bool with_gradient, int64_t rows, int slot)
    : shape_(shape), products_(rows <= kTinyRows ? Products::f32 : products), tiny_(rows <= kTinyRows), weights_(weights),
      forward_(shape.depth() + 1), backward_(shape.depth() + 1), left_(shape.depth() + 1),
      biases_(shape.depth() + 1, nullptr) {
  const int64_t depth = shape.depth();
  struct Job {
    int64_t layer, in, out;
    unsigned char *transposed, *plain;
  };
  std::vector<Job> jobs;
  thread_local Scratch scratch[2];
  unsigned char* memory = nullptr;
  // The first pass counts, the second lays out.
  for (int pass = 0; pass < 2; ++pass) {
    Arena arena(memory);
    jobs.clear();
    for (int64_t l = 0; l <= depth; ++l) {
      const int64_t in = l < depth ? shape.in(l) : shape.widths.back(), out = l < depth ? shape.widths[l] : shape.outputs;
      const Rows& weight = weights[l];
      const bool few = l == 0 ? few_inputs() : l == depth && shape.outputs <= kFew;
      const bool as_is = weight.dtype == (products == Products::bf16 ? Dtype::bf16 : Dtype::f32) &&
                         products != Products::bf16x3 && weight.stride >= in;
      Job job{l, in, out, nullptr, nullptr};
      bool packs = false;
      if (few) {
        // The rows of a small head, or the columns of a small first layer, in float.
        auto* small = arena.take<float>(kFew * padded(l == 0 ? out : in));
        if (memory != nullptr) small_layer(weight, l == 0, in, out, small);
        (l == 0 ? first_columns_ : head_) = small;
      } else if (!tiny_) {
        // Packing costs about a nanosecond per weight; without it each row's input and output of the layer are
        // transposed, at a quarter of that per number.
        const bool few_rows = rows / 4 <= in * out / (in + out);
        if (few_rows && as_is && in % 2 == 0) {
          auto* data = weight.data;
          if (products == Products::f32) left_[l].f32 = static_cast<float*>(data);
          if (products == Products::bf16) left_[l].high = static_cast<uint16_t*>(data);
          left_[l].ld = weight.stride;
        } else {
          job.transposed = arena.take<unsigned char>(packed_bytes(products, in, out));
          packs = true;
        }
        if (with_gradient && l < depth) {
          if (as_is && products == Products::f32 && in % kPadding == 0 && out % kPadding == 0) {
            backward_[l].f32 = static_cast<const float*>(weight.data);
            backward_[l].ld = weight.stride;
          } else {
            job.plain = arena.take<unsigned char>(packed_bytes(products, out, in));
            packs = true;
          }
        }
      }
      if (packs) jobs.push_back(job);
      if (job.transposed != nullptr) forward_[l] = packed_view(products, in, out, job.transposed);
      if (job.plain != nullptr) backward_[l] = packed_view(products, out, in, job.plain);
      if (l == 0) continue;
      auto* bias = arena.take<float>(padded(out));
      if (memory != nullptr) pointwise().load_float(biases[l - 1], 1, out, padded(out), bias, padded(out));
      biases_[l] = bias;
    }
    if (memory == nullptr) memory = scratch[slot].reserve(arena.used());
  }
  // Tasks of kPackedRows rows, numbered through all matrices.
  std::vector<int64_t> first(1, 0);
  for (const Job& job : jobs) first.push_back(first.back() + (padded(job.out) + kPackedRows - 1) / kPackedRows);
  at::parallel_for(0, first.back(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const auto which = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      const Job& job = jobs[which];
      pack_rows(products, weights[job.layer], job.out, job.in, (task - first[which]) * kPackedRows, job.transposed,
                job.plain);
    }
  });
}

void PackedMlp::small_layer(const Rows& weight, bool columns, int64_t in, int64_t out, float* to) {
  if (!columns) {
    pointwise().load_float(weight, out, in, padded(in), to, padded(in));
    return;
  }
  float row[kPadding];
  const int64_t ld = padded(out);
  std::fill(to, to + in * ld, 0.0f);
  for (int64_t r = 0; r < out; ++r) {
    pointwise().load_float(weight.from_row(r), 1, in, kPadding, row, kPadding);
    for (int64_t d = 0; d < in; ++d) to[d * ld + r] = row[d];
  }
}

MlpBlock::MlpBlock(const MlpShape& shape, Products products, int64_t rows, bool with_gradient, Arena& arena) {
  const int64_t ld = shape.widest();
  panel = arena.take<float>(rows * kPanel);
  if (shape.inputs > kFew) input = arena.take_operand(products, rows, padded(shape.inputs));
  a = arena.take_operand(products, rows, ld);
  b = arena.take_operand(products, rows, ld);
  turned = arena.take<unsigned char>(packed_bytes(products, std::max(ld, padded(shape.inputs)), rows));
  left_panel = arena.take<float>(kPanel * padded(rows));
  for (int64_t l = 0; with_gradient && l + 1 < shape.depth(); ++l) slopes.push_back(arena.take_slopes(products, rows, ld));
}

namespace {

// Calls body(first column, columns) with z = a_l-1 W_l^T of these columns in block.panel, without its bias.
template <typename Body>
void layer_panels(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t layer,
                  const Operand& below, Body body) {
  const MlpShape& shape = mlp.shape();
  const int64_t width = padded(shape.widths[layer]), depth = mlp.depth_of_product(shape.in(layer));
  const bool few = layer == 0 && mlp.few_inputs();
  const Operand& left = mlp.left(layer);
  PackedMatrix right;
  if (!few && left.ld != 0) right = transposed(mlp.products(), below, rows, depth, block.turned);
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t columns = std::min(kPanel, width - column);
    if (few) {
      pointwise().few_inputs(input.few_x, kPadding, shape.inputs, mlp.first_columns() + column, width, rows, columns,
                             block.panel, kPanel);
    } else if (mlp.tiny()) {
      const Rows weight = mlp.weight(layer).from_row(column);
      const int64_t present = std::min(columns, shape.widths[layer] - column);
      pointwise().dot_rows(weight, present, shape.in(layer), below.f32, below.ld, rows, block.panel, kPanel);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(block.panel + r * kPanel + present, columns - present, 0.0f);
    } else if (left.ld != 0) {
      // z^T = W a^T, for which W is used as it lies in memory.
      const int64_t present = std::min(columns, shape.widths[layer] - column);
      multiply(mlp.products(), present, rows, depth, left.from_row(column), right, 0, block.left_panel, right.ld);
      std::fill(block.left_panel + present * right.ld, block.left_panel + columns * right.ld, 0.0f);
      pointwise().transpose(reinterpret_cast<const uint32_t*>(block.left_panel), right.ld, columns, rows,
                            reinterpret_cast<uint32_t*>(block.panel), kPanel);
    } else {
      multiply(mlp.products(), rows, columns, depth, below, mlp.forward(layer), column, block.panel, kPanel);
    }
    body(column, columns);
  }
}

// Columns [column, column + columns) of delta W_l from the weight as it lies in memory.
void combine(const PackedMlp& mlp, int64_t layer, const Operand& delta, int64_t rows, int64_t column, int64_t columns,
             float* out, int64_t ld) {
  const Rows weight = mlp.weight(layer).from(column);
  pointwise().combine_rows(weight, mlp.shape().widths[layer], columns, delta.f32, delta.ld, rows, out, ld);
}

void keep_panel(const KeepPreActivations& keep, const float* panel, int64_t layer, int64_t column, int64_t width) {
  if (keep.layers.empty()) return;
  const Rows to = keep.layers[layer].from(column);
  pointwise().store(panel, kPanel, keep.rows, std::min(kPanel, width - column), to);
}

// Layers 0 .. end - 1; returns the operand of the last activation, or the input.
Operand activations(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t end,
                    bool with_slopes, const KeepPreActivations& keep) {
  const int p = static_cast<int>(mlp.products());
  Operand below = block.input, to = block.a, other = block.b;
  for (int64_t l = 0; l < end; ++l) {
    const float* bias = l == 0 ? input.bias : mlp.bias(l);
    const int64_t bias_stride = l == 0 ? input.bias_stride : 0;
    layer_panels(mlp, block, rows, input, l, below, [&](int64_t column, int64_t columns) {
      const Slopes slopes = with_slopes ? block.slopes[l].from(column) : Slopes{};
      pointwise().activate[p](block.panel, kPanel, bias + column, bias_stride, rows, columns, to.from(column), slopes,
                              !keep.layers.empty());
      keep_panel(keep, block.panel, l, column, mlp.shape().widths[l]);
    });
    below = to;
    std::swap(to, other);
  }
  return below;
}

}  // namespace

Operand value_and_delta(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, bool with_gradient,
                        float* value, const KeepPreActivations& keep) {
  const MlpShape& shape = mlp.shape();
  const int64_t last = shape.depth() - 1;
  const int p = static_cast<int>(mlp.products());
  const Operand below = activations(mlp, block, rows, input, last, with_gradient, keep);
  // The operand that the last hidden layer does not read.
  Operand delta = last % 2 == 0 ? block.a : block.b, other = last % 2 == 0 ? block.b : block.a;
  if (!with_gradient) delta.ld = 0;
  const float* bias = last == 0 ? input.bias : mlp.bias(last);
  std::fill(value, value + rows, mlp.bias(shape.depth())[0]);
  layer_panels(mlp, block, rows, input, last, below, [&](int64_t column, int64_t columns) {
    pointwise().head[p](block.panel, kPanel, bias + column, last == 0 ? input.bias_stride : 0, mlp.head() + column, rows,
                        columns, value, delta.from(column), !keep.layers.empty());
    keep_panel(keep, block.panel, last, column, shape.widths[last]);
  });
  if (!with_gradient) return delta;
  for (int64_t l = last; l > 0; --l) {
    const int64_t width = padded(shape.in(l));
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min(kPanel, width - column);
      if (mlp.tiny()) {
        std::fill_n(block.panel, rows * kPanel, 0.0f);  // the padding, which may lie beyond the last whole vector
        combine(mlp, l, delta, rows, column, std::min(columns, shape.in(l) - column), block.panel, kPanel);
      } else {
        multiply(mlp.products(), rows, columns, mlp.depth_of_product(shape.widths[l]), delta, mlp.backward(l), column,
                 block.panel, kPanel);
      }
      pointwise().scale[p](block.slopes[l - 1].from(column), block.panel, kPanel, rows, columns, other.from(column));
    }
    std::swap(delta, other);
  }
  return delta;
}

void input_gradient(const PackedMlp& mlp, const Operand& delta, int64_t rows, int64_t begin, int64_t end,
                    float* gradient, int64_t ld) {
  const MlpShape& shape = mlp.shape();
  const int64_t width = padded(shape.widths[0]);
  if (mlp.few_inputs()) {
    pointwise().few_outputs[static_cast<int>(mlp.products())](delta, shape.inputs, mlp.first_columns(), rows, width,
                                                              gradient, ld);
    return;
  }
  if (mlp.tiny()) {
    for (int64_t column = begin; column < end; column += kPanel) {
      // By way of a panel: whole vectors are written, and the gradient's rows may end before.
      float panel[kTinyRows * kPanel];
      const int64_t columns = std::min(kPanel, end - column);
      combine(mlp, 0, delta, rows, column, columns, panel, kPanel);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(panel + r * kPanel, columns, gradient + r * ld + column - begin);
    }
    return;
  }
  multiply(mlp.products(), rows, end - begin, mlp.depth_of_product(shape.widths[0]), delta, mlp.backward(0), begin, gradient,
           ld);
}

void outputs(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, float* output, int64_t ld) {
  const MlpShape& shape = mlp.shape();
  const int64_t width = padded(shape.widths.back());
  const Operand a = activations(mlp, block, rows, input, shape.depth(), false, {});
  if (shape.outputs <= kFew) {
    pointwise().few_outputs[static_cast<int>(mlp.products())](a, shape.outputs, mlp.head(), rows, width, output, ld);
  } else {
    multiply(mlp.products(), rows, shape.outputs, mlp.depth_of_product(shape.widths.back()), a,
             mlp.forward(shape.depth()), 0, output, ld);
  }
  const float* bias = mlp.bias(shape.depth());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < shape.outputs; ++c) output[r * ld + c] += bias[c];
  }
}

int64_t rounded_rows(int64_t rows) {
  if (rows <= 4) return rows;
  return rows <= 16 ? (rows + 3) / 4 * 4 : (rows + 15) / 16 * 16;
}

}  // namespace tgdp
