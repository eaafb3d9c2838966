#include "mlp.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {

int64_t MlpShape::widest() const { return padded(*std::max_element(widths.begin(), widths.end())); }

PackedMlp::PackedMlp(const MlpShape& shape, Products products, const std::vector<Rows>& weights,
                     const std::vector<Rows>& biases, bool with_gradient, int slot)
    : shape_(shape), products_(products) {
  const int64_t depth = shape.depth();
  forward_.resize(depth + 1);
  backward_.resize(depth + 1);
  biases_.assign(depth + 1, nullptr);
  struct Job {
    int64_t layer;
    bool transposed;
    int64_t rows;  // of the packed matrix
    unsigned char* memory;
  };
  std::vector<Job> jobs;
  thread_local Scratch scratch[2];
  // The first pass counts, the second lays out.
  unsigned char* memory = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Arena arena(memory);
    jobs.clear();
    for (int64_t l = 0; l <= depth; ++l) {
      const bool is_head = l == depth;
      const int64_t in = is_head ? shape.widths[depth - 1] : shape.in(l);
      const int64_t out = is_head ? shape.outputs : shape.widths[l];
      if (is_head ? shape.outputs > kFew : !few_inputs() || l > 0) {
        auto* place = arena.take<unsigned char>(packed_bytes(products, in, out));
        jobs.push_back({l, true, padded(in), place});
        if (place != nullptr) forward_[l] = packed_view(products, in, out, place);
      }
      const bool few = l == 0 && few_inputs();
      if (with_gradient && !is_head && !few) {
        const Rows& weight = weights[l];
        const bool as_is = products == Products::f32 && weight.dtype == Dtype::f32 && in % kPadding == 0 &&
                           out % kPadding == 0 && weight.stride >= in;
        if (as_is) {
          backward_[l].f32 = static_cast<const float*>(weight.data);
          backward_[l].ld = weight.stride;
        } else {
          auto* place = arena.take<unsigned char>(packed_bytes(products, out, in));
          jobs.push_back({l, false, padded(out), place});
          if (place != nullptr) backward_[l] = packed_view(products, out, in, place);
        }
      }
      if (l > 0) {
        auto* place = arena.take<float>(padded(out));
        if (place != nullptr) pointwise().load_float(biases[l - 1], 1, out, padded(out), place, padded(out));
        biases_[l] = place;
      }
    }
    // The rows of a small head, and the columns of a small first layer.
    auto* head = arena.take<float>(std::min(shape.outputs, kFew) * padded(shape.widths[depth - 1]));
    auto* columns = few_inputs() ? arena.take<float>(shape.inputs * padded(shape.widths[0])) : nullptr;
    if (memory != nullptr) {
      const int64_t width = padded(shape.widths[depth - 1]);
      pointwise().load_float(weights[depth], std::min(shape.outputs, kFew), shape.widths[depth - 1], width, head, width);
      if (few_inputs()) {
        pack_rows(Products::f32, weights[0], shape.widths[0], shape.inputs, true, 0, shape.inputs,
                  reinterpret_cast<unsigned char*>(columns));
      }
    }
    head_ = head;
    first_columns_ = columns;
    if (memory == nullptr) memory = scratch[slot].reserve(arena.used());
  }
  // Tasks of 32 rows, numbered through all matrices.
  constexpr int64_t kTask = 32;
  std::vector<int64_t> first(1, 0);
  int64_t elements = 0;
  for (const Job& job : jobs) {
    first.push_back(first.back() + (job.rows + kTask - 1) / kTask);
    elements += job.rows;
  }
  at::parallel_for(0, first.back(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const auto which = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      const Job& job = jobs[which];
      const bool is_head = job.layer == depth;
      const int64_t in = is_head ? shape.widths[depth - 1] : shape.in(job.layer);
      const int64_t out = is_head ? shape.outputs : shape.widths[job.layer];
      const int64_t row = (task - first[which]) * kTask;
      pack_rows(products, weights[job.layer], out, in, job.transposed, row, std::min(row + kTask, job.rows),
                job.memory);
    }
  });
}

