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
      const int64_t in = shape.in(l), out = shape.out(l);
      const Rows& weight = weights[l];
      const bool few = l == 0 ? few_inputs() : l == depth && few_outputs();
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
        if (with_gradient) {
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

namespace {

int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

}  // namespace

MlpBlock::MlpBlock(const MlpShape& shape, Products products, int64_t rows, bool with_gradient, int64_t workers,
                   Arena& arena) {
  const int64_t ld = shape.widest();
  for (int64_t w = 0; w < workers; ++w) {
    float* z = arena.take<float>(rows * kPanel);
    panels.push_back({z, arena.take<float>(kPanel * padded(rows))});
  }
  if (shape.inputs > kFew) input = arena.take_operand(products, rows, padded(shape.inputs));
  a = arena.take_operand(products, rows, ld);
  b = arena.take_operand(products, rows, ld);
  turned = arena.take<unsigned char>(packed_bytes(products, std::max(ld, padded(shape.inputs)), rows));
  part = arena.take<float>(panels_of(shape.widths.back()) * rows);
  for (int64_t l = 0; with_gradient && l + 1 < shape.depth(); ++l) slopes.push_back(arena.take_slopes(products, rows, ld));
}

namespace {

// Multiplications that take about as long (10 us) as waking a thread and waiting for it pays for.
constexpr int64_t kWorthAThread = int64_t{1} << 19;

// Calls body(first column, columns, panel) for all panels of a width, in the threads of the workers; `work`: how many
// multiplications a column takes.
template <typename Body>
void for_panels(const PackedMlp& mlp, const std::vector<Panel>& panels, int64_t width, int64_t work, Body body) {
  const auto run = [&](int64_t begin, int64_t end, const Panel& panel) {
    for (int64_t column = begin * kPanel; column < std::min(end * kPanel, width); column += kPanel) {
      body(column, std::min(kPanel, width - column), panel);
    }
  };
  const int64_t count = panels_of(width);
  if (panels.size() == 1) {
    run(0, count, panels[0]);
    return;
  }
  const int64_t least = kWorthAThread / std::max<int64_t>(work * kPanel, 1);
  at::parallel_for(0, count, std::max<int64_t>(least, 1), [&](int64_t begin, int64_t end) {
    run(begin, end, panels[static_cast<size_t>(at::get_thread_num())]);
    release_products(mlp.products());
  });
}

// Calls body(first column, columns, panel) with z = a_l-1 W_l^T of these columns in panel.z, without its bias.
template <typename Body>
void layer_panels(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t layer,
                  const Operand& below, Body body) {
  const MlpShape& shape = mlp.shape();
  const int64_t out = shape.out(layer), width = padded(out), depth = mlp.depth_of_product(shape.in(layer));
  const bool few = layer == 0 && mlp.few_inputs();
  const Operand& left = mlp.left(layer);
  PackedMatrix right;
  if (!few && left.ld != 0) right = transposed(mlp.products(), below, rows, depth, block.turned);
  for_panels(mlp, block.panels, width, rows * depth, [&](int64_t column, int64_t columns, const Panel& panel) {
    const int64_t present = std::min(columns, out - column);
    if (few) {
      pointwise().few_inputs(input.few_x, kPadding, shape.inputs, mlp.first_columns() + column, width, rows, columns,
                             panel.z, kPanel);
    } else if (mlp.tiny()) {
      pointwise().dot_rows(mlp.weight(layer).from_row(column), present, shape.in(layer), below.f32, below.ld, rows,
                           panel.z, kPanel);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(panel.z + r * kPanel + present, columns - present, 0.0f);
    } else if (left.ld != 0) {
      // z^T = W a^T, for which W is used as it lies in memory.
      multiply(mlp.products(), present, rows, depth, left.from_row(column), right, 0, panel.turned, right.ld);
      std::fill(panel.turned + present * right.ld, panel.turned + columns * right.ld, 0.0f);
      pointwise().transpose(reinterpret_cast<const uint32_t*>(panel.turned), right.ld, columns, rows,
                            reinterpret_cast<uint32_t*>(panel.z), kPanel);
    } else {
      multiply(mlp.products(), rows, columns, depth, below, mlp.forward(layer), column, panel.z, kPanel);
    }
    body(column, columns, panel);
  });
}

// Calls body(first column, columns, panel) with these columns of delta W_l in panel.z.
template <typename Body>
void layer_gradient(const PackedMlp& mlp, const std::vector<Panel>& panels, const Operand& delta, int64_t rows,
                    int64_t layer, Body body) {
  const int64_t in = mlp.shape().in(layer), out = mlp.shape().out(layer);
  for_panels(mlp, panels, padded(in), rows * out, [&](int64_t column, int64_t columns, const Panel& panel) {
    if (mlp.tiny()) {
      std::fill_n(panel.z, rows * kPanel, 0.0f);  // the padding, which may lie beyond the last whole vector
      pointwise().combine_rows(mlp.weight(layer).from(column), out, std::min(columns, in - column), delta.f32, delta.ld,
                               rows, panel.z, kPanel);
    } else {
      multiply(mlp.products(), rows, columns, mlp.depth_of_product(out), delta, mlp.backward(layer), column, panel.z,
               kPanel);
    }
    body(column, columns, panel);
  });
}

void keep_panel(const KeepPreActivations& keep, const Panel& panel, int64_t layer, int64_t column, int64_t width) {
  if (keep.layers.empty()) return;
  pointwise().store(panel.z, kPanel, keep.rows, std::min(kPanel, width - column), keep.layers[layer].from(column));
}

// Layers 0 .. end - 1; returns the operand of the last activation, or the input.
Operand activations(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t end,
                    bool with_slopes, const KeepPreActivations& keep) {
  const int p = static_cast<int>(mlp.products());
  Operand below = block.input, to = block.a, other = block.b;
  for (int64_t l = 0; l < end; ++l) {
    const float* bias = l == 0 ? input.bias : mlp.bias(l);
    const int64_t bias_stride = l == 0 ? input.bias_stride : 0;
    layer_panels(mlp, block, rows, input, l, below, [&](int64_t column, int64_t columns, const Panel& panel) {
      const Slopes slopes = with_slopes ? block.slopes[l].from(column) : Slopes{};
      pointwise().activate[p](panel.z, kPanel, bias + column, bias_stride, rows, columns, to.from(column), slopes,
                              !keep.layers.empty());
      keep_panel(keep, panel, l, column, mlp.shape().widths[l]);
    });
    below = to;
    std::swap(to, other);
  }
  return below;
}

}  // namespace

Operand value_and_delta(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, float* value,
                        const KeepPreActivations& keep) {
  const MlpShape& shape = mlp.shape();
  const int64_t last = shape.depth() - 1;
  const int p = static_cast<int>(mlp.products());
  const Operand below = activations(mlp, block, rows, input, last, true, keep);
  // The operand that the last hidden layer does not read.
  Operand delta = last % 2 == 0 ? block.a : block.b, other = last % 2 == 0 ? block.b : block.a;
  const float* bias = last == 0 ? input.bias : mlp.bias(last);
  // Each panel adds to numbers of its own, and these are added up in order: the same whoever works on which.
  const int64_t parts = panels_of(shape.widths[last]) * rows;
  std::fill_n(block.part, parts, 0.0f);
  layer_panels(mlp, block, rows, input, last, below, [&](int64_t column, int64_t columns, const Panel& panel) {
    pointwise().head[p](panel.z, kPanel, bias + column, last == 0 ? input.bias_stride : 0, mlp.head() + column, rows,
                        columns, block.part + column / kPanel * rows, delta.from(column), !keep.layers.empty());
    keep_panel(keep, panel, last, column, shape.widths[last]);
  });
  std::fill(value, value + rows, mlp.bias(shape.depth())[0]);
  for (int64_t i = 0; i < parts; ++i) value[i % rows] += block.part[i];
  for (int64_t l = last; l > 0; --l) {
    layer_gradient(mlp, block.panels, delta, rows, l, [&](int64_t column, int64_t columns, const Panel& panel) {
      pointwise().scale[p](block.slopes[l - 1].from(column), panel.z, kPanel, rows, columns, other.from(column));
    });
    std::swap(delta, other);
  }
  return delta;
}

void input_gradient(const PackedMlp& mlp, const std::vector<Panel>& panels, const Operand& delta, int64_t rows,
                    const FirstRows& to) {
  const int64_t inputs = mlp.shape().inputs;
  if (mlp.few_inputs()) {
    pointwise().few_outputs[static_cast<int>(mlp.products())](delta, inputs, mlp.first_columns(), rows,
                                                              padded(mlp.shape().widths[0]), panels[0].z, kPanel);
    pointwise().store(panels[0].z, kPanel, to.rows, inputs, to.to);
    return;
  }
  layer_gradient(mlp, panels, delta, rows, 0, [&](int64_t column, int64_t columns, const Panel& panel) {
    pointwise().store(panel.z, kPanel, to.rows, std::min(columns, inputs - column), to.to.from(column));
  });
}

void outputs(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, const FirstRows& to,
             const KeepPreActivations& keep) {
  const MlpShape& shape = mlp.shape();
  const Operand a = activations(mlp, block, rows, input, shape.depth(), false, keep);
  const float* bias = mlp.bias(shape.depth());
  const auto finish = [&](int64_t column, int64_t columns, const Panel& panel) {
    const int64_t present = std::min(columns, shape.outputs - column);
    for (int64_t r = 0; r < to.rows; ++r) {
      for (int64_t c = 0; c < present; ++c) panel.z[r * kPanel + c] += bias[column + c];
    }
    pointwise().store(panel.z, kPanel, to.rows, present, to.to.from(column));
  };
  if (mlp.few_outputs()) {
    pointwise().few_outputs[static_cast<int>(mlp.products())](a, shape.outputs, mlp.head(), rows,
                                                              padded(shape.widths.back()), block.panels[0].z, kPanel);
    finish(0, shape.outputs, block.panels[0]);
  } else {
    layer_panels(mlp, block, rows, input, shape.depth(), a, finish);
  }
}

int64_t rounded_rows(int64_t rows) {
  if (rows <= 4) return rows;
  return rows <= 16 ? (rows + 3) / 4 * 4 : (rows + 15) / 16 * 16;
}

}  // namespace tgdp
