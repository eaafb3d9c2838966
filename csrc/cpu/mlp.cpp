#include "mlp.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {

int64_t MlpShape::widest() const { return padded(*std::max_element(widths.begin(), widths.end())); }

namespace {

// The columns of a weight [out, in] with few of them, as rows.
void load_columns(const Rows& weight, int64_t out, int64_t in, Floats to) {
  float row[kPadding];
  std::fill_n(to.data, in * to.ld, 0.0f);
  for (int64_t r = 0; r < out; ++r) {
    pointwise().load_float(weight.from_row(r), 1, in, {row, kPadding});
    for (int64_t d = 0; d < in; ++d) to.row(d)[r] = row[d];
  }
}

}  // namespace

PackedMlp::PackedMlp(const MlpShape& shape, Precision precision, const std::vector<Rows>& weights,
                     const std::vector<Rows>& biases, bool with_gradient, int64_t rows, int slot)
    : shape_(shape), precision_(rows <= kTinyRows ? Precision::f32 : precision),
      tiny_(rows <= kTinyRows), weights_(weights), forward_(shape.depth() + 1), backward_(shape.depth() + 1),
      left_(shape.depth() + 1), biases_(shape.depth() + 1, nullptr) {
  thread_local Scratch scratch[2];
  Arena count(nullptr);
  lay_out(biases, with_gradient, rows, count);
  Arena arena(scratch[slot].reserve(count.used()));
  pack(lay_out(biases, with_gradient, rows, arena));
}

// Places everything in the arena, copies what is small, and returns what is to be packed.
std::vector<PackedMlp::Job> PackedMlp::lay_out(const std::vector<Rows>& biases, bool with_gradient, int64_t rows,
                                               Arena& arena) {
  std::vector<Job> jobs;
  for (int64_t l = 0; l <= shape_.depth(); ++l) {
    const int64_t in = shape_.in(l), out = shape_.out(l);
    if (l == 0 ? few_inputs() : l == shape_.depth() && few_outputs()) {
      // The rows of a small head, or the columns of a small first layer, in float.
      const int64_t ld = padded(l == 0 ? out : in);
      const Floats small{arena.take<float>(kFew * ld), ld};
      (l == 0 ? first_columns_ : head_) = small;
      if (!arena.counts() && l > 0) pointwise().load_float(weights_[l], out, in, small);
      if (!arena.counts() && l == 0) load_columns(weights_[l], out, in, small);
    } else if (!tiny_) {
      const Job job = place_weight(l, with_gradient, rows, arena);
      if (job.transposed != nullptr || job.plain != nullptr) jobs.push_back(job);
    }
    if (l == 0) continue;
    auto* bias = arena.take<float>(padded(out));
    if (!arena.counts()) pointwise().load_float(biases[l - 1], 1, out, {bias, padded(out)});
    biases_[l] = bias;
  }
  return jobs;
}

// Decides how matmuls read a weight, and takes memory for what they read packed.
PackedMlp::Job PackedMlp::place_weight(int64_t layer, bool with_gradient, int64_t rows, Arena& arena) {
  const int64_t in = shape_.in(layer), out = shape_.out(layer);
  const Rows& weight = weights_[layer];
  const bool as_is = weight.dtype == (precision_ == Precision::bf16 ? Dtype::bf16 : Dtype::f32) &&
                     precision_ != Precision::bf16x3 && weight.stride >= in;
  Job job{layer, nullptr, nullptr};
  // Packing costs about a nanosecond per weight. Without it, input and output of the layer are transposed for each row,
  // at a quarter of that per number.
  const bool few_rows = rows / 4 <= in * out / (in + out);
  if (few_rows && as_is && in % 2 == 0) {
    left_[layer] = left_operand(precision_, weight.data, weight.stride);
  } else {
    job.transposed = arena.take<unsigned char>(packed_bytes(precision_, in, out));
    forward_[layer] = packed_view(precision_, in, out, job.transposed);
  }
  if (with_gradient && as_is && precision_ == Precision::f32 && in % kPadding == 0 && out % kPadding == 0) {
    backward_[layer] = right_operand(precision_, weight.data, weight.stride);
  } else if (with_gradient) {
    job.plain = arena.take<unsigned char>(packed_bytes(precision_, out, in));
    backward_[layer] = packed_view(precision_, out, in, job.plain);
  }
  return job;
}

