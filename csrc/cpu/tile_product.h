// Matrix products of a block of rows with a packed weight matrix, from ATen's brgemm (oneDNN's kernels where the
// processor has them, otherwise the BLAS of this torch). Results do not depend on the number of rows of the block.
#pragma once

#include <cstdint>
#include <vector>

#include "pointwise.h"

namespace tgdp {

// Memory that grows and is kept, aligned to a cache line and zero when new. One per thread and purpose: allocating
// per call would cost a page fault per 4 KiB.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // At least `bytes` of memory; what was there before is lost when it has to grow.
  unsigned char* reserve(int64_t bytes);

 private:
  unsigned char* data_ = nullptr;
  int64_t size_ = 0;
};

// Carves aligned arrays out of one Scratch: first count with data == nullptr, then again on the memory.
class Arena {
 public:
  explicit Arena(unsigned char* data) : data_(data) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* result = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(result);
  }
  Operand take_operand(Products products, int64_t rows, int64_t ld);
  Slopes take_slopes(Products products, int64_t rows, int64_t ld);
  int64_t used() const { return used_; }

 private:
  unsigned char* data_;
  int64_t used_ = 0;
};

// Right factor B [depth, columns] of C = A B, float with row stride ld, or bf16 with pairs of rows interleaved:
// element (k, n) at (k / 2 * ld + n) * 2 + k % 2.
struct PackedMatrix {
  const float* f32 = nullptr;
  const uint16_t* high = nullptr;
  const uint16_t* low = nullptr;
  int64_t ld = 0;
};

// How to run products on tensors of a dtype on this processor: bf16 units where they are, float elsewhere.
Products products_for(Dtype dtype, bool split);

// Bytes of a packed [depth, columns], both padded.
int64_t packed_bytes(Products products, int64_t depth, int64_t columns);
PackedMatrix packed_view(Products products, int64_t depth, int64_t columns, const unsigned char* memory);

// Rows of a weight that are packed at a time.
constexpr int64_t kPackedRows = 32;

// Packs rows [row, row + kPackedRows) of weight [out, in], as columns of weight^T [in, out] into `transposed` and as
// rows of [out, in] into `plain`; either may be null. Padding becomes zero.
void pack_rows(Products products, const Rows& weight, int64_t out, int64_t in, int64_t row, unsigned char* transposed,
               unsigned char* plain);

// The transpose of an operand [rows, depth] as a right factor [depth, rows]; memory as for packed_bytes.
PackedMatrix transposed(Products products, const Operand& operand, int64_t rows, int64_t depth, unsigned char* memory);

// An operand [rows, columns] as a right factor over its rows; memory as for packed_bytes, unused for float.
PackedMatrix paired(Products products, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory);

// The transpose [columns, rows] of an operand as a left factor over the operand's rows; memory and pairs as for
// packed_bytes of [rows, columns].
Operand turned_left(Products products, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory,
                    unsigned char* pairs);

// C [rows, columns] (+)= A [rows, depth] B[:, first_column:]; for bf16 depth must be even.
void multiply(Products products, int64_t rows, int64_t columns, int64_t depth, const Operand& a,
              const PackedMatrix& b, int64_t first_column, float* c, int64_t ldc, bool accumulate = false);

// Must end every parallel section that has called multiply: gives back the tile unit of the processor (AMX).
void release_products(Products products);

}  // namespace tgdp
