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

// Rows [begin, end) of the packed form, in pairs: begin and end even. weight [out, in] with row stride `stride`;
// transposed: B = weight^T [in, out], otherwise B = weight. Padding is zero.
void pack_rows(Products products, const Rows& weight, int64_t out, int64_t in, bool transposed, int64_t begin,
               int64_t end, unsigned char* memory);
PackedMatrix packed_view(Products products, int64_t depth, int64_t columns, const unsigned char* memory);

// C [rows, columns] (+)= A [rows, depth] B[:, first_column:]; for bf16 depth must be even.
void multiply(Products products, int64_t rows, int64_t columns, int64_t depth, const Operand& a,
              const PackedMatrix& b, int64_t first_column, float* c, int64_t ldc, bool accumulate = false);

// Must end every parallel section that has called multiply: gives back the tile unit of the processor (AMX).
void release_products(Products products);

}  // namespace tgdp
