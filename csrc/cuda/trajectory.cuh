// All evaluations of score network, guidance network and solver for a block of samples in one launch: reference twin
// tgdp_fast.ops.trajectory.trajectory_reference.
//
// Per sample and evaluation 2 P FLOPs for the score network and 4 P for the guidance network, P weights; from and to
// global memory 8 D bytes per sample in all. The weights come from the L2 cache once (score) and twice (guidance) per
// block of kRows samples and evaluation. State, history and noise never leave the SM. A sample does not depend on its
// block.
#pragma once

#include "../common/solver_step.h"
#include "../common/trajectory.h"
#include "noise.cuh"
#include "mlp_layers.cuh"

namespace tgdp::cuda {

// Of the history.
constexpr int kMostTrajectorySlots = 4;

// An MLP whose first bias is a row per evaluation plus, where there are labels, a row per sample; float32.
struct TrajectoryLayers {
  Network network;  // no layers: none
  Matrix evaluation_bias, sample_bias;
};

struct TrajectoryArguments : Trajectory {
  int pitch;
  TrajectoryLayers score, guidance;
  int* first_failure;  // the first evaluation after which a sample is not finite; left alone where all are
  uint32_t* scratch;   // slopes of a block after those of another; null: they are in shared memory
};

TGDP_DEVICE bool is_guided(const TrajectoryArguments& call, int k) {
  return call.guidance.network.layers > 0 && evaluation_at(call, k).guidance_weight != 0.0f;
}

// Blocks that an SM has registers for.
template <typename Tile>
constexpr int kTrajectoryResident = Tile::kRows > (sizeof(typename Tile::Storage) == 2 ? 64 : 16) ? 1 : 2;

// What a block keeps in shared memory: state, epsilon, gradient and history of its samples.
template <typename Tile>
TGDP_FUNCTION size_t trajectory_own_bytes(int64_t size, int64_t slots) {
  return (static_cast<size_t>(3 + slots) * Tile::kRows * static_cast<size_t>(size)) * sizeof(float);
}

// Of the blocks that share their layers, one writes the samples.
template <typename Tile, typename Matmuls>
class TrajectoryBlock {
 public:
  using Element = typename Tile::Element;
  using Storage = typename Tile::Storage;
  static constexpr int kAdjacent = Tile::kAdjacent;

  TGDP_DEVICE TrajectoryBlock(const TrajectoryArguments& call, const LayersLayout& layout, const Matmuls& matmuls)
      : call_(call), layers_(layout, call.pitch, call.scratch, matmuls) {}

  // All evaluations of rows from first_row on; those past the batch start as zeros and are not written. With `leads`
  // the results are.
  TGDP_DEVICE void run(int64_t first_row, bool leads) {
    first_row_ = first_row;
    const int64_t offset = first_row * size(), given = call_.batch * call_.size;
    for (int i = thread(); i < elements(); i += kMatmulThreads) {
      x()[i] = offset + i < given ? call_.x[offset + i] : 0.0f;
    }
    for (int i = thread(); i < elements() * slots(); i += kMatmulThreads) history()[i] = 0.0f;
    __syncthreads();
    for (int k = 0; k < call_.evaluations; ++k) evaluate(k);
    // The thread that reads an element also puts that of the next rows there.
    for (int i = thread(); leads && i < elements(); i += kMatmulThreads) {
      if (offset + i < given) call_.out[offset + i] = x()[i];
    }
  }

 private:
  // Both fit in 32 bits.
  TGDP_DEVICE int size() const { return static_cast<int>(call_.size); }
  TGDP_DEVICE int slots() const { return static_cast<int>(call_.slots); }

  // Addresses are computed each time: as members they would occupy registers throughout.
  TGDP_DEVICE int elements() const { return Tile::kRows * size(); }
  TGDP_DEVICE Shared<float> x() const { return own(0, 1); }
  TGDP_DEVICE Shared<float> epsilon() const { return own(1, 1); }
  TGDP_DEVICE Shared<float> gradient() const { return own(2, 1); }
  TGDP_DEVICE Shared<float> history() const { return own(3, slots()); }
  TGDP_DEVICE Shared<float> own(int before, int count) const {
    return shared_array<float>(sizeof(float) * before * elements(), static_cast<size_t>(count) * elements());
  }

  static TGDP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

