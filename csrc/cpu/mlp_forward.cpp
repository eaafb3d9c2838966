#include "mlp_forward.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace tgdp {
namespace {

// Rows of a block: its activations and slopes stay in an L2 cache of 1 MiB at width 512. Below a vector of rows,
// matmuls lose more than a thread gains.
constexpr int64_t kMostRows = 64, kLeastRows = 16;

struct Memory {
  Memory(const MlpCall& call, Precision precision, int64_t rows, bool with_gradient, int64_t workers, Arena& arena)
      : block(call.shape, precision, rows, with_gradient, workers, arena) {
    const int64_t width = padded(call.shape.widths[0]);
    few_x = {arena.take<float>(call.shape.inputs <= kFew ? rows * kPadding : 0), kPadding};
    first_bias = {arena.take<float>((call.first_bias.stride == 0 ? 1 : rows) * width), width};
    values = arena.take<float>(rows);
  }
  MlpBlock block;
  Floats few_x, first_bias;
  float* values;
};

// A block of `rows` rows from `row` on, computed as `rounded` ones: those between are what an earlier block left, and
// are dropped.
struct BlockOfRows {
  int64_t row, rows, rounded;
  MlpInput input;
  KeepPreActivations keep;
};

BlockOfRows load_block(const MlpCall& call, const PackedMlp& mlp, const std::vector<Rows>& keep, int64_t row,
                       int64_t size, Memory& memory) {
  const int64_t rows = std::min(size, call.batch - row), inputs = call.shape.inputs;
  const Rows x = call.x.from_row(row);
  if (mlp.few_inputs()) {
    pointwise().load_float(x, rows, inputs, memory.few_x);
  } else {
    pointwise().load[mlp.precision()](x, rows, inputs, memory.block.input);
  }
  ConstFloats bias(memory.first_bias.data, 0);
  if (call.first_bias.stride != 0) {
    pointwise().load_float(call.first_bias.from_row(row), rows, call.shape.widths[0], memory.first_bias);
    bias = memory.first_bias;
  }
  KeepPreActivations kept{rows, {}};
  for (const Rows& z : keep) kept.layers.push_back(z.from_row(row));
  return {row, rows, std::min(rounded_rows(rows), size), {memory.few_x, bias}, kept};
}

// Calls body(mlp, memory, block) for all blocks of rows.
template <typename Body>
void for_blocks(const MlpCall& call, bool with_gradient, const std::vector<Rows>& keep, Body body) {
  if (call.batch == 0) return;
  const PackedMlp mlp(call.shape, matmul_precision(call.x.dtype, call.bf16x3), call.weights, call.biases, with_gradient,
                      call.batch, 0);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t share = (call.batch + threads - 1) / threads;
  const int64_t size = std::clamp(rounded_rows(share), std::min(kLeastRows, rounded_rows(call.batch)), kMostRows);
  const int64_t blocks = (call.batch + size - 1) / size;
  const auto run = [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto memory = laid_out<Memory>(scratch, call, mlp.precision(), size, with_gradient, blocks == 1 ? threads : 1);
    if (call.first_bias.stride == 0) {
      pointwise().load_float(call.first_bias, 1, call.shape.widths[0], memory.first_bias);
    }
    for (int64_t index = begin; index < end; ++index) {
      body(mlp, memory, load_block(call, mlp, keep, index * size, size, memory));
    }
    release_matmul(mlp.precision());
  };
  if (blocks == 1) {
    run(0, 1);
  } else {
    at::parallel_for(0, blocks, 1, run);
  }
}

}  // namespace

void mlp_value_and_grad(const MlpCall& call, const Rows& value, const Rows& gradient, const std::vector<Rows>& keep) {
  for_blocks(call, true, keep, [&](const PackedMlp& mlp, Memory& memory, const BlockOfRows& block) {
    const Operand delta = value_and_delta(mlp, memory.block, block.rounded, block.input, memory.values, block.keep);
    pointwise().store({memory.values, 1}, block.rows, 1, value.from_row(block.row));
    input_gradient(mlp, memory.block.panels, delta, block.rounded, {block.rows, gradient.from_row(block.row)});
  });
}

void mlp_outputs(const MlpCall& call, const Rows& output, const std::vector<Rows>& keep) {
  for_blocks(call, false, keep, [&](const PackedMlp& mlp, Memory& memory, const BlockOfRows& block) {
    outputs(mlp, memory.block, block.rounded, block.input, {block.rows, output.from_row(block.row)}, block.keep);
  });
}

}  // namespace tgdp