void PackedMlp::pack(const std::vector<Job>& jobs) const {
  // Tasks of kPackedRows rows, numbered consecutively over all matrices.
  std::vector<int64_t> first(1, 0);
  for (const Job& job : jobs) {
    first.push_back(first.back() + (padded(shape_.out(job.layer)) + kPackedRows - 1) / kPackedRows);
  }
  at::parallel_for(0, first.back(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const auto which = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      const Job& job = jobs[which];
      pack_rows(precision_, weights_[job.layer], shape_.out(job.layer), shape_.in(job.layer),
                (task - first[which]) * kPackedRows, job.transposed, job.plain);
    }
  });
}

namespace {

int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

}  // namespace

MlpBlock::MlpBlock(const MlpShape& shape, Precision precision, int64_t rows, bool with_gradient, int64_t workers,
                   Arena& arena) {
  const int64_t ld = shape.widest();
  for (int64_t w = 0; w < workers; ++w) {
    float* data = arena.take<float>(rows * kPanel);
    panels.push_back({data, arena.take<float>(kPanel * padded(rows))});
  }
  if (shape.inputs > kFew) input = arena.take_operand(precision, rows, padded(shape.inputs));
  a = arena.take_operand(precision, rows, ld);
  b = arena.take_operand(precision, rows, ld);
  transposed = arena.take<unsigned char>(packed_bytes(precision, std::max(ld, padded(shape.inputs)), rows));
  part = arena.take<float>(panels_of(shape.widths.back()) * rows);
  for (int64_t l = 0; with_gradient && l + 1 < shape.depth(); ++l) {
    slopes.push_back(arena.take_slopes(precision, rows, ld));
  }
}

namespace {

// Multiplications that take as long (about 10 us) as it costs to wake a thread and wait for it.
constexpr int64_t kWorthAThread = int64_t{1} << 19;

// Calls body(first column, columns, panel) for all panels of a width, in the threads of the workers; `work`:
// multiplications per column.
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
    release_matmul(mlp.precision());
  });
}

// Calls body(first column, columns, panel) with z = a_l-1 W_l^T of these columns in the panel, without its bias.
template <typename Body>
void forward_panels(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t layer,
                    const Operand& below, Body body) {
  const MlpShape& shape = mlp.shape();
  const int64_t out = shape.out(layer), width = padded(out), depth = mlp.matmul_depth(shape.in(layer));
  const bool few = layer == 0 && mlp.few_inputs();
  const Operand& left = mlp.left(layer);
  PackedMatrix right;
  if (!few && left.ld != 0) right = transposed(mlp.precision(), below, rows, depth, block.transposed);
  for_panels(mlp, block.panels, width, rows * depth, [&](int64_t column, int64_t columns, const Panel& panel) {
    const int64_t present = std::min(columns, out - column);
    const Floats z = panel.z();
    if (few) {
      pointwise().few_inputs(input.few_x, shape.inputs, mlp.first_columns().from(column), rows, columns, z);
    } else if (mlp.tiny()) {
      pointwise().dot_rows(mlp.weight(layer).from_row(column), present, shape.in(layer), {below.f32, below.ld}, rows,
                           z);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(z.row(r) + present, columns - present, 0.0f);
    } else if (left.ld != 0) {
      // z^T = W a^T, which reads W as it lies in memory.
      matmul(mlp.precision(), present, rows, depth, left.from_row(column), right, 0, panel.transposed, right.ld);
      std::fill(panel.transposed + present * right.ld, panel.transposed + columns * right.ld, 0.0f);
      pointwise().transpose(panel.transposed, right.ld, columns, rows, z.data, z.ld);
    } else {
      matmul(mlp.precision(), rows, columns, depth, below, mlp.forward(layer), column, z.data, z.ld);
    }
    body(column, columns, panel);
  });
}

// Calls body(first column, columns, panel) with these columns of delta W_l in the panel.
template <typename Body>
void backward_panels(const PackedMlp& mlp, const std::vector<Panel>& panels, const Operand& delta, int64_t rows,
                     int64_t layer, Body body) {
  const int64_t in = mlp.shape().in(layer), out = mlp.shape().out(layer);
  for_panels(mlp, panels, padded(in), rows * out, [&](int64_t column, int64_t columns, const Panel& panel) {
    const Floats z = panel.z();
    if (mlp.tiny()) {
      std::fill_n(z.data, rows * z.ld, 0.0f);  // the padding, which may lie beyond the last whole vector
      pointwise().combine_rows(mlp.weight(layer).from(column), out, std::min(columns, in - column),
                               {delta.f32, delta.ld}, rows, z);
    } else {
      matmul(mlp.precision(), rows, columns, mlp.matmul_depth(out), delta, mlp.backward(layer), column, z.data, z.ld);
    }
    body(column, columns, panel);
  });
}

