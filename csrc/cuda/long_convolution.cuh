// A two-sided convolution as long as the signal, per channel, and GELU: reference twin
// tgdp_fast.ops.long_convolution.long_convolution_reference.
//
// As in cpu/long_convolution.h: modulo X^M - i a real signal of L <= M positions takes one complex transform of M points,
// with the weights exp(2 pi i n / (4 M)) part of its factors, and what wraps around ends in the imaginary part.
//
// For B samples, H channels, elements of b bytes and numbers of spectra of s bytes: 2 B H L b + 2 H M s bytes from and to
// memory; about B H (8 M log2 M + 25 L) FLOPs. Bound by the instructions that can be issued, about 3,400 of a warp for
// 1024 points in float32, before memory.
//
// M = R1 R2; a signal has R2 lanes of a warp, one or two signals a warp. A lane transforms the R1 positions
// n1 R2 + lane, which makes every access of a warp to memory whole pieces of 64 bytes or more whatever the alignment;
// then R1 / R2 rows of R2 points, each forward, times the spectrum of the filter, and back; then its positions again.
// Between these, numbers pass through shared memory of the warp: no barrier of the block, two of the warp.
#pragma once

#include "../common/gelu.h"
#include "../common/long_convolution_call.h"
#include "device.cuh"
#include "roots.h"

namespace tgdp::cuda {

constexpr int kConvolutionThreads = 128, kConvolutionWarps = kConvolutionThreads / 32;
// Of a multiprocessor: 16 warps with 128 registers.
constexpr int kConvolutionBlocks = 4;

struct Complex {
  float re, im;
};

TGDP_DEVICE Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
TGDP_DEVICE Complex operator-(Complex x, Complex y) { return {x.re - y.re, x.im - y.im}; }

// z w, or z conj(w) for inverse transforms.
template <bool kInverse>
TGDP_DEVICE Complex times(Complex z, float re, float im) {
  if (kInverse) return {z.re * re + z.im * im, z.im * re - z.re * im};
  return {z.re * re - z.im * im, z.im * re + z.re * im};
}

// -i z, or i z.
template <bool kInverse>
TGDP_DEVICE Complex quarter_turn(Complex z) {
  if (kInverse) return {-z.im, z.re};
  return {z.im, -z.re};
}

// Transforms in registers, in place, in natural order.
template <bool kInverse>
TGDP_DEVICE void transform4(Complex& z0, Complex& z1, Complex& z2, Complex& z3) {
  const Complex s = z0 + z2, d = z0 - z2, t = z1 + z3, e = quarter_turn<kInverse>(z1 - z3);
  z0 = s + t;
  z1 = d + e;
  z2 = s - t;
  z3 = d - e;
}

template <bool kInverse>
TGDP_DEVICE void transform(Complex (&z)[4]) {
  transform4<kInverse>(z[0], z[1], z[2], z[3]);
}

template <bool kInverse>
TGDP_DEVICE void transform(Complex (&z)[8]) {
  constexpr float kRoot = 0.707106781f;
  transform4<kInverse>(z[0], z[2], z[4], z[6]);
  transform4<kInverse>(z[1], z[3], z[5], z[7]);
  const Complex even[4] = {z[0], z[2], z[4], z[6]}, odd[4] = {z[1], z[3], z[5], z[7]};
  z[0] = even[0] + odd[0];
  z[4] = even[0] - odd[0];
  const Complex turned = quarter_turn<kInverse>(odd[2]);
  z[2] = even[2] + turned;
  z[6] = even[2] - turned;
  // Eighths of a turn are sums times a root: in one operation with what follows.
  const Complex first = odd[1] + quarter_turn<kInverse>(odd[1]);
  z[1] = {even[1].re + kRoot * first.re, even[1].im + kRoot * first.im};
  z[5] = {even[1].re - kRoot * first.re, even[1].im - kRoot * first.im};
  const Complex third = quarter_turn<kInverse>(odd[3]) - odd[3];
  z[3] = {even[3].re + kRoot * third.re, even[3].im + kRoot * third.im};
  z[7] = {even[3].re - kRoot * third.re, even[3].im - kRoot * third.im};
}

// Of 16 or 32 points: index a R / 4 + b, and a + 4 b of the result.
template <bool kInverse, int kPoints>
TGDP_DEVICE void transform(Complex (&z)[kPoints]) {
  constexpr int kQuarter = kPoints / 4;
  constexpr auto kRoots = Roots<kPoints>::natural();
  Complex part[4][kQuarter];
#pragma unroll
  for (int b = 0; b < kQuarter; ++b) {
#pragma unroll
    for (int a = 0; a < 4; ++a) part[a][b] = z[a * kQuarter + b];
    transform4<kInverse>(part[0][b], part[1][b], part[2][b], part[3][b]);
#pragma unroll
    for (int a = 1; a < 4; ++a) {
      if (b > 0) part[a][b] = times<kInverse>(part[a][b], kRoots.re[a * b], kRoots.im[a * b]);
    }
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    transform<kInverse>(part[a]);
#pragma unroll
    for (int b = 0; b < kQuarter; ++b) z[a + 4 * b] = part[a][b];
  }
}

constexpr float kCosine = 0.923879533f, kSine = 0.382683432f;  // of an eighth of a half turn
constexpr float kDiagonal = 0.707106781f;

// z[k] = sum_n x[n] exp(-2 pi i n (k - 1/4) / R) of real numbers.
template <int kPoints>
TGDP_DEVICE void shifted_transform(const float (&x)[kPoints], Complex (&z)[kPoints]) {
  constexpr int kQuarter = kPoints / 4;
  constexpr auto kRoots = Roots<kPoints>::shifted();
  Complex part[4][kQuarter];
#pragma unroll
  for (int b = 0; b < kQuarter; ++b) {
    const float x0 = x[b], x1 = x[kQuarter + b], x2 = x[2 * kQuarter + b], x3 = x[3 * kQuarter + b];
    const Complex e = {x0 + kDiagonal * x2, kDiagonal * x2}, f = {x0 - kDiagonal * x2, -kDiagonal * x2};
    const Complex g = {kCosine * x1 + kSine * x3, kSine * x1 + kCosine * x3};
    const Complex h = {kSine * x1 - kCosine * x3, kSine * x3 - kCosine * x1};  // -i times the difference
    part[0][b] = e + g;
    part[1][b] = f + h;
    part[2][b] = e - g;
    part[3][b] = f - h;
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int i = a * kQuarter + b;
      if (b > 0) part[a][b] = times<false>(part[a][b], kRoots.re[i], kRoots.im[i]);
    }
  }
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    transform<false>(part[a]);
#pragma unroll
    for (int b = 0; b < kQuarter; ++b) z[a + 4 * b] = part[a][b];
  }
}

