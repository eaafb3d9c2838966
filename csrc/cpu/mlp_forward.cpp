#include "mlp_forward.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {
namespace {

// Rows of a block: its activations and slopes stay in a level-2 cache of 1 MiB at width 512. Below a vector of rows,
// products lose more than a thread gains.
constexpr int64_t kMostRows = 64, kLeastRows = 16;

struct Memory {
  Memory(const MlpCall& call, Products products, int64_t rows, bool with_gradient, int64_t workers, Arena& arena)
      : block(call.shape, products, rows, with_gradient, workers, arena) {
    const int64_t first_width = padded(call.shape.widths[0]);
    few_x = arena.take<float>(call.shape.inputs <= kFew ? rows * kPadding : 0);
    first_bias = arena.take<float>(call.first_bias.stride == 0 ? first_width : rows * first_width);
    values = arena.take<float>(rows);
  }
  MlpBlock block;
  float *few_x, *first_bias, *values;
};

// Calls body(mlp, memory, first row, rows, rounded rows, input, keep) for all blocks of rows. Those between `rows` and
// the rounded ones are computed from what an earlier block left, and dropped.
template <typename Body>
void for_blocks(const MlpCall& call, bool with_gradient, const std::vector<Rows>& keep, Body body) {
  if (call.batch == 0) return;
  const MlpShape& shape = call.shape;
  const PackedMlp mlp(shape, products_for(call.x.dtype, call.split), call.weights, call.biases, with_gradient, call.batch,
                      0);
  const Products products = mlp.products();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t share = (call.batch + threads - 1) / threads;
  const int64_t size = std::clamp(rounded_rows(share), std::min(kLeastRows, rounded_rows(call.batch)), kMostRows);
  const int64_t blocks = (call.batch + size - 1) / size;
  const int64_t first_width = padded(shape.widths[0]), workers = blocks == 1 ? threads : 1;
  const auto run = [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Arena count(nullptr);
    Memory(call, products, size, with_gradient, workers, count);
    Arena arena(scratch.reserve(count.used()));
    Memory memory(call, products, size, with_gradient, workers, arena);
    if (call.first_bias.stride == 0) {
      pointwise().load_float(call.first_bias, 1, shape.widths[0], first_width, memory.first_bias, first_width);
    }
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index * size, rows = std::min(size, call.batch - row);
      const Rows x = call.x.from_row(row);
      if (mlp.few_inputs()) {
        pointwise().load_float(x, rows, shape.inputs, kPadding, memory.few_x, kPadding);
      } else {
        pointwise().load[static_cast<int>(products)](x, rows, shape.inputs, padded(shape.inputs), memory.block.input);
      }
      if (call.first_bias.stride != 0) {
        pointwise().load_float(call.first_bias.from_row(row), rows, shape.widths[0], first_width, memory.first_bias,
                               first_width);
      }
      KeepPreActivations kept;
      kept.rows = rows;
      for (const Rows& z : keep) kept.layers.push_back(z.from_row(row));
      const MlpInput input{memory.few_x, memory.first_bias, call.first_bias.stride == 0 ? 0 : first_width};
      body(mlp, memory, row, rows, std::min(rounded_rows(rows), size), input, kept);
    }
    release_products(products);
  };
  if (blocks == 1) {
    run(0, 1);
  } else {
    at::parallel_for(0, blocks, 1, run);
  }
}

}  // namespace

void mlp_value_and_grad(const MlpCall& call, const Rows& value, const Rows& gradient, const std::vector<Rows>& keep) {
  for_blocks(call, true, keep,
             [&](const PackedMlp& mlp, Memory& memory, int64_t row, int64_t rows, int64_t rounded, const MlpInput& input,
                 const KeepPreActivations& kept) {
               const Operand delta = value_and_delta(mlp, memory.block, rounded, input, memory.values, kept);
               pointwise().store(memory.values, 1, rows, 1, value.from_row(row));
               input_gradient(mlp, memory.block.panels, delta, rounded, {rows, gradient.from_row(row)});
             });
}

void mlp_outputs(const MlpCall& call, const Rows& output, const std::vector<Rows>& keep) {
  for_blocks(call, false, keep,
             [&](const PackedMlp& mlp, Memory& memory, int64_t row, int64_t rows, int64_t rounded, const MlpInput& input,
                 const KeepPreActivations& kept) {
               outputs(mlp, memory.block, rounded, input, {rows, output.from_row(row)}, kept);
             });
}

}  // namespace tgdp
