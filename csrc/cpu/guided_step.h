// One guided solver step in one pass over memory, and the noise by itself: reference twins
// tgdp_fast.ops.guided_step.guided_step_reference and tgdp_fast.ops.noise.normal.
//
// The elements of all samples are numbered consecutively, row-major, and cut into blocks of kStepBlock; a block's
// intermediate values stay in the L1 cache. Every element is computed by the same vector instructions wherever
// it stands, so results depend on neither the number of threads nor the size of the batch.
#pragma once

#include <cstdint>

#include "../common/solver_step.h"

namespace tgdp {

// With noise and history, about half of an L1 cache of 32 KiB.
constexpr int64_t kStepBlock = 256;

// For N elements of b bytes, e and g bytes per element of epsilon and gradient, H slots: N (b (3 + 2 H) + e + g) bytes
// from and to memory, less what a zero coefficient spares; N (5 + (1 + H) (3 + 2 H)) FLOPs at most, and for noise about
// 20 integer operations and 40 FLOPs per element.
void guided_step(const SolverStep& call);

// Elements [first, first + count) of the noise of all samples, numbered consecutively.
void normals(const NoiseCoordinates& noise, int64_t first, int64_t count, float* out);

// Compiled once per instruction set.
struct GuidedStepKernels {
  // Blocks [begin, end); history: memory for slots * kStepBlock floats; past_cache: outputs are written around the
  // caches.
  void (*step)(const SolverStep& call, int64_t begin, int64_t end, float* history, bool past_cache);
  // count <= kStepBlock elements.
  void (*normals)(const NoiseCoordinates& noise, int64_t first, int64_t count, float* out);
};

}  // namespace tgdp
