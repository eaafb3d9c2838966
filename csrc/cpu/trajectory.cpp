#include "trajectory.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

namespace tgdp {
namespace {

constexpr int64_t kBlockRows = 64;

// One network within a block.
class BlockNetwork {
 public:
  BlockNetwork(const TrajectoryNetwork& network, const PackedMlp& mlp, int64_t rows, bool with_gradient, Arena& arena)
      : network_(network), mlp_(mlp), block_(mlp.shape(), mlp.precision(), rows, with_gradient, 1, arena) {
    const int64_t width = padded(mlp.shape().widths[0]);
    bias_ = {arena.take<float>(width), width};
    if (network.sample_bias) sample_bias_ = {arena.take<float>(rows * width), width};
    if (network.sample_bias) sum_ = {arena.take<float>(rows * width), width};
    if (mlp.few_inputs()) few_x_ = {arena.take<float>(rows * kPadding), kPadding};
    values_ = arena.take<float>(rows);
  }

  void start(int64_t row, int64_t rows) {
    if (!network_.sample_bias) return;
    pointwise().load_float(network_.sample_bias->from_row(row), rows, mlp_.shape().widths[0], sample_bias_);
  }

  // output [rows, outputs], contiguous.
  void evaluate(int64_t evaluation, const float* x, int64_t rows, float* output) {
    outputs(mlp_, block_, rows, input(evaluation, x, rows), {rows, {output, mlp_.shape().outputs, Dtype::f32}});
  }

  // gradient [rows, inputs], contiguous.
  void differentiate(int64_t evaluation, const float* x, int64_t rows, float* gradient) {
    const Operand delta = value_and_delta(mlp_, block_, rows, input(evaluation, x, rows), values_);
    input_gradient(mlp_, block_.panels, delta, rows, {rows, {gradient, mlp_.shape().inputs, Dtype::f32}});
  }

 private:
  MlpInput input(int64_t evaluation, const float* x, int64_t rows) {
    const int64_t size = mlp_.shape().inputs;
    const Rows from{const_cast<float*>(x), size, Dtype::f32};
    if (mlp_.few_inputs()) {
      pointwise().load_float(from, rows, size, few_x_);
    } else {
      pointwise().load[mlp_.precision()](from, rows, size, block_.input);
    }
    pointwise().load_float(network_.evaluation_bias.from_row(evaluation), 1, mlp_.shape().widths[0], bias_);
    if (!network_.sample_bias) return {few_x_, {bias_.data, 0}};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < sum_.ld; ++c) sum_.row(r)[c] = sample_bias_.row(r)[c] + bias_.data[c];
    }
    return {few_x_, sum_};
  }

  const TrajectoryNetwork& network_;
  const PackedMlp& mlp_;
  MlpBlock block_;
  Floats bias_, sample_bias_, sum_, few_x_;
  float* values_;
};

struct Memory {
  Memory(const TrajectoryCall& call, const PackedMlp& score_mlp, const PackedMlp* guidance_mlp, int64_t rows,
         Arena& arena)
      : score(call.score, score_mlp, rows, false, arena) {
    if (guidance_mlp != nullptr) guidance.emplace(*call.guidance, *guidance_mlp, rows, true, arena);
    const int64_t elements = rows * call.size;
    x = arena.take<float>(elements);
    x_next = arena.take<float>(elements);
    x0 = arena.take<float>(elements);
    epsilon = arena.take<float>(elements);
    gradient = arena.take<float>(elements);
    history = arena.take<float>(elements * call.slots);
    history_next = arena.take<float>(elements * call.slots);
  }
  BlockNetwork score;
  std::optional<BlockNetwork> guidance;
  float *x, *x_next, *x0, *epsilon, *gradient, *history, *history_next;
};

void limit_norms(float* gradient, int64_t rows, int64_t size, float weight, float limit) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = gradient + r * size;
    double square = 0.0;
    for (int64_t c = 0; c < size; ++c) square += static_cast<double>(row[c]) * row[c];
    const double length = std::abs(weight) * std::sqrt(square);
    // A gradient that is not finite stays so, and is reported with the resulting state.
    if (!(length > limit)) continue;
    for (int64_t c = 0; c < size; ++c) row[c] *= static_cast<float>(limit / length);
  }
}