void keep_panel(const KeepPreActivations& keep, const Panel& panel, int64_t layer, int64_t column, int64_t width) {
  if (keep.layers.empty()) return;
  pointwise().store(panel.z(), keep.rows, std::min(kPanel, width - column), keep.layers[layer].from(column));
}

// Of layer 0 in `input`, of the others one row for all.
ConstFloats bias_of(const PackedMlp& mlp, const MlpInput& input, int64_t layer) {
  return layer == 0 ? input.bias : ConstFloats(mlp.bias(layer), 0);
}

// Layers 0 .. end - 1; returns the operand of the last activation, or the input.
Operand activations(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const MlpInput& input, int64_t end,
                    bool with_slopes, const KeepPreActivations& keep) {
  Operand below = block.input, to = block.a, other = block.b;
  for (int64_t l = 0; l < end; ++l) {
    const ConstFloats bias = bias_of(mlp, input, l);
    forward_panels(mlp, block, rows, input, l, below, [&](int64_t column, int64_t columns, const Panel& panel) {
      const Slopes slopes = with_slopes ? block.slopes[l].from(column) : Slopes{};
      pointwise().activate[mlp.precision()](panel.z(), bias.from(column), rows, columns, to.from(column), slopes,
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
  const Operand below = activations(mlp, block, rows, input, last, true, keep);
  // The operand that the last hidden layer does not read.
  Operand delta = last % 2 == 0 ? block.a : block.b, other = last % 2 == 0 ? block.b : block.a;
  const ConstFloats bias = bias_of(mlp, input, last);
  // Each panel adds to numbers of its own, which are then added up in order: the same whichever thread works on which.
  const int64_t parts = panels_of(shape.widths[last]) * rows;
  std::fill_n(block.part, parts, 0.0f);
  forward_panels(mlp, block, rows, input, last, below, [&](int64_t column, int64_t columns, const Panel& panel) {
    pointwise().head[mlp.precision()](panel.z(), bias.from(column), mlp.head().data + column, rows, columns,
                                      block.part + column / kPanel * rows, delta.from(column), !keep.layers.empty());
    keep_panel(keep, panel, last, column, shape.widths[last]);
  });
  std::fill(value, value + rows, mlp.bias(shape.depth())[0]);
  for (int64_t i = 0; i < parts; ++i) value[i % rows] += block.part[i];
  for (int64_t l = last; l > 0; --l) {
    backward_panels(mlp, block.panels, delta, rows, l, [&](int64_t column, int64_t columns, const Panel& panel) {
      pointwise().scale[mlp.precision()](block.slopes[l - 1].from(column), panel.z(), rows, columns,
                                         other.from(column));
    });
    std::swap(delta, other);
  }
  return delta;
}

void input_gradient(const PackedMlp& mlp, const std::vector<Panel>& panels, const Operand& delta, int64_t rows,
                    const FirstRows& to) {
  const int64_t inputs = mlp.shape().inputs;
  if (mlp.few_inputs()) {
    const Floats z = panels[0].z();
    pointwise().few_outputs[mlp.precision()](delta, inputs, mlp.first_columns().data, rows,
                                             padded(mlp.shape().widths[0]), z);
    pointwise().store(z, to.rows, inputs, to.to);
    return;
  }
  backward_panels(mlp, panels, delta, rows, 0, [&](int64_t column, int64_t columns, const Panel& panel) {
    pointwise().store(panel.z(), to.rows, std::min(columns, inputs - column), to.to.from(column));
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
      for (int64_t c = 0; c < present; ++c) panel.z().row(r)[c] += bias[column + c];
    }
    pointwise().store(panel.z(), to.rows, present, to.to.from(column));
  };
  if (mlp.few_outputs()) {
    pointwise().few_outputs[mlp.precision()](a, shape.outputs, mlp.head().data, rows, padded(shape.widths.back()),
                                             block.panels[0].z());
    finish(0, shape.outputs, block.panels[0]);
  } else {
    forward_panels(mlp, block, rows, input, shape.depth(), a, finish);
  }
}

int64_t rounded_rows(int64_t rows) {
  if (rows <= 4) return rows;
  return rows <= 16 ? (rows + 3) / 4 * 4 : (rows + 15) / 16 * 16;
}

}  // namespace tgdp
