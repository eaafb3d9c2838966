// The arguments of a long convolution, as CPU and CUDA kernels take them. Reference twin
// tgdp_fast.ops.long_convolution.long_convolution_reference.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace tgdp {

// The spectrum of a filter for every channel, at points M that are at least the length of the signals; how they are
// packed is up to the kernel.
struct PackedFilters {
  const void* spectra = nullptr;  // float, or float16 of spectra over scales
  const float* scales = nullptr;  // of each channel; null for float
  int64_t points = 0;
};

struct LongConvolutionCall {
  int64_t batch = 0, channels = 0, length = 0;
  Dtype dtype = Dtype::f32;    // of u
  Dtype y_dtype = Dtype::f32;  // that of u, or a narrower one that the kernel has for it
  // Element (b, h, t) of u at b u_sample + h u_channel + t; likewise y.
  const void* u = nullptr;
  int64_t u_sample = 0, u_channel = 0;
  void* y = nullptr;
  int64_t y_sample = 0, y_channel = 0;
  PackedFilters filters;
  bool gelu = true;
  bool saturate = false;  // CUDA: numbers beyond the range of float16 become its largest one instead of infinity
};

}  // namespace tgdp
