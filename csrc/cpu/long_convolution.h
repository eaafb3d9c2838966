// A two-sided convolution as long as the signal, per channel, and GELU: reference twin
// tgdp_fast.ops.long_convolution.long_convolution_reference.
//
// A real signal of at most M samples and a real filter need one complex transform of M points, not 2 M: modulo X^M - i,
// the product of the two polynomials has y as its real part, and what wraps around goes to the imaginary part. Forward
// and inverse are thus transforms of u[n] exp(2 pi i n / (4 M)), and the spectra need no separation in between. Source:
// Crandall & Fagin, "Discrete weighted transforms and large-integer arithmetic", Mathematics of Computation 62, 1994.
//
// M = R1 R2 in two steps: R2 transforms of R1 points, and R1 of R2 points that are multiplied by the spectrum of the
// filter and transformed back while they are in the L1 cache. Vectors hold the same point of several channels, so that
// a sample of a channel does not depend on its neighbors or on the number of threads.
#pragma once

#include <cstdint>

#include "../common/long_convolution_call.h"

namespace tgdp {

// Channels with interleaved spectra.
constexpr int64_t kChannelGroup = 16;

// Whether there is a kernel for M = points.
bool has_long_convolution(int64_t points);

// Numbers in packed spectra of this many channels.
int64_t packed_filter_size(int64_t channels, int64_t points);

// spectra: [channels, points] pairs of doubles, sum over lags l of taps[l] exp(-2 pi i l (k - 1/4) / M) / M.
// packed: packed_filter_size floats, or float16 numbers with `scales`, one for each channel in whole groups. Groups of
// kChannelGroup channels; for each k1 < R1, k2 < R2 the real and then the imaginary parts of point k1 + R1 k2.
void pack_filters(const double* spectra, int64_t channels, int64_t points, void* packed, float* scales);

// y has the dtype of u, or is bf16 for float u; a rougher GELU is enough for 16 bits.
//
// For B samples, H channels, L positions of b bytes and spectra of s bytes per number: B H L 2 b + 2 H M s bytes from
// and to memory; about B H (8 M log2 M + 25 L) FLOPs, 45 million for B = 1, H = 512, M = 1024 and 20 for GELU.
void long_convolution(const LongConvolutionCall& call);

// max(y, 0) - GELU(y) = |y| erfc(|y| / sqrt 2) / 2 as a polynomial in |y| / kPieceWidth - i for each i < kPieces, its
// powers in the first dimension. GELU is then exact to 8e-8 and rounding and, where |y| < 1, to 3e-7 of itself, and
// with the rough ones to 7e-6 and 9e-5; where the pieces end, it is within 7e-8 of y or 0.
constexpr int kPieces = 16, kGeluDegree = 5, kRoughGeluDegree = 3;
constexpr float kPieceWidth = 0.36f;
struct GeluPieces {
  const float* fine = nullptr;   // [kGeluDegree + 1, kPieces]
  const float* rough = nullptr;  // [kRoughGeluDegree + 1, kPieces]
};

// Constants of the transforms of M points.
struct TransformPlan {
  int64_t points = 0;
  int64_t rows = 0;     // R1
  int64_t columns = 0;  // R2
  // Pairs of floats: exp(-2 pi i n2 (k1 - 1/4) / M), [R2, R1] and [R1, R2].
  const float* between = nullptr;
  const float* between_by_row = nullptr;
  // exp(-2 pi i b (a - 1/4) / R1), [4, R1 / 4], and exp(-2 pi i b a / R2), [4, R2 / 4].
  const float* within_column = nullptr;
  const float* within_row = nullptr;
  GeluPieces gelu;
};

// Compiled once per instruction set.
struct LongConvolutionKernels {
  // Channels [first, first + kChannelGroup) of samples [begin, end); scratch: for scratch_bytes.
  void (*convolve)(const LongConvolutionCall& call, const TransformPlan& plan, int64_t first, int64_t begin,
                   int64_t end, unsigned char* scratch);
};

// Bytes of scratch memory for transforms of this many points.
int64_t long_convolution_scratch(const TransformPlan& plan);

}  // namespace tgdp
