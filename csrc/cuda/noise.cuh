// Normal noise as a function of seed, sample, element and evaluation: reference twin tgdp_fast.ops.noise.normal.
#pragma once

#include "../common/normal.h"
#include "../common/philox.h"
#include "device.cuh"

namespace tgdp::cuda {

// The noise of one group of four elements.
TGDP_DEVICE void normal_group(int64_t sample, int64_t group, uint32_t key_low, uint32_t key_high, uint32_t evaluation,
                              float (&z)[4]) {
  const auto index = static_cast<uint64_t>(sample);
  uint64_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(index), c2 = index >> 32, c3 = evaluation;
  philox4x32<ScalarWords>(c0, c1, c2, c3, key_low, key_high);
  box_muller(static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), z[0], z[1]);
  box_muller(static_cast<uint32_t>(c2), static_cast<uint32_t>(c3), z[2], z[3]);
}

}  // namespace tgdp::cuda