// y[n] = Re sum_k z[k] exp(2 pi i n (k - 1/4) / R).
template <int kPoints>
TGDP_DEVICE void shifted_inverse(const Complex (&z)[kPoints], float (&y)[kPoints]) {
  constexpr int kQuarter = kPoints / 4;
  constexpr auto kRoots = Roots<kPoints>::shifted();
  Complex part[4][kQuarter];
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < kQuarter; ++b) part[a][b] = z[a + 4 * b];
    transform<true>(part[a]);
#pragma unroll
    for (int b = 1; b < kQuarter; ++b) {
      const int i = a * kQuarter + b;
      part[a][b] = times<true>(part[a][b], kRoots.re[i], kRoots.im[i]);
    }
  }
#pragma unroll
  for (int b = 0; b < kQuarter; ++b) {
    const Complex s = part[0][b] + part[2][b], d = part[0][b] - part[2][b];
    const Complex t = part[1][b] + part[3][b], e = part[1][b] - part[3][b];
    y[b] = s.re + t.re;
    y[kQuarter + b] = kCosine * (d.re - e.im) + kSine * (d.im + e.re);
    y[2 * kQuarter + b] = kDiagonal * ((s.re - t.re) + (s.im - t.im));
    y[3 * kQuarter + b] = kSine * (d.re + e.im) + kCosine * (d.im - e.re);
  }
}

// Spectra as they are stored: pairs of float, or of float16 relative to a scale for each channel.
struct FloatSpectra {
  using Pair = float2;
  static TGDP_DEVICE Complex load(const Pair* from) {
    const Pair pair = *from;
    return {pair.x, pair.y};
  }
  static TGDP_DEVICE float scale(const float*, int64_t) { return 1.0f; }
};
struct HalfSpectra {
  using Pair = uint32_t;
  static TGDP_DEVICE Complex load(const Pair* from) {
    const Pair pair = *from;
    return {F16::to_float(static_cast<uint16_t>(pair)), F16::to_float(static_cast<uint16_t>(pair >> 16))};
  }
  static TGDP_DEVICE float scale(const float* scales, int64_t channel) { return scales[channel]; }
};

template <typename Element>
TGDP_DEVICE typename Element::Storage narrowed(float value, bool saturate) {
  if constexpr (Element::kDtype == Dtype::f32) {
    return value;
  } else {
    if constexpr (Element::kDtype == Dtype::f16) {
      // Keeps NaN.
      if (saturate && value > 65504.0f) value = 65504.0f;
      if (saturate && value < -65504.0f) value = -65504.0f;
    }
    return Element::from_float(value);
  }
}

// In global memory: all warps read it, from the first-level cache.
template <int kRows, int kColumns>
__device__ const RootsBetween<float2, kRows, kColumns> kBetween = RootsBetween<float2, kRows, kColumns>::make();

