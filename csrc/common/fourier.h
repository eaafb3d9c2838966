// Parts of discrete Fourier transforms in registers, in place and in natural order. Templates over the number: float,
// or a vector of floats.
#pragma once

#include "portable.h"

namespace tgdp {

template <typename F>
struct Complex {
  F re, im;
};

template <typename F>
TGDP_FUNCTION Complex<F> operator+(Complex<F> x, Complex<F> y) {
  return {x.re + y.re, x.im + y.im};
}
template <typename F>
TGDP_FUNCTION Complex<F> operator-(Complex<F> x, Complex<F> y) {
  return {x.re - y.re, x.im - y.im};
}

// z w, or z conj(w) for inverse transforms.
template <bool kInverse, typename F>
TGDP_FUNCTION Complex<F> times(Complex<F> z, float re, float im) {
  if (kInverse) return {z.re * re + z.im * im, z.im * re - z.re * im};
  return {z.re * re - z.im * im, z.im * re + z.re * im};
}

// -i z, or i z.
template <bool kInverse, typename F>
TGDP_FUNCTION Complex<F> quarter_turn(Complex<F> z) {
  if (kInverse) return {-z.im, z.re};
  return {z.im, -z.re};
}

template <bool kInverse, typename F>
TGDP_FUNCTION void transform4(Complex<F>& z0, Complex<F>& z1, Complex<F>& z2, Complex<F>& z3) {
  const Complex<F> s = z0 + z2, d = z0 - z2, t = z1 + z3, e = quarter_turn<kInverse>(z1 - z3);
  z0 = s + t;
  z1 = d + e;
  z2 = s - t;
  z3 = d - e;
}

constexpr float kDiagonal = 0.707106781f;  // sqrt(1/2)

template <bool kInverse, typename F>
TGDP_FUNCTION void transform8(Complex<F>* z) {
  transform4<kInverse>(z[0], z[2], z[4], z[6]);
  transform4<kInverse>(z[1], z[3], z[5], z[7]);
  const Complex<F> even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
  z[0] = even[0] + odd[0];
  z[4] = even[0] - odd[0];
  const Complex<F> turned = quarter_turn<kInverse>(odd[2]);
  z[2] = even[2] + turned;
  z[6] = even[2] - turned;
  // Multiplying by an eighth of a turn is a sum times a root, fused with what follows.
  const Complex<F> first = odd[1] + quarter_turn<kInverse>(odd[1]);
  z[1] = {even[1].re + kDiagonal * first.re, even[1].im + kDiagonal * first.im};
  z[5] = {even[1].re - kDiagonal * first.re, even[1].im - kDiagonal * first.im};
  const Complex<F> third = quarter_turn<kInverse>(odd[3]) - odd[3];
  z[3] = {even[3].re + kDiagonal * third.re, even[3].im + kDiagonal * third.im};
  z[7] = {even[3].re - kDiagonal * third.re, even[3].im - kDiagonal * third.im};
}

constexpr float kCosine = 0.923879533f, kSine = 0.382683432f;  // of pi / 8

// z[k] = sum_a x[a] exp(-2 pi i a (k - 1/4) / 4) of real numbers.
template <typename F>
TGDP_FUNCTION void shifted_transform4(const F (&x)[4], Complex<F> (&z)[4]) {
  const F r = kDiagonal * x[2], c1 = kCosine * x[1], s1 = kSine * x[1];
  const Complex<F> e = {x[0] + r, r}, f = {x[0] - r, -r};
  const Complex<F> g = {c1 + kSine * x[3], s1 + kCosine * x[3]};
  const Complex<F> h = {s1 - kCosine * x[3], kSine * x[3] - c1};  // -i times the difference
  z[0] = e + g;
  z[1] = f + h;
  z[2] = e - g;
  z[3] = f - h;
}

// y[a] = Re sum_k z[k] exp(2 pi i a (k - 1/4) / 4).
template <typename F>
TGDP_FUNCTION void shifted_inverse4(const Complex<F> (&z)[4], F (&y)[4]) {
  const Complex<F> s = z[0] + z[2], d = z[0] - z[2], t = z[1] + z[3], e = z[1] - z[3];
  y[0] = s.re + t.re;
  y[1] = kCosine * (d.re - e.im) + kSine * (d.im + e.re);
  y[2] = kDiagonal * ((s.re - t.re) + (s.im - t.im));
  y[3] = kSine * (d.re + e.im) + kCosine * (d.im - e.re);
}

}  // namespace tgdp
