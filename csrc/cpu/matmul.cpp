#include "matmul.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

namespace tgdp {
namespace {

const at::BFloat16* bf16(const uint16_t* data) { return reinterpret_cast<const at::BFloat16*>(data); }

constexpr int64_t kPartOfSum = 512;

// Calls body with the bf16 parts of an operand and of what it is copied to, high and, for bf16x3, low.
template <typename From, typename To, typename Body>
void each_part(const From& from, const To& to, const Body& body) {
  body(from.high, const_cast<uint16_t*>(to.high));
  if (from.low != nullptr) body(from.low, const_cast<uint16_t*>(to.low));
}

// Whether the CPU multiplies bf16 in hardware and this torch makes use of it. A small matmul is tried, because a
// library that answers "supported" may mean an emulation or another layout.
bool probe_bf16() {
  if (capability() < Capability::avx512_bf16) return false;
  constexpr int64_t kRows = 3, kDepth = 4, kColumns = 16;
  at::BFloat16 a[kRows * kDepth], b[kDepth * kColumns];
  float c[kRows * kColumns];
  for (int64_t i = 0; i < kRows * kDepth; ++i) a[i] = static_cast<float>(i % 7 - 3);
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t n = 0; n < kColumns; ++n) b[(k / 2 * kColumns + n) * 2 + k % 2] = static_cast<float>((5 * k + n) % 9);
  }
  try {
    at::native::cpublas::brgemm(kRows, kColumns, kDepth, kDepth, kColumns, kColumns, false, a, b, c, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t n = 0; n < kColumns; ++n) {
      float sum = 0.0f;
      for (int64_t k = 0; k < kDepth; ++k) {
        sum += static_cast<float>(a[r * kDepth + k]) * static_cast<float>((5 * k + n) % 9);
      }
      if (sum != c[r * kColumns + n]) return false;
    }
  }
  return true;
}

}  // namespace

Operand left_operand(Precision precision, const void* data, int64_t ld) {
  auto* memory = const_cast<void*>(data);
  if (precision == Precision::f32) return {static_cast<float*>(memory), nullptr, nullptr, ld};
  return {nullptr, static_cast<uint16_t*>(memory), nullptr, ld};
}

PackedMatrix right_operand(Precision precision, const void* data, int64_t ld) {
  const Operand operand = left_operand(precision, data, ld);
  return {operand.f32, operand.high, nullptr, ld};
}

Precision matmul_precision(Dtype dtype, bool bf16x3) {
  static const bool has_bf16 = probe_bf16();
  if (!has_bf16) return Precision::f32;
  if (dtype == Dtype::bf16) return Precision::bf16;
  return bf16x3 ? Precision::bf16x3 : Precision::f32;
}

int64_t packed_bytes(Precision precision, int64_t depth, int64_t columns) {
  return padded(depth) * padded(columns) * (precision == Precision::bf16 ? 2 : 4);
}

PackedMatrix packed_view(Precision precision, int64_t depth, int64_t columns, const unsigned char* memory) {
  PackedMatrix result = right_operand(precision, memory, padded(columns));
  if (precision == Precision::bf16x3 && memory != nullptr) result.low = result.high + padded(depth) * result.ld;
  return result;
}

void pack_rows(Precision precision, const Rows& weight, int64_t out, int64_t in, int64_t row, unsigned char* transposed,
               unsigned char* plain) {
  thread_local Scratch scratch;
  const int64_t in_padded = padded(in), out_padded = padded(out);
  const int64_t rows = std::min(kPackedRows, out_padded - row), present = std::clamp<int64_t>(out - row, 0, rows);
  Arena count(nullptr);
  count.take_operand(precision, kPackedRows, in_padded);
  Arena arena(scratch.reserve(count.used()));
  const Operand staged = arena.take_operand(precision, kPackedRows, in_padded);
  const Rows from = weight.from_row(row);
  pointwise().load[precision](from, present, in, staged);
  if (rows > present) {  // Rows of zeros: width 0 reads nothing.
    pointwise().load[precision](from, rows - present, 0, staged.from_row(present));
  }
  if (precision == Precision::f32) {
    if (transposed != nullptr) {
      pointwise().transpose(staged.f32, in_padded, rows, in_padded, reinterpret_cast<float*>(transposed) + row,
                            out_padded);
    }
    if (plain != nullptr) {
      std::memcpy(reinterpret_cast<float*>(plain) + row * in_padded, staged.f32,
                  static_cast<size_t>(rows * in_padded) * sizeof(float));
    }
    return;
  }
  if (transposed != nullptr) {
    each_part(staged, packed_view(precision, in, out, transposed), [&](const uint16_t* part, uint16_t* to) {
      pointwise().transpose(part, in_padded / 2, rows, in_padded / 2, to + 2 * row, out_padded);
    });
  }
  if (plain != nullptr) {
    each_part(staged, packed_view(precision, out, in, plain), [&](const uint16_t* part, uint16_t* to) {
      for (int64_t r = 0; r < rows; r += 2) {
        pointwise().interleave(part + r * in_padded, part + (r + 1) * in_padded, in_padded, to + (row + r) * in_padded);
      }
    });
  }
}

