// GELU in float32, without branches. Templates over the number: float, or a vector of floats.
#pragma once

#include "portable.h"

namespace tgdp {

// y (1 + erf(y / sqrt 2)) / 2, to 4e-7 and, where |y| < 1, to 8e-7 of itself; keeps NaN.
//
// y / 2 + s g(s) with s = y^2 and g(s) = erf(|y| / sqrt 2) / (2 |y|), which has no singularity: minimax for the error
// of s g(s) on |y| <= 5.4, beyond which the value is within 2e-7 of y or 0. In a variable from -1 to 1, where the terms
// do not cancel.
template <typename F>
TGDP_FUNCTION F gelu(F y) {
  const F lowest = -5.4f - F{}, highest = 5.4f - F{};
  const F above = lowest > y ? lowest : y;
  const F inside = highest < above ? highest : above;
  const F s = inside * inside;
  const F t = s * 0.068587102f - 1.0f;
  const F p = horner(t, 0.000315638288f * t - 0.000962016173f, 0.00109928823f, -0.00137329358f, 0.00340804388f,
                     -0.00651519746f, 0.00978675857f, -0.0140648279f, 0.0196087863f, -0.0257218294f, 0.0321210288f,
                     -0.0392093249f, 0.0484994017f, -0.0653279871f, 0.130928114f);
  return s * p + (above - 0.5f * inside);
}

// The same to 3e-5 and, where |y| < 1, to 2e-4 of itself: for results that are rounded to 16 bits.
template <typename F>
TGDP_FUNCTION F rough_gelu(F y) {
  const F lowest = -4.4f - F{}, highest = 4.4f - F{};
  const F above = lowest > y ? lowest : y;
  const F inside = highest < above ? highest : above;
  const F s = inside * inside;
  const F t = s * 0.103305787f - 1.0f;
  const F p = horner(t, 0.00275417021f * t - 0.00788418017f, 0.0109878359f, -0.0159769915f, 0.0268021915f,
                     -0.0400892347f, 0.0552505217f, -0.0786123127f, 0.160404414f);
  return s * p + (above - 0.5f * inside);
}

}  // namespace tgdp
