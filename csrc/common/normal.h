// Standard normals from random words: steps 4 and 5 of the specification in tgdp_fast/ops/noise.py (reference twin
// tgdp_fast.ops.noise.normal), in float32 and without branches so that a loop vectorizes.
//
// About 75 FLOPs for a pair of normals. Polynomials are minimax fits (Remez) in the weight of the function's relative
// error; every error stated includes rounding.
#pragma once

#if !defined(__CUDACC__)
#include <cmath>
#endif

#include "portable.h"

namespace tgdp {

// For values >= 0, the value itself, but rounded: a compiler may fuse a * b - c into one operation with one rounding,
// but not max(a * b, 0) - c.
TGDP_FUNCTION float rounded(float value) { return value > 0.0f ? value : 0.0f; }

// In [2^-33, 1]; the product is exact.
TGDP_FUNCTION float uniform(uint32_t word) {
  return static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
}

// log(u) for normal u > 0, below 1 unit in the last place, also near u = 1.
TGDP_FUNCTION float log_positive(float u) {
  // u = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are 0x3f3504f3.
  const int32_t shifted = bit_cast<int32_t>(u) - 0x3f3504f3;
  const float k = static_cast<float>(shifted >> 23);
  const float f = bit_cast<float>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  // log(1 + f) = f - f^2 / 2 + f^3 p(f)
  const float p = horner(f, -0.0785982463f * f + 0.128817678f, -0.131287233f, 0.141811717f, -0.16624556f,
                         0.200022873f, -0.250008103f, 0.333333167f);
  // k ln 2 in two parts, the first of 15 bits, so that its product is exact. Small terms are added first.
  const float square = f * f;
  const float small = (square * f) * p + (k * 1.42860677e-6f - 0.5f * square);
  return k * 0.693145752f + (f + small);
}

// cos and sin of theta in [0, 2 pi], below 1 unit in the last place.
TGDP_FUNCTION void cos_and_sin(float theta, float& cosine, float& sine) {
  // theta = n pi / 2 + r, |r| <= pi / 4; adding 1.5 * 2^23 rounds to the nearest integer. The parts of pi / 2 have few
  // enough bits for exact products with n <= 4.
  const float shifted = theta * 0.636619772f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // `rest` is what the rounding of r loses.
  const float coarse = theta - n * 1.57079601f;
  const float r = coarse - n * 3.13913915e-7f;
  const float rest = (coarse - r) - n * 3.13913915e-7f - n * 2.56334407e-12f;
  const float square = r * r;
  float s = -1.95166558e-4f;
  s = s * square + 8.33217354e-3f;
  s = s * square - 0.166666549f;
  s = r + (s * (square * r) + rest);
  float c = 2.44377301e-5f;
  c = c * square - 1.38873614e-3f;
  c = c * square + 0.0416666467f;
  const float half = 0.5f * square;
  const float first = 1.0f - half;
  c = first + (((1.0f - first) - half) + (c * (square * square) - r * rest));
  // The quadrant is in the low bits of `shifted`: odd ones exchange sine and cosine, and bit 1 gives the sign.
  const uint32_t quarter = bit_cast<uint32_t>(shifted);
  const bool odd = (quarter & 1u) != 0;
  const float cosine_of_quarter = odd ? s : c;
  const float sine_of_quarter = odd ? c : s;
  cosine = bit_cast<float>(bit_cast<uint32_t>(cosine_of_quarter) ^ (((quarter + 1u) & 2u) << 30));
  sine = bit_cast<float>(bit_cast<uint32_t>(sine_of_quarter) ^ ((quarter & 2u) << 30));
}

// Two independent standard normals from two words.
TGDP_FUNCTION void box_muller(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float radius = sqrtf(-2.0f * log_positive(uniform(radius_word)));
  float cosine, sine;
  cos_and_sin(rounded(6.28318548f * uniform(angle_word)), cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

}  // namespace tgdp
