// The pointwise half of the perceptron kernels: everything between two matrix products.
//
// All work on blocks of rows that lie in cache. Widths named `padded` are multiples of kPadding, and
// columns from `width` to `padded` hold what comes of zero weights.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "instruction_set.h"

namespace tgdp {

// Columns come in multiples of this many: one vector of the widest instruction set.
constexpr int64_t kPadding = 16;

// Up to this many rows a product is bound by reading its weights, and needs no tiles.
constexpr int64_t kTinyRows = 4;

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

  // The same from a column on, or from a row on.
  Operand from(int64_t column) const {
    return {f32 == nullptr ? f32 : f32 + column, high == nullptr ? high : high + column,
            low == nullptr ? low : low + column, ld};
  }
  Operand from_row(int64_t row) const { return from(row * ld); }
};

// Rows of a tensor in memory.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;  // elements between rows; 0 repeats one row
  Dtype dtype = Dtype::f32;

  // The same from a column on, or from a row on.
  Rows from(int64_t column) const {
    return {static_cast<unsigned char*>(data) + column * size_of(dtype), stride, dtype};
  }
  Rows from_row(int64_t row) const { return from(row * stride); }
};

// silu' of a layer, [rows, columns] with row stride ld, float or bf16. ld 0: none.
struct Slopes {
  float* f32 = nullptr;
  uint16_t* bf16 = nullptr;
  int64_t ld = 0;

  Slopes from(int64_t column) const {
    return {f32 == nullptr ? f32 : f32 + column, bf16 == nullptr ? bf16 : bf16 + column, ld};
  }
};

// `columns` are multiples of kPadding; arrays may be panels of wider ones. Arrays indexed by Products.
struct PointwiseKernels {
  // dst = src; zero columns from width to padded, a multiple of kPadding.
  void (*load[3])(const Rows& src, int64_t rows, int64_t width, int64_t padded, const Operand& dst);
  // dst = src in float, row stride ld.
  void (*unload[3])(const Operand& src, int64_t rows, int64_t columns, float* dst, int64_t ld);
  // dst[r, c] = src[r, c] in float, zero columns from width to padded, row stride ld.
  void (*load_float)(const Rows& src, int64_t rows, int64_t width, int64_t padded, float* dst, int64_t ld);
  // dst[c, r] = src[r, c].
  void (*transpose)(const uint32_t* src, int64_t src_ld, int64_t rows, int64_t columns, uint32_t* dst, int64_t dst_ld);
  // dst[c] = the pair (even[c], odd[c]).
  void (*interleave)(const uint16_t* even, const uint16_t* odd, int64_t columns, uint32_t* dst);
  // dst = src in the dtype of dst.
  void (*store)(const float* src, int64_t ld, int64_t rows, int64_t width, const Rows& dst);

  // z[r, c] = sum_d x[r, d] w[d, c] for a handful of inputs d.
  void (*few_inputs)(const float* x, int64_t x_ld, int64_t inputs, const float* w, int64_t w_ld, int64_t rows,
                     int64_t columns, float* z, int64_t ld);
  // out[r, d] = sum_c delta[r, c] w[d, c] for a handful of outputs d; w is [outputs, padded].
  void (*few_outputs[3])(const Operand& delta, int64_t outputs, const float* w, int64_t rows, int64_t padded,
                         float* out, int64_t ld);

  // For at most kTinyRows rows, products with a weight as it lies in memory, which each reads once:
  // z[r, o] = sum_k w[o, k] a[r, k], and out[r, c] = sum_k delta[r, k] w[k, c], up to the next multiple of a vector.
  void (*dot_rows)(const Rows& w, int64_t outputs, int64_t depth, const float* a, int64_t a_ld, int64_t rows, float* z,
                   int64_t ld);
  void (*combine_rows)(const Rows& w, int64_t depth, int64_t columns, const float* delta, int64_t delta_ld,
                       int64_t rows, float* out, int64_t ld);

  // z + bias -> a = silu, slopes = silu'. keep: the biased z is written back.
  void (*activate[3])(float* z, int64_t ld, const float* bias, int64_t bias_stride, int64_t rows, int64_t columns,
                      const Operand& a, Slopes slopes, bool keep);
  // The last hidden layer: value[r] += sum_c head[c] silu(z + bias); delta = silu'(z + bias) head.
  void (*head[3])(float* z, int64_t ld, const float* bias, int64_t bias_stride, const float* head, int64_t rows,
                  int64_t columns, float* value, const Operand& delta, bool keep);
  // delta = slopes * eta.
  void (*scale[3])(Slopes slopes, const float* eta, int64_t ld, int64_t rows, int64_t columns, const Operand& delta);

  // For the derivative. From z as it was kept (`width` columns of it): a = silu(z), slopes = silu'(z), and from the
  // tangent v, unless null, u = silu'(z) v and curved = silu''(z) v.
  void (*recall[3])(const Rows& z, int64_t width, const float* v, int64_t v_ld, int64_t rows, int64_t columns,
                    const Operand& a, const Operand& u, Slopes slopes, float* curved, int64_t curved_ld);
  // zbar = slopes abar + curved eta, delta = slopes eta, column_sums[c] += sum_r zbar; without eta only the first term.
  void (*reverse[3])(const float* abar, const float* eta, int64_t ld, Slopes slopes, const float* curved,
                     int64_t curved_ld, int64_t rows, int64_t columns, const Operand& zbar, const Operand& delta,
                     float* column_sums);
  // sums[d, c] += sum_r x[r, d] bars[r, c].
  void (*few_inputs_gradient[3])(const Operand& bars, const float* x, int64_t x_ld, int64_t inputs, int64_t rows,
                                 int64_t columns, float* sums, int64_t sums_ld);
};

// Those for this CPU.
inline const PointwiseKernels& pointwise() { return *instruction_set().pointwise; }

}  // namespace tgdp