PackedMatrix transposed(Precision precision, const Operand& operand, int64_t rows, int64_t depth,
                        unsigned char* memory) {
  const PackedMatrix result = packed_view(precision, depth, rows, memory);
  if (precision == Precision::f32) {
    pointwise().transpose(operand.f32, operand.ld, rows, depth, memory, result.ld);
    return result;
  }
  each_part(operand, result, [&](const uint16_t* from, uint16_t* to) {
    pointwise().transpose(from, operand.ld / 2, rows, (depth + 1) / 2, to, result.ld);
  });
  return result;
}

PackedMatrix paired(Precision precision, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory) {
  if (precision == Precision::f32) return right_operand(precision, operand.f32, operand.ld);
  // Zeros for the row that an odd number lacks.
  thread_local Scratch zeros;
  const auto* none = reinterpret_cast<const uint16_t*>(zeros.reserve(columns * static_cast<int64_t>(sizeof(uint16_t))));
  const PackedMatrix result = packed_view(precision, rows, columns, memory);
  each_part(operand, result, [&](const uint16_t* from, uint16_t* to) {
    for (int64_t r = 0; r < rows; r += 2) {
      const uint16_t* odd = r + 1 < rows ? from + (r + 1) * operand.ld : none;
      pointwise().interleave(from + r * operand.ld, odd, columns, to + r * result.ld);
    }
  });
  return result;
}

Operand transposed_left(Precision precision, const Operand& operand, int64_t rows, int64_t columns,
                        unsigned char* memory, unsigned char* pairs) {
  Operand result;
  result.ld = padded(rows);
  if (precision == Precision::f32) {
    result.f32 = reinterpret_cast<float*>(memory);
    pointwise().transpose(operand.f32, operand.ld, rows, columns, memory, result.ld);
    return result;
  }
  const PackedMatrix matrix = paired(precision, operand, rows, columns, pairs);
  result.high = reinterpret_cast<uint16_t*>(memory);
  if (precision == Precision::bf16x3) result.low = result.high + padded(columns) * result.ld;
  each_part(matrix, result, [&](const uint16_t* from, uint16_t* to) {
    pointwise().transpose(from, matrix.ld, (rows + 1) / 2, columns, to, result.ld / 2);
  });
  return result;
}

void matmul(Precision precision, int64_t rows, int64_t columns, int64_t depth, const Operand& a,
              const PackedMatrix& b, int64_t first_column, float* c, int64_t ldc, bool accumulate) {
  if (precision == Precision::f32) {
    // Each part is summed by itself and then added to C, so that the rounding errors of a long sum do not accumulate.
    for (int64_t k = 0; k < depth; k += kPartOfSum) {
      at::native::cpublas::brgemm(rows, columns, std::min(kPartOfSum, depth - k), a.ld, b.ld, ldc, accumulate || k > 0,
                                  a.f32 + k, b.f32 + k * b.ld + first_column, c, false);
    }
    return;
  }
  const auto run = [&](const uint16_t* left, const uint16_t* right, bool add) {
    at::native::cpublas::brgemm(rows, columns, depth, a.ld, b.ld, ldc, add, bf16(left), bf16(right + 2 * first_column),
                                c, true);
  };
  if (precision == Precision::bf16x3) {  // small terms first
    run(a.low, b.high, accumulate);
    run(a.high, b.low, true);
    accumulate = true;
  }
  run(a.high, b.high, accumulate);
}

void release_matmul(Precision precision) {
  if (precision != Precision::f32) at::native::cpublas::brgemm_release(true);
}

}  // namespace tgdp