// The solver's step of evaluation k on the block in memory, without history before the first.
void step(const TrajectoryCall& call, int64_t k, int64_t row, int64_t rows, bool guided, Memory& memory) {
  const Evaluation evaluation = evaluation_at(call, k);
  SolverStep step;
  step.elements = rows * call.size;
  step.slots = call.slots;
  step.x.data = memory.x;
  step.epsilon.data = memory.epsilon;
  if (guided) step.gradient.data = memory.gradient;
  std::vector<Elements> history(static_cast<size_t>(call.slots));
  for (int64_t slot = 0; k > 0 && slot < call.slots; ++slot) history[slot].data = memory.history + slot * step.elements;
  step.history = history.data();
  step.matrix = evaluation.matrix;
  step.guidance = {evaluation.guidance_weight, evaluation.alpha, evaluation.sigma,
                   call.clamp, call.lowest, call.highest};
  step.noise_scale = evaluation.noise_scale;
  step.noise = {call.size, call.sample_index + row, call.key_low, call.key_high, static_cast<uint32_t>(k + 1)};
  step.x_next = memory.x_next;
  step.history_next = memory.history_next;
  step.x0 = memory.x0;
  guided_step(step);
  std::swap(memory.x, memory.x_next);
  std::swap(memory.history, memory.history_next);
}

// All evaluations of rows [row, row + rows); returns the first one after which the state is not finite, or -1.
int64_t run_block(const TrajectoryCall& call, int64_t row, int64_t rows, Memory& memory) {
  const int64_t elements = rows * call.size;
  std::copy_n(call.x + row * call.size, elements, memory.x);
  memory.score.start(row, rows);
  if (memory.guidance) memory.guidance->start(row, rows);
  for (int64_t k = 0; k < call.evaluations; ++k) {
    const Evaluation evaluation = evaluation_at(call, k);
    memory.score.evaluate(k, memory.x, rows, memory.epsilon);
    for (int64_t i = 0; i < elements; ++i) {
      memory.epsilon[i] = evaluation.input_scale * memory.x[i] + evaluation.output_scale * memory.epsilon[i];
    }
    const bool guided = memory.guidance && evaluation.guidance_weight != 0.0f;
    if (guided) {
      memory.guidance->differentiate(k, memory.x, rows, memory.gradient);
      if (call.gradient_norm_limit > 0.0f) {
        limit_norms(memory.gradient, rows, call.size, evaluation.guidance_weight, call.gradient_norm_limit);
      }
    }
    step(call, k, row, rows, guided, memory);
    float check = 0.0f;
    for (int64_t i = 0; i < elements; ++i) check += memory.x[i] * 0.0f;
    if (check != 0.0f || check != check) return k;
  }
  std::copy_n(memory.x, elements, call.out + row * call.size);
  return -1;
}

}  // namespace

int64_t trajectory(const TrajectoryCall& call) {
  if (call.batch == 0) return -1;
  const auto precision = [&](const TrajectoryNetwork& network) {
    return matmul_precision(network.weights[0].dtype, call.bf16x3);
  };
  const PackedMlp score(call.score.shape, precision(call.score), call.score.weights, call.score.biases, false,
                        kAlwaysPack, 0);
  std::optional<PackedMlp> guidance;
  if (call.guidance) {
    guidance.emplace(call.guidance->shape, precision(*call.guidance), call.guidance->weights, call.guidance->biases,
                     true, kAlwaysPack, 1);
  }
  const int64_t share = (call.batch + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t rows_per_block = std::min(kBlockRows, rounded_rows(share));
  const int64_t blocks = (call.batch + rows_per_block - 1) / rows_per_block;
  std::atomic<int64_t> first_failure{-1};
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const PackedMlp* guidance_mlp = guidance ? &*guidance : nullptr;
    auto memory = laid_out<Memory>(scratch, call, score, guidance_mlp, rows_per_block);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index * rows_per_block;
      const int64_t failure = run_block(call, row, std::min(rows_per_block, call.batch - row), memory);
      int64_t known = first_failure.load();
      while (failure >= 0 && (known < 0 || failure < known) && !first_failure.compare_exchange_weak(known, failure)) {
      }
      // The run has failed, and no block can fail at an earlier evaluation.
      if (failure == 0) break;
    }
    release_matmul(score.precision() == Precision::f32 && guidance ? guidance->precision() : score.precision());
  });
  return first_failure.load();
}

}  // namespace tgdp
