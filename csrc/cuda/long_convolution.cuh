// A two-sided convolution as long as the signal, per channel, and GELU: reference twin
// tgdp_fast.ops.long_convolution.long_convolution_reference.
//
// As in cpu/long_convolution.h: modulo X^M - i a real signal of L <= M positions takes one complex transform of M
// points, whose factors include the weights exp(2 pi i n / (4 M)), and what wraps around goes to the imaginary part.
//
// For B samples, H channels, elements of b bytes and numbers of spectra of s bytes: 2 B H L b + 2 H M s bytes from and
// to memory; about B H (8 M log2 M + 25 L) FLOPs. Limited by instruction issue, about 3,400 per warp for 1024 points in
// float32, before memory.
//
// M = R1 R2; a signal has R2 lanes of a warp, one or two signals per warp. A lane transforms the R1 positions
// n1 R2 + lane, so that every access of a warp to memory covers pieces of 64 bytes or more, whatever the alignment; then
// R1 / R2 rows of R2 points, each forward, times the spectrum of the filter, and back; then its positions again. In
// between, numbers pass through shared memory of the warp: no barrier of the block, two of the warp.
#pragma once

#include "../common/fourier.h"
#include "../common/gelu.h"
#include "../common/long_convolution_call.h"
#include "device.cuh"
#include "roots.h"

namespace tgdp::cuda {

constexpr int kConvolutionThreads = 128, kConvolutionWarps = kConvolutionThreads / 32;
// Per SM: 16 warps with 128 registers.
constexpr int kConvolutionBlocks = 4;

using Complex = tgdp::Complex<float>;

template <bool kInverse>
TGDP_DEVICE void transform(Complex (&z)[4]) {
  transform4<kInverse>(z[0], z[1], z[2], z[3]);
}

template <bool kInverse>
TGDP_DEVICE void transform(Complex (&z)[8]) {
  transform8<kInverse>(z);
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

// z[k] = sum_n x[n] exp(-2 pi i n (k - 1/4) / R) of real numbers.
template <int kPoints>
TGDP_DEVICE void shifted_transform(const float (&x)[kPoints], Complex (&z)[kPoints]) {
  constexpr int kQuarter = kPoints / 4;
  constexpr auto kRoots = Roots<kPoints>::shifted();
  Complex part[4][kQuarter];
#pragma unroll
  for (int b = 0; b < kQuarter; ++b) {
    const float real[4] = {x[b], x[kQuarter + b], x[2 * kQuarter + b], x[3 * kQuarter + b]};
    Complex quarter[4];
    shifted_transform4(real, quarter);
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int i = a * kQuarter + b;
      part[a][b] = b > 0 ? times<false>(quarter[a], kRoots.re[i], kRoots.im[i]) : quarter[a];
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
    const Complex quarter[4] = {part[0][b], part[1][b], part[2][b], part[3][b]};
    float real[4];
    shifted_inverse4(quarter, real);
#pragma unroll
    for (int a = 0; a < 4; ++a) y[a * kQuarter + b] = real[a];
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

// In global memory: all warps read it, from the L1 cache.
template <int kRows, int kColumns>
__device__ const RootsBetween<float2, kRows, kColumns> kBetween = RootsBetween<float2, kRows, kColumns>::make();

// Half a warp accesses its pairs of words at once: rows of R2 pairs and one more put both rows and columns on separate
// banks.
template <int kRows, int kColumns>
struct ConvolutionShape {
  static constexpr int kPoints = kRows * kColumns;
  static constexpr int kSignals = 32 / kColumns;                   // of a warp
  static constexpr int kRow = kColumns + 1, kSize = kRows * kRow;  // in pairs, of a signal
  static constexpr size_t kSharedBytes = sizeof(float2) * kSize * kSignals * kConvolutionWarps;
  static_assert(kSharedBytes <= size_t{48} << 10, "no more than every device has without being asked");
};

// A lane's rows of z, forward, times the spectrum, and back.
template <typename Spectra, int kRows, int kColumns>
TGDP_DEVICE void filter_rows(Shared<float2> shared, const typename Spectra::Pair* spectrum, int lane) {
  using Shape = ConvolutionShape<kRows, kColumns>;
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
}

// R1 = kRows, R2 = kColumns; u holds Input, y Output.
template <typename Input, typename Output, typename Spectra, int kRows, int kColumns>
__global__ void __launch_bounds__(kConvolutionThreads, kConvolutionBlocks)
    long_convolution_kernel(const __grid_constant__ LongConvolutionCall call, uint32_t signals) {
  using Shape = ConvolutionShape<kRows, kColumns>;
  constexpr int kInBlock = Shape::kSignals * kConvolutionWarps;
  const int lane = static_cast<int>(threadIdx.x) % kColumns, place = static_cast<int>(threadIdx.x) / kColumns;
  const Shared<float2> shared =
      shared_array<float2>(sizeof(float2) * Shape::kSize * static_cast<size_t>(place), Shape::kSize);

  // Lanes without a signal compute zeros, because barriers of a warp need all lanes. Samples of a channel are
  // neighbors: their warps find its spectrum in the L1 cache.
  const uint32_t signal = blockIdx.x * kInBlock + static_cast<uint32_t>(place);
  const bool is_one = signal < signals;
  const auto batch = static_cast<uint32_t>(call.batch);
  const int64_t channel = is_one ? signal / batch : 0, sample = is_one ? signal % batch : 0;
  const int length = is_one ? static_cast<int>(call.length) - lane : 0;

  Complex z[kRows];
  {
    const auto* sample_u = static_cast<const typename Input::Storage*>(call.u) + sample * call.u_sample;
    const auto* u = sample_u + channel * call.u_channel + lane;
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

  // The lane's own rows: no other reads or writes them until the next barrier.
  const auto* spectrum = static_cast<const typename Spectra::Pair*>(call.filters.spectra) + channel * Shape::kPoints;
  filter_rows<Spectra, kRows, kColumns>(shared, spectrum + lane, lane);
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