  TGDP_DEVICE void evaluate(int k) {
    const Evaluation evaluation = evaluation_at(call_, k);
    predict(k, evaluation.input_scale, evaluation.output_scale);
    const bool guided = is_guided(call_, k);
    if (guided) {
      differentiate(k);
      if (call_.gradient_norm_limit > 0.0f) limit_norms(evaluation.guidance_weight);
    }
    step(k, evaluation, guided);
    __syncthreads();
  }

  // The state as the networks' input.
  TGDP_DEVICE void enter() {
    const int padded = rounded_up(size(), Tile::kDepth);
    const Shared<Storage> inputs = layers_.inputs();
    for (int i = thread(); i < Tile::kRows * (padded / kAdjacent); i += kMatmulThreads) {
      const int row = i / (padded / kAdjacent), column = i % (padded / kAdjacent) * kAdjacent;
      float values[kAdjacent];
#pragma unroll
      for (int e = 0; e < kAdjacent; ++e) {
        values[e] = column + e < size() ? static_cast<float>(x()[row * size() + column + e]) : 0.0f;
      }
      Tile::store(inputs + (row * layers_.pitch() + column), values);
    }
  }

  TGDP_DEVICE float first_bias(const TrajectoryLayers& layers, int k, int row, int column) const {
    if (column >= layers.network.widths[0]) return 0.0f;
    float bias = static_cast<const float*>(layers.evaluation_bias.data)[k * layers.evaluation_bias.stride + column];
    if (layers.sample_bias.data != nullptr && first_row_ + row < call_.batch) {
      const int64_t at = (first_row_ + row) * layers.sample_bias.stride + column;
      bias += static_cast<const float*>(layers.sample_bias.data)[at];
    }
    return bias;
  }

  // epsilon = input_scale x + output_scale score(x)
  TGDP_DEVICE void predict(int k, float input_scale, float output_scale) {
    const Network& network = call_.score.network;
    enter();
    const auto bias = [&](int row, int column) { return first_bias(call_.score, k, row, column); };
    const auto activate = [](int, int, int, int64_t, const float(&z)[kAdjacent], float(&out)[kAdjacent]) {
#pragma unroll
      for (int i = 0; i < kAdjacent; ++i) out[i] = z[i] * sigmoid_for<Element>(z[i]);
    };
    layers_.first(network, bias, activate);
    for (int layer = 1; layer < network.layers; ++layer) layers_.next(network, layer, activate);
    layers_.head(network, size(), [&](int row, int column, const float(&sums)[kAdjacent]) {
#pragma unroll
      for (int i = 0; i < kAdjacent; ++i) {
        if (column + i >= size()) continue;
        const float output = sums[i] + entry<Element>(network.biases[network.layers - 1], column + i, size());
        const int at = row * size() + column + i;
        epsilon()[at] = input_scale * x()[at] + output_scale * output;
      }
    });
  }

  // The guidance network's input gradient.
  TGDP_DEVICE void differentiate(int k) {
    const Network& network = call_.guidance.network;
    enter();
    const auto bias = [&](int row, int column) { return first_bias(call_.guidance, k, row, column); };
    for (int layer = 0; layer < network.layers; ++layer) {
      const bool last = layer + 1 == network.layers;
      const auto activate = [&](int, int column, int, int64_t place, const float(&z)[kAdjacent],
                                float(&out)[kAdjacent]) {
        float slopes[kAdjacent];
#pragma unroll
        for (int i = 0; i < kAdjacent; ++i) {
          const float s = sigmoid_for<Element>(z[i]);
          slopes[i] = silu_slope(z[i], s);
          out[i] = z[i] * s;
          if (last) {
            out[i] = slopes[i] *
                     entry<Element>(network.weights[network.layers].data, column + i, network.widths[layer]);
          }
        }
        if (!last) layers_.keep_slopes(place, slopes);
      };
      if (layer == 0) {
        layers_.first(network, bias, activate);
      } else {
        layers_.next(network, layer, activate);
      }
    }
    for (int layer = network.layers - 1; layer > 0; --layer) layers_.backward(network, layer);
    layers_.gradient(network, [&](int row, int column, const float(&values)[kAdjacent]) {
#pragma unroll
      for (int i = 0; i < kAdjacent; ++i) {
        if (column + i < size()) gradient()[row * size() + column + i] = values[i];
      }
    });
  }

