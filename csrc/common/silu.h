// SiLU and its derivatives in float32, without branches so that a loop over them vectorises.
#pragma once

#include "portable.h"

namespace tgdp {

// exp(y) to 1 unit in the last place for -87 <= y <= 88; limited to that range outside, NaN too.
TGDP_FUNCTION float exp_limited(float y) {
  y = y > -87.0f ? y : -87.0f;
  y = y < 88.0f ? y : 88.0f;
  // y = n ln 2 + r, |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to the nearest integer.
  const float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax for the relative error of exp on that interval.
  float p = 1.38145981e-3f;
  p = p * r + 8.36871693e-3f;
  p = p * r + 4.16683881e-2f;
  p = p * r + 1.66665206e-1f;
  p = p * r + 4.99999934e-1f;
  const float q = (p * r) * r + r + 1.0f;
  return q * bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

TGDP_FUNCTION float sigmoid(float z) { return 1.0f / (1.0f + exp_limited(-z)); }

// First derivative of silu at z, with s = sigmoid(z).
TGDP_FUNCTION float silu_slope(float z, float s) { return s * (1.0f + z * (1.0f - s)); }

// Second derivative.
TGDP_FUNCTION float silu_curvature(float z, float s) { return s * (1.0f - s) * (2.0f + z * (1.0f - 2.0f * s)); }

}  // namespace tgdp