MlpBlock::MlpBlock(const MlpShape& shape, Products products, int64_t rows, bool with_gradient, Arena& arena)
    : ld(shape.widest()) {
  z = arena.take<float>(rows * ld);
  if (shape.inputs > kFew) input = arena.take_operand(products, rows, padded(shape.inputs));
  a = arena.take_operand(products, rows, ld);
  b = arena.take_operand(products, rows, ld);
  for (int64_t l = 0; with_gradient && l + 1 < shape.depth(); ++l) slopes.push_back(arena.take<float>(rows * ld));
}

namespace {

// The layers below the last, up to the last one's z without its bias; the last activation's operand is returned.
void upwards(const PackedMlp& mlp, MlpBlock& block, int64_t rows, int64_t kept_rows, const float* few_x,
             const float* first_bias, int64_t first_bias_stride, bool with_slopes, const KeepPreActivations* keep) {
  const MlpShape& shape = mlp.shape();
  const int p = static_cast<int>(mlp.products());
  Operand from = block.input, to = block.a, other = block.b;
  for (int64_t l = 0; l < shape.depth(); ++l) {
    const int64_t width = padded(shape.widths[l]);
    if (l == 0 && mlp.few_inputs()) {
      pointwise().few_inputs(few_x, shape.inputs, shape.inputs, mlp.first_columns(), rows, width, block.z, block.ld);
    } else {
      multiply(mlp.products(), rows, width, padded(shape.in(l)), from, mlp.forward(l), 0, block.z, block.ld);
    }
    if (l + 1 == shape.depth()) return;
    const float* bias = l == 0 ? first_bias : mlp.bias(l);
    pointwise().activate[p](block.z, block.ld, bias, l == 0 ? first_bias_stride : 0, rows, width, to,
                            with_slopes ? block.slopes[l] : nullptr);
    if (keep != nullptr) pointwise().store(block.z, block.ld, kept_rows, shape.widths[l], keep->rows[l]);
    from = to;
    std::swap(to, other);
  }
}

}  // namespace

Operand value_and_delta(const PackedMlp& mlp, MlpBlock& block, int64_t rows, int64_t kept_rows, const float* few_x,
                        const float* first_bias, int64_t first_bias_stride, bool with_gradient, float* value,
                        const KeepPreActivations* keep) {
  const MlpShape& shape = mlp.shape();
  const int64_t last = shape.depth() - 1;
  const int p = static_cast<int>(mlp.products());
  upwards(mlp, block, rows, kept_rows, few_x, first_bias, first_bias_stride, with_gradient, keep);
  Operand delta = with_gradient ? block.a : Operand{};
  Operand other = block.b;
  pointwise().head[p](block.z, block.ld, last == 0 ? first_bias : mlp.bias(last), last == 0 ? first_bias_stride : 0,
                      mlp.head(), mlp.bias(shape.depth())[0], rows, padded(shape.widths[last]), value, delta);
  if (keep != nullptr) pointwise().store(block.z, block.ld, kept_rows, shape.widths[last], keep->rows[last]);
  if (!with_gradient) return delta;
  for (int64_t l = last; l > 0; --l) {
    const int64_t width = padded(shape.in(l));
    multiply(mlp.products(), rows, width, padded(shape.widths[l]), delta, mlp.backward(l), 0, block.z, block.ld);
    pointwise().scale[p](block.slopes[l - 1], block.z, block.ld, rows, width, other);
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
  multiply(mlp.products(), rows, end - begin, width, delta, mlp.backward(0), begin, gradient, ld);
}

void outputs(const PackedMlp& mlp, MlpBlock& block, int64_t rows, const float* few_x, const float* first_bias,
             int64_t first_bias_stride, float* output, int64_t ld) {
  const MlpShape& shape = mlp.shape();
  const int64_t last = shape.depth() - 1, width = padded(shape.widths[last]);
  const int p = static_cast<int>(mlp.products());
  upwards(mlp, block, rows, rows, few_x, first_bias, first_bias_stride, false, nullptr);
  // The operand that the last product has not read.
  const Operand a = last % 2 == 0 ? block.a : block.b;
  pointwise().activate[p](block.z, block.ld, last == 0 ? first_bias : mlp.bias(last), last == 0 ? first_bias_stride : 0,
                          rows, width, a, nullptr);
  if (shape.outputs <= kFew) {
    pointwise().few_outputs[p](a, shape.outputs, mlp.head(), rows, width, output, ld);
  } else {
    multiply(mlp.products(), rows, padded(shape.outputs), width, a, mlp.forward(shape.depth()), 0, output, ld);
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
