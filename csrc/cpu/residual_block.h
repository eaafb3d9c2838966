// A residual block of the SSSD-ECG network in sampling: reference twin
// tgdp_fast.ops.residual_block.residual_block_reference_, whose names these are.
//
// All matrices have a row per channel, with contiguous positions. Weights are then left operands of matmuls as they lie
// in memory; tiles of some positions and all channels are right operands and results; LayerNorm, gate and update of the
// state work on a tile while it is in the cache, a vector of positions at a time, without sums across a vector.
#pragma once

#include <cstdint>

#include "long_convolution.h"
#include "pointwise.h"

namespace tgdp {

struct S4Layer {
  PackedFilters filters;
  const void* mixture = nullptr;  // [H, H]
  const float* mixture_bias = nullptr;
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  float epsilon = 0.0f;
};

struct ResidualBlockCall {
  int64_t batch = 0;
  int64_t channels = 0;  // C; even for bf16
  int64_t skip = 0;      // S
  int64_t length = 0;
  Dtype dtype = Dtype::f32;      // of matmul operands: f32, or bf16 where has_bf16_matmuls()
  float* state = nullptr;        // [batch, C + S, length]
  const float* step_bias = nullptr;  // [3, H] for each sample, step_stride apart
  int64_t step_stride = 0;
  const float* label_bias = nullptr;  // [H] for each sample, label_stride apart; or null
  int64_t label_stride = 0;
  const void* convolution = nullptr;  // [H, 3 C]
  S4Layer first, second;
  const void* output = nullptr;  // [C + S, C]
  const float* output_bias = nullptr;
};

// Whether this CPU multiplies bf16.
bool has_bf16_matmuls();

// FLOPs for B samples: B L (6 H C + 4 H^2 + 2 (C + S) C) and two long convolutions. Bytes: the state read and written
// twice (the second time perhaps in cache), all weights once, and u and y from and to the last-level cache.
void residual_block(const ResidualBlockCall& call);

// Positions of a tile.
constexpr int64_t kTilePositions = 64;

// A LayerNorm over the channels of u + bias.
struct Normalization {
  const float* bias = nullptr;
  const float* weight = nullptr;
  const float* shift = nullptr;
  float epsilon = 0.0f;
};

// Compiled once per instruction set. `columns` of a tile are a multiple of kPadding; there is no bf16x3.
struct ResidualBlockKernels {
  // taps[tap C + c, i] = state[c, first + i + tap - 1], zero outside of [0, length); taps as a right operand.
  PerPrecision<void(const float* state, int64_t channels, int64_t length, int64_t first, int64_t columns, void* taps)>
      gather;
  // u = LayerNorm(u + bias) over the rows.
  void (*normalize)(float* u, int64_t ld, int64_t rows, int64_t columns, const Normalization& norm);
  // gated = tanh(v[:C]) sigmoid(v[C:]) with v = LayerNorm(u + bias), as a right operand.
  PerPrecision<void(const float* u, int64_t ld, int64_t channels, int64_t columns, const Normalization& norm,
                    void* gated)>
      gate;
  // state = scale state + change + bias for `columns` positions of `rows` rows, state_ld apart.
  void (*update)(float* state, int64_t state_ld, int64_t rows, int64_t columns, float scale, const float* change,
                 const float* bias);
};

}  // namespace tgdp
