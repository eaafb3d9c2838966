#include "guided_step.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "instruction_set.h"
#include "scratch.h"

namespace tgdp {
namespace {

// Blocks that make another thread worthwhile.
constexpr int64_t kGrain = 64;
// From this many bytes on, outputs are written around the caches.
constexpr int64_t kPastCache = int64_t{16} << 20;

const auto& kernels() { return *instruction_set().guided_step; }

}  // namespace

void guided_step(const SolverStep& call) {
  const bool past_cache = call.elements * size_of(call.x.dtype) * (2 + call.slots) >= kPastCache;
  const int64_t blocks = (call.elements + kStepBlock - 1) / kStepBlock;
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* history = nullptr;
    if (call.slots > 0) history = reinterpret_cast<float*>(scratch.reserve(call.slots * kStepBlock * 4));
    kernels().step(call, begin, end, history, past_cache);
  });
}

void normals(const NoiseCoordinates& noise, int64_t first, int64_t count, float* out) {
  const int64_t blocks = (count + kStepBlock - 1) / kStepBlock;
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kStepBlock;
      kernels().normals(noise, first + at, std::min(kStepBlock, count - at), out + at);
    }
  });
}

}  // namespace tgdp