// Half a warp accesses its pairs of words at once: rows of R2 pairs and one more keep both rows and columns on banks of
// their own.
template <int kRows, int kColumns>
struct ConvolutionShape {
  static constexpr int kPoints = kRows * kColumns;
  static constexpr int kSignals = 32 / kColumns;                   // of a warp
  static constexpr int kRow = kColumns + 1, kSize = kRows * kRow;  // in pairs, of a signal
  static constexpr size_t kSharedBytes = sizeof(float2) * kSize * kSignals * kConvolutionWarps;
  static_assert(kSharedBytes <= size_t{48} << 10, "no more than every device has without being asked");
};

// R1 = kRows, R2 = kColumns; u holds Input, y Output.
template <typename Input, typename Output, typename Spectra, int kRows, int kColumns>
__global__ void __launch_bounds__(kConvolutionThreads, kConvolutionBlocks)
    long_convolution_kernel(const __grid_constant__ LongConvolutionCall call, uint32_t signals) {
  using Shape = ConvolutionShape<kRows, kColumns>;
  constexpr int kInBlock = Shape::kSignals * kConvolutionWarps;
  const int lane = static_cast<int>(threadIdx.x) % kColumns, place = static_cast<int>(threadIdx.x) / kColumns;
  const Shared<float2> shared =
      shared_array<float2>(sizeof(float2) * Shape::kSize * static_cast<size_t>(place), Shape::kSize);

  // Lanes without a signal go along with zeros, for a warp meets as a whole. Samples of a channel are neighbours: their
  // warps find its spectrum in the first-level cache.
  const uint32_t signal = blockIdx.x * kInBlock + static_cast<uint32_t>(place);
  const bool is_one = signal < signals;
  const auto batch = static_cast<uint32_t>(call.batch);
  const int64_t channel = is_one ? signal / batch : 0, sample = is_one ? signal % batch : 0;
  const int length = is_one ? static_cast<int>(call.length) - lane : 0;

  Complex z[kRows];
  {
    const auto* u = static_cast<const typename Input::Storage*>(call.u) + sample * call.u_sample + channel * call.u_channel + lane;
    float x[kRows];
#pragma unroll
    for (int n1 = 0; n1 < kRows; ++n1) {
      x[n1] = n1 * kColumns < length ? Input::to_float(u[n1 * kColumns]) : 0.0f;
    }
    shifted_transform(x, z);
  }
  const float2* between = kBetween<kRows, kColumns>.root + lane;
#pragma unroll
  for (int k1 = 0; k1 < kRows; ++k1) {
    const float2 root = load_here(between + k1 * kColumns);
    const Complex turned = times<false>(z[k1], root.x, root.y);
    shared[k1 * Shape::kRow + lane] = float2{turned.re, turned.im};
  }
  __syncwarp();

  // The lane's own rows: nobody else reads or writes them until the next barrier.
  const auto* spectrum =
      static_cast<const typename Spectra::Pair*>(call.filters.spectra) + channel * Shape::kPoints + lane;
#pragma unroll
  for (int i = 0; i < kRows / kColumns; ++i) {
    const Shared<float2> row = shared + (lane + i * kColumns) * Shape::kRow;
    Complex values[kColumns];
#pragma unroll
    for (int n2 = 0; n2 < kColumns; ++n2) {
      const float2 pair = row[n2];
      values[n2] = Complex{pair.x, pair.y};
    }
    transform<false>(values);
#pragma unroll
    for (int k2 = 0; k2 < kColumns; ++k2) {
      const Complex factor = Spectra::load(spectrum + i * kColumns + k2 * kRows);
      values[k2] = times<false>(values[k2], factor.re, factor.im);
    }
    transform<true>(values);
#pragma unroll
    for (int n2 = 0; n2 < kColumns; ++n2) row[n2] = float2{values[n2].re, values[n2].im};
  }
  __syncwarp();

#pragma unroll
  for (int k1 = 0; k1 < kRows; ++k1) {
    const float2 pair = shared[k1 * Shape::kRow + lane], root = load_here(between + k1 * kColumns);
    z[k1] = times<true>(Complex{pair.x, pair.y}, root.x, root.y);
  }
  float y[kRows];
  shifted_inverse(z, y);
  const float scale = Spectra::scale(call.filters.scales, channel);
  auto* out = static_cast<typename Output::Storage*>(call.y) + sample * call.y_sample + channel * call.y_channel + lane;
#pragma unroll
  for (int n1 = 0; n1 < kRows; ++n1) y[n1] *= scale;
  if (call.gelu) {
#pragma unroll
    for (int n1 = 0; n1 < kRows; ++n1) y[n1] = Output::kDtype == Dtype::f32 ? gelu(y[n1]) : rough_gelu(y[n1]);
  }
#pragma unroll
  for (int n1 = 0; n1 < kRows; ++n1) {
    if (n1 * kColumns < length) out[n1 * kColumns] = narrowed<Output>(y[n1], call.saturate);
  }
}

}  // namespace tgdp::cuda
