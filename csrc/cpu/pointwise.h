// The pointwise half of the MLP kernels: everything between two matmuls.
//
// All functions work on blocks of rows that lie in cache. Widths named `padded` are multiples of kPadding, and columns
// from `width` to `padded` hold what comes of zero weights.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "instruction_set.h"

namespace tgdp {

// Columns come in multiples of this many: one vector of the widest instruction set.
constexpr int64_t kPadding = 16;

// Up to this many rows a matmul is bound by reading its weights, and needs no tiles.
constexpr int64_t kTinyRows = 4;

constexpr int64_t padded(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// How the left operand of a matmul is stored. bf16x3 splits a float into two bf16 numbers, x = high + low + O(2^-17 x),
// and takes three matmuls, for about the accuracy of float32 on bf16 units.
enum class Precision : int { f32 = 0, bf16 = 1, bf16x3 = 2 };

// One function for each precision.
template <typename Function>
struct PerPrecision {
  Function* functions[3];
  Function* operator[](Precision precision) const { return functions[static_cast<int>(precision)]; }
};

// Left operand of a matmul, [rows, padded] with row stride ld: float, or one or two bf16 numbers per element.
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

// Rows of floats, ld apart; ld 0 repeats one row.
struct Floats {
  float* data = nullptr;
  int64_t ld = 0;

  float* row(int64_t r) const { return data + r * ld; }
  Floats from(int64_t column) const { return {data == nullptr ? data : data + column, ld}; }
};

// The same, to read.
struct ConstFloats {
  const float* data = nullptr;
  int64_t ld = 0;

  ConstFloats() = default;
  ConstFloats(const float* data_, int64_t ld_) : data(data_), ld(ld_) {}
  ConstFloats(Floats floats) : data(floats.data), ld(floats.ld) {}
  const float* row(int64_t r) const { return data + r * ld; }
  ConstFloats from(int64_t column) const { return {data == nullptr ? data : data + column, ld}; }
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

// `columns` are multiples of kPadding; arrays may be panels of wider ones.
struct PointwiseKernels {
  // dst = src; zero columns from width to dst.ld, a multiple of kPadding.
  PerPrecision<void(const Rows& src, int64_t rows, int64_t width, const Operand& dst)> load;
  // dst = src in float.
  PerPrecision<void(const Operand& src, int64_t rows, int64_t columns, Floats dst)> unload;
  // The same in float.
  void (*load_float)(const Rows& src, int64_t rows, int64_t width, Floats dst);
  // dst[c, r] = src[r, c], of 32-bit words; row strides in words.
  void (*transpose)(const void* src, int64_t src_ld, int64_t rows, int64_t columns, void* dst, int64_t dst_ld);
  // dst[c] = the pair (even[c], odd[c]).
  void (*interleave)(const uint16_t* even, const uint16_t* odd, int64_t columns, void* dst);
  // dst = src in the dtype of dst.
  void (*store)(ConstFloats src, int64_t rows, int64_t width, const Rows& dst);

  // z[r, c] = sum_d x[r, d] w[d, c] for a handful of inputs d.
  void (*few_inputs)(ConstFloats x, int64_t inputs, ConstFloats w, int64_t rows, int64_t columns, Floats z);
  // out[r, d] = sum_c delta[r, c] w[d, c] for a handful of outputs d; w is [outputs, padded].
  PerPrecision<void(const Operand& delta, int64_t outputs, const float* w, int64_t rows, int64_t padded, Floats out)>
      few_outputs;

  // For at most kTinyRows rows, matmuls with a weight as it lies in memory, which each reads once:
  // z[r, o] = sum_k w[o, k] a[r, k], and out[r, c] = sum_k delta[r, k] w[k, c], up to the next multiple of a vector.
  void (*dot_rows)(const Rows& w, int64_t outputs, int64_t depth, ConstFloats a, int64_t rows, Floats z);
  void (*combine_rows)(const Rows& w, int64_t depth, int64_t columns, ConstFloats delta, int64_t rows, Floats out);

  // z + bias -> a = silu, slopes = silu'. keep: the biased z is written back.
  PerPrecision<void(Floats z, ConstFloats bias, int64_t rows, int64_t columns, const Operand& a, Slopes slopes,
                    bool keep)>
      activate;
  // The last hidden layer: value[r] += sum_c head[c] silu(z + bias); delta = silu'(z + bias) head.
  PerPrecision<void(Floats z, ConstFloats bias, const float* head, int64_t rows, int64_t columns, float* value,
                    const Operand& delta, bool keep)>
      head;
  // delta = slopes * eta.
  PerPrecision<void(Slopes slopes, ConstFloats eta, int64_t rows, int64_t columns, const Operand& delta)> scale;

  // For the derivative. From z as it was kept (`width` columns of it): a = silu(z), slopes = silu'(z), and from the
  // tangent v, unless null, u = silu'(z) v and curved = silu''(z) v.
  PerPrecision<void(const Rows& z, int64_t width, ConstFloats v, int64_t rows, int64_t columns, const Operand& a,
                    const Operand& u, Slopes slopes, Floats curved)>
      recall;
  // zbar = slopes abar + curved eta, delta = slopes eta, column_sums[c] += sum_r zbar; without eta only the first term.
  PerPrecision<void(ConstFloats abar, ConstFloats eta, Slopes slopes, ConstFloats curved, int64_t rows, int64_t columns,
                    const Operand& zbar, const Operand& delta, float* column_sums)>
      reverse;
  // sums[d, c] += sum_r x[r, d] bars[r, c].
  PerPrecision<void(const Operand& bars, ConstFloats x, int64_t inputs, int64_t rows, int64_t columns, Floats sums)>
      few_inputs_gradient;
};

// Those for this CPU.
inline const PointwiseKernels& pointwise() { return *instruction_set().pointwise; }

}  // namespace tgdp
