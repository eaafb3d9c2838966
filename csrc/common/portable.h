// What the arithmetic that CPU and GPU share needs of either compiler.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define TGDP_FUNCTION __host__ __device__ __forceinline__
#else
// Always inlined: a function that is compiled once per instruction set must take its helpers along.
#define TGDP_FUNCTION inline __attribute__((always_inline))
#endif

// Whether code for the instruction sets of x86-64 is compiled beside that for any CPU. TGDP_PORTABLE leaves it out, as
// on other CPUs.
#if defined(__x86_64__) && !defined(TGDP_PORTABLE)
#define TGDP_X86 1
#if defined(__GNUC__) && !defined(__clang__)
// The compiler can set the instruction set from here on.
#define TGDP_X86_COPIES 1
#endif
#endif

namespace tgdp {

// (..((p t + c1) t + c2) t ..) + cn.
template <typename F>
TGDP_FUNCTION F horner(F, F p) {
  return p;
}
template <typename F, typename... Rest>
TGDP_FUNCTION F horner(F t, F p, float coefficient, Rest... rest) {
  return horner(t, p * t + coefficient, rest...);
}

template <typename To, typename From>
TGDP_FUNCTION To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace tgdp
