// SiLU and its derivatives in float32, without branches. Templates over the number: float, or a vector of floats for
// which round_to_integer, both powers of two, limit and both reciprocals were overloaded before this file was included.
#pragma once

#include "portable.h"

namespace tgdp {

// y rounded to the nearest integer, |y| < 2^22: adding 1.5 * 2^23 pushes the fraction out.
TGDP_FUNCTION float round_to_integer(float y) { return (y + 12582912.0f) - 12582912.0f; }

// value * 2^n for an integer n in [-126, 127].
TGDP_FUNCTION float times_power_of_two(float value, float n) {
  return value * bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// The same for any integer n: beyond that range 0 or infinity, or the value for the nearest n in it.
TGDP_FUNCTION float times_any_power_of_two(float value, float n) {
  n = n > -126.0f ? n : -126.0f;
  return times_power_of_two(value, n < 127.0f ? n : 127.0f);
}

TGDP_FUNCTION float limit(float y, float low, float high) {
  y = y > low ? y : low;
  return y < high ? y : high;
}

TGDP_FUNCTION float reciprocal(float y) { return 1.0f / y; }

TGDP_FUNCTION float rough_reciprocal(float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return 1.0f / y;
#endif
}

// exp(y) to 1 unit in the last place for -87 <= y <= 88; other y, and NaN, are limited to that range.
template <typename F>
TGDP_FUNCTION F exp_limited(F y) {
  y = limit(y, -87.0f, 88.0f);
  // y = n ln 2 + r, |r| <= ln(2) / 2, with ln 2 in two parts.
  const F n = round_to_integer(y * 1.44269504f);
  const F r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax for the relative error of exp on that interval.
  const F p = horner(r, 1.38145981e-3f * r + 8.36871693e-3f, 4.16683881e-2f, 1.66665206e-1f, 4.99999934e-1f);
  return times_power_of_two((p * r) * r + r + 1.0f, n);
}

template <typename F>
TGDP_FUNCTION F sigmoid(F z) {
  return reciprocal(1.0f + exp_limited(-z));
}

// The same to 2^-13, in half the operations: for results that are rounded to the 2^-9 of bfloat16.
template <typename F>
TGDP_FUNCTION F rough_sigmoid(F z) {
  // 2^y = 2^n 2^f, |f| <= 1/2; minimax for the relative error of 2^f.
  const F y = z * -1.44269504f;
  const F n = round_to_integer(y), f = y - n;
  const F p = ((5.51714189e-2f * f + 2.42611170e-1f) * f + 6.93261027e-1f) * f + 9.99928057e-1f;
  return rough_reciprocal(1.0f + times_any_power_of_two(p, n));
}

// First derivative of silu at z, with s = sigmoid(z).
template <typename F>
TGDP_FUNCTION F silu_slope(F z, F s) {
  return s * (1.0f + z * (1.0f - s));
}

// Second derivative.
template <typename F>
TGDP_FUNCTION F silu_curvature(F z, F s) {
  return s * (1.0f - s) * (2.0f + z * (1.0f - 2.0f * s));
}

}  // namespace tgdp
