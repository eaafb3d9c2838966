// Roots of unity for transforms in registers, computed at compile time in double.
#pragma once

#include "../common/portable.h"

namespace tgdp::cuda {

struct DoubleComplex {
  double re, im;
};

// exp(-2 pi i numerator / denominator).
TGDP_FUNCTION constexpr DoubleComplex unit_root(int numerator, int denominator) {
  // The Taylor series of an eighth of the angle, squared three times.
  const int rest = (numerator % denominator + denominator) % denominator;
  const double angle = -6.283185307179586476925 * rest / denominator / 8.0;
  double re = 1.0, im = 0.0, term = 1.0;
  for (int i = 1; i < 20; ++i) {
    term *= angle / i;
    const double part = i % 4 < 2 ? term : -term;
    if (i % 2 == 0) {
      re += part;
    } else {
      im += part;
    }
  }
  for (int i = 0; i < 3; ++i) {
    const double square = re * re - im * im;
    im = 2.0 * re * im;
    re = square;
  }
  return {re, im};
}

// For transforms of kPoints = 4 Q points in a thread; they become immediate operands.
template <int kPoints>
struct Roots {
  float re[kPoints], im[kPoints];

  // exp(-2 pi i j / kPoints) at j.
  static TGDP_FUNCTION constexpr Roots natural() {
    Roots roots{};
    for (int j = 0; j < kPoints; ++j) roots.put(j, unit_root(j, kPoints));
    return roots;
  }
  // exp(-2 pi i b (a - 1/4) / kPoints) at a Q + b.
  static TGDP_FUNCTION constexpr Roots shifted() {
    Roots roots{};
    for (int i = 0; i < kPoints; ++i) {
      roots.put(i, unit_root(i % (kPoints / 4) * (4 * (i / (kPoints / 4)) - 1), 4 * kPoints));
    }
    return roots;
  }

 private:
  TGDP_FUNCTION constexpr void put(int i, DoubleComplex root) {
    re[i] = static_cast<float>(root.re);
    im[i] = static_cast<float>(root.im);
  }
};

// exp(-2 pi i n2 (k1 - 1/4) / M) at k1 R2 + n2, for M = R1 R2, R1 = kRows, R2 = kColumns.
template <typename Pair, int kRows, int kColumns>
struct RootsBetween {
  Pair root[kRows * kColumns];

  static TGDP_FUNCTION constexpr RootsBetween make() {
    RootsBetween roots{};
    for (int i = 0; i < kRows * kColumns; ++i) {
      const DoubleComplex root = unit_root(i % kColumns * (4 * (i / kColumns) - 1), 4 * kRows * kColumns);
      roots.root[i] = {static_cast<float>(root.re), static_cast<float>(root.im)};
    }
    return roots;
  }
};

}  // namespace tgdp::cuda
