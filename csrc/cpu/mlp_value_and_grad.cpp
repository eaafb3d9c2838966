#include "mlp_value_and_grad.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {
namespace {

// Rows of a block: its activations and slopes stay in a level-2 cache of 1 MiB at width 512.
constexpr int64_t kBlockRows = 64;
// Columns of a gradient that are converted at a time.
constexpr int64_t kGradientPanel = 512;

int64_t block_rows(int64_t batch) {
  const int64_t share = (batch + at::get_num_threads() - 1) / at::get_num_threads();
  return std::min(kBlockRows, rounded_rows(std::max<int64_t>(share, 1)));
}

}  // namespace

void mlp_value_and_grad(const MlpCall& call, const Rows& value, const Rows& gradient, const std::vector<Rows>& keep) {
  if (call.batch == 0) return;
  const MlpShape& shape = call.shape;
  const bool with_gradient = gradient.data != nullptr;
  const PackedMlp mlp(shape, products_for(call.x.dtype, call.split), call.weights, call.biases, with_gradient, call.batch, 0);
  const Products products = mlp.products();
  const int p = static_cast<int>(products);
  const int64_t rows_per_block = block_rows(call.batch);
  const int64_t blocks = (call.batch + rows_per_block - 1) / rows_per_block;
  const int64_t inputs = shape.inputs, first_width = padded(shape.widths[0]), panel = std::min(kGradientPanel, padded(inputs));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Arena count(nullptr);
    const auto lay_out = [&](Arena& arena) {
      struct {
        MlpBlock block;
        float *few_x, *first_bias, *values, *panel;
      } memory{MlpBlock(shape, products, rows_per_block, with_gradient, arena),
               arena.take<float>(mlp.few_inputs() ? rows_per_block * kPadding : 0),
               arena.take<float>(call.first_bias.stride == 0 ? first_width : rows_per_block * first_width),
               arena.take<float>(rows_per_block), arena.take<float>(rows_per_block * panel)};
      return memory;
    };
    lay_out(count);
    Arena arena(scratch.reserve(count.used()));
    auto memory = lay_out(arena);
    if (call.first_bias.stride == 0) {
      pointwise().load_float(call.first_bias, 1, shape.widths[0], first_width, memory.first_bias, first_width);
    }
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index * rows_per_block, rows = std::min(rows_per_block, call.batch - row);
      const int64_t rounded = std::min(rounded_rows(rows), rows_per_block);
      const Rows x = call.x.from_row(row);
      if (mlp.few_inputs()) {
        pointwise().load_float(x, rows, inputs, kPadding, memory.few_x, kPadding);
      } else {
        pointwise().load[p](x, rows, inputs, padded(inputs), memory.block.input);
      }
      if (call.first_bias.stride != 0) {
        pointwise().load_float(call.first_bias.from_row(row), rows, shape.widths[0], first_width, memory.first_bias,
                               first_width);
      }
      KeepPreActivations kept;
      kept.rows = rows;
      for (const Rows& z : keep) kept.layers.push_back(z.from_row(row));
      const MlpInput input{memory.few_x, memory.first_bias, call.first_bias.stride == 0 ? 0 : first_width};
      // Rows beyond the last are computed from what an earlier block left, and dropped.
      const Operand delta = value_and_delta(mlp, memory.block, rounded, input, with_gradient, memory.values, kept);
      pointwise().store(memory.values, 1, rows, 1, value.from_row(row));
      if (!with_gradient) continue;
      const Rows out = gradient.from_row(row);
      if (out.dtype == Dtype::f32 && rows == rounded) {
        input_gradient(mlp, delta, rows, 0, inputs, static_cast<float*>(out.data), out.stride);
        continue;
      }
      for (int64_t column = 0; column < inputs; column += panel) {
        const int64_t columns = std::min(panel, inputs - column);
        input_gradient(mlp, delta, rounded, column, column + columns, memory.panel, panel);
        pointwise().store(memory.panel, panel, rows, columns, out.from(column));
      }
    }
    release_products(products);
  });
}

}  // namespace tgdp