  // Scales gradients so that |weight| times their norm is at most the limit. One that is not finite stays so, and is
  // reported with the resulting state.
  TGDP_DEVICE void limit_norms(float weight) {
    for (int row = thread(); row < Tile::kRows; row += kMatmulThreads) {
      const Shared<float> of_row = gradient() + row * size();
      float largest = 0.0f, sum = 0.0f;
      for (int c = 0; c < size(); ++c) largest = fmaxf(largest, fabsf(of_row[c]));
      // Squares relative to the largest neither overflow nor vanish.
      for (int c = 0; largest > 0.0f && c < size(); ++c) {
        const float part = of_row[c] / largest;
        sum += part * part;
      }
      const float factor = call_.gradient_norm_limit / (fabsf(weight) * sqrtf(sum)) / largest;
      if (!(factor < 1.0f)) continue;
      for (int c = 0; c < size(); ++c) of_row[c] = of_row[c] * factor;
    }
    __syncthreads();
  }

  // x and history of the next evaluation.
  TGDP_DEVICE void step(int k, const Evaluation& evaluation, bool guided) {
    const Guidance guidance{evaluation.guidance_weight, evaluation.alpha, evaluation.sigma,
                            call_.clamp, call_.lowest, call_.highest};
    const float noise_scale = evaluation.noise_scale;
    // Four elements share their random words.
    const int groups = (size() + 3) / 4;
    bool finite = true;
    for (int i = thread(); i < Tile::kRows * groups; i += kMatmulThreads) {
      const int row = i / groups, group = i % groups;
      if (first_row_ + row >= call_.batch) continue;
      float noise[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (noise_scale != 0.0f) {
        normal_group(call_.sample_index[first_row_ + row], group, call_.key_low, call_.key_high,
                     static_cast<uint32_t>(k + 1), noise);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 4 * group + e;
        if (column >= size()) continue;
        const float x_next = step_element(row * size() + column, evaluation.matrix, guidance, guided,
                                          noise_scale * noise[e]);
        finite = finite && x_next - x_next == 0.0f;
      }
    }
    if (!finite) atomicMin(call_.first_failure, k);
  }

  TGDP_DEVICE float step_element(int at, const float* matrix, const Guidance& guidance, bool guided_by_gradient,
                                 float noise) {
    const int slots = this->slots(), terms = 2 + slots;
    const float state = x()[at], slope = guided_by_gradient ? static_cast<float>(gradient()[at]) : 0.0f;
    float guided, x0, past[kMostTrajectorySlots];
    if (guidance.clamp) {
      guide<true, true>(guidance, state, epsilon()[at], slope, guided, x0);
    } else {
      guide<true, false>(guidance, state, epsilon()[at], slope, guided, x0);
    }
#pragma unroll
    for (int slot = 0; slot < kMostTrajectorySlots; ++slot) {
      past[slot] = slot < slots ? static_cast<float>(history()[slot * elements() + at]) : 0.0f;
    }
    float x_next = 0.0f;
    for (int row = 0; row <= slots; ++row) {
      const float* coefficients = matrix + row * terms;
      float sum = coefficients[0] * state;
#pragma unroll
      for (int slot = 0; slot < kMostTrajectorySlots; ++slot) {
        if (slot < slots) sum += coefficients[1 + slot] * past[slot];
      }
      sum += coefficients[1 + slots] * guided;
      if (row == 0) {
        x_next = sum + noise;
      } else {
        history()[(row - 1) * elements() + at] = sum;
      }
    }
    x()[at] = x_next;
    return x_next;
  }

  const TrajectoryArguments& call_;
  Layers<Tile, Matmuls> layers_;
  int64_t first_row_ = 0;
};

template <typename Tile>
__global__ void __launch_bounds__(kMatmulThreads, kTrajectoryResident<Tile>)
    trajectory_kernel(const __grid_constant__ TrajectoryArguments call) {
  const LayersLayout layout = layers_layout<Tile>(trajectory_own_bytes<Tile>(call.size, call.slots), 0,
                                                  call.guidance.network.layers, call.pitch, call.scratch == nullptr);
  TrajectoryBlock<Tile, BlockMatmuls<Tile>> block(call, layout, BlockMatmuls<Tile>(layout));
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Tile::kRows; row < call.batch;
       row += static_cast<int64_t>(gridDim.x) * Tile::kRows) {
    block.run(row, true);
  }
}

}  // namespace tgdp::cuda
