// bfloat16 and float16, as bits, to and from float32; rounding to nearest, ties to even. Without branches, so that a
// loop vectorizes.
#pragma once

#include "portable.h"

namespace tgdp {

TGDP_FUNCTION float from_bf16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

TGDP_FUNCTION uint16_t to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((value == value ? rounded : 0x7fc00000u) >> 16);
}

TGDP_FUNCTION float from_f16(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  // The exponents' biases differ by 112; a multiplication corrects that for subnormal numbers too.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.19229686e33f);
  const uint32_t value = magnitude < 0x0f800000u ? finite : magnitude | 0x7f800000u;
  return bit_cast<float>(value | (bits & 0x8000u) << 16);
}

TGDP_FUNCTION uint16_t to_f16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Floats from 1/2 on have the spacing of the subnormal numbers of float16, so that an addition rounds to them.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or too large
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude < 0x47800000u ? result : special;
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace tgdp
