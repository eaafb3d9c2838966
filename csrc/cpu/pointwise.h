// The pointwise half of the perceptron kernels: everything between two matrix products.
//
// Each function exists once per instruction set, compiled from pointwise.inc; pointwise() picks the best that the
// processor has. All work on blocks of rows that lie in cache. Widths named `padded` are multiples of kPadding, and
// columns from `width` to `padded` hold what comes of zero weights.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace tgdp {

// Columns come in multiples of this many: one vector of the widest instruction set.
constexpr int64_t kPadding = 16;

constexpr int64_t padded(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// How the left factor of a product is stored. bf16x3 splits a float in two bf16 numbers, x = high + low + O(2^-17 x),
// and takes three products, for the accuracy of about float32 on bf16 units.
enum class Products : int { f32 = 0, bf16 = 1, bf16x3 = 2 };

// Left factor of a matrix product, [rows, padded] with row stride ld: float, or one or two bf16 numbers per element.
struct Operand {
  float* f32 = nullptr;
  uint16_t* high = nullptr;
  uint16_t* low = nullptr;
  int64_t ld = 0;
};

// Rows of a tensor in memory.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;  // elements between rows; 0 repeats one row
  Dtype dtype = Dtype::f32;
};

struct Pointwise {
  const char* name;

  // dst = src; zero columns from width to padded.
  void (*load[3])(const Rows& src, int64_t rows, int64_t width, int64_t padded, const Operand& dst);
  // dst[r, c] = src[r, c] in float, zero columns from width to padded, row stride ld.
  void (*load_float)(const Rows& src, int64_t rows, int64_t width, int64_t padded, float* dst, int64_t ld);
  // dst = src in the dtype of dst.
  void (*store)(const float* src, int64_t ld, int64_t rows, int64_t width, const Rows& dst);

  // z[r, c] = sum_d x[r, d] w[d, c] for a handful of inputs d; w is [inputs, padded].
  void (*few_inputs)(const float* x, int64_t x_ld, int64_t inputs, const float* w, int64_t rows, int64_t padded,
                     float* z, int64_t ld);
  // out[r, d] = sum_c delta[r, c] w[d, c] for a handful of outputs d.
  void (*few_outputs[3])(const Operand& delta, int64_t outputs, const float* w, int64_t rows, int64_t padded,
                         float* out, int64_t ld);

  // z += bias; a = silu(z); slope = silu'(z) unless null. The biased z stays in z.
  void (*activate[3])(float* z, int64_t ld, const float* bias, int64_t bias_stride, int64_t rows, int64_t padded,
                      const Operand& a, float* slope);
  // The last hidden layer: z += bias; value[r] = sum_c head[c] silu(z) + head_bias; delta = silu'(z) head unless
  // delta.ld is 0.
  void (*head[3])(float* z, int64_t ld, const float* bias, int64_t bias_stride, const float* head, float head_bias,
                  int64_t rows, int64_t padded, float* value, const Operand& delta);
  // delta = slope * eta.
  void (*scale[3])(const float* slope, const float* eta, int64_t ld, int64_t rows, int64_t padded,
                   const Operand& delta);
};

// The functions for this processor.
const Pointwise& pointwise();

// The copies; null where one is not compiled.
namespace pointwise_copies {
const Pointwise* baseline();
const Pointwise* avx2();
const Pointwise* avx512();
}  // namespace pointwise_copies

}  // namespace tgdp
