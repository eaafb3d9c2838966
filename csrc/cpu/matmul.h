// Matmuls of a block of rows with a packed weight matrix, by ATen's brgemm (oneDNN's kernels where the CPU has them,
// otherwise the BLAS of this torch). Results do not depend on the number of rows of the block.
#pragma once

#include <cstdint>

#include "scratch.h"

namespace tgdp {

// Right operand B [depth, columns] of C = A B: float with row stride ld, or bf16 with pairs of rows interleaved,
// element (k, n) at (k / 2 * ld + n) * 2 + k % 2.
struct PackedMatrix {
  const float* f32 = nullptr;
  const uint16_t* high = nullptr;
  const uint16_t* low = nullptr;
  int64_t ld = 0;
};

// Operands as they lie in memory, in float or bf16.
Operand left_operand(Precision precision, const void* data, int64_t ld);
PackedMatrix right_operand(Precision precision, const void* data, int64_t ld);

// How to run matmuls on tensors of a dtype on this CPU: in bf16 where it has the units, in float elsewhere.
Precision matmul_precision(Dtype dtype, bool bf16x3);

// Bytes of a packed [depth, columns], both padded.
int64_t packed_bytes(Precision precision, int64_t depth, int64_t columns);
PackedMatrix packed_view(Precision precision, int64_t depth, int64_t columns, const unsigned char* memory);

// Rows of a weight that are packed at a time.
constexpr int64_t kPackedRows = 32;

// Packs rows [row, row + kPackedRows) of weight [out, in], as columns of weight^T [in, out] into `transposed` and as
// rows of [out, in] into `plain`; either may be null. Padding becomes zero.
void pack_rows(Precision precision, const Rows& weight, int64_t out, int64_t in, int64_t row, unsigned char* transposed,
               unsigned char* plain);

// The transpose of an operand [rows, depth] as a right operand [depth, rows]; memory as for packed_bytes.
PackedMatrix transposed(Precision precision, const Operand& operand, int64_t rows, int64_t depth,
                        unsigned char* memory);

// An operand [rows, columns] as a right operand over its rows; memory as for packed_bytes, unused for float.
PackedMatrix paired(Precision precision, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory);

// The transpose [columns, rows] of an operand as a left operand over its rows; memory and pairs as for packed_bytes of
// [rows, columns].
Operand transposed_left(Precision precision, const Operand& operand, int64_t rows, int64_t columns,
                        unsigned char* memory, unsigned char* pairs);

// C [rows, columns] (+)= A [rows, depth] B[:, first_column:]; for bf16 depth must be even.
void matmul(Precision precision, int64_t rows, int64_t columns, int64_t depth, const Operand& a, const PackedMatrix& b,
            int64_t first_column, float* c, int64_t ldc, bool accumulate = false);

// Must end every parallel section that has called matmul: gives back the tile unit of the CPU (AMX).
void release_matmul(Precision precision);

}  // namespace tgdp
