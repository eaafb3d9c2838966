#include "tile_product.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "instruction_set.h"

namespace tgdp {
namespace {

const at::BFloat16* bf16(const uint16_t* data) { return reinterpret_cast<const at::BFloat16*>(data); }

constexpr int64_t kPartOfSum = 512;

// Whether the processor multiplies bf16 in hardware and this torch reaches it: a small product is tried, for a
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

Scratch::~Scratch() { std::free(data_); }

unsigned char* Scratch::reserve(int64_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    // Large memory in huge pages where the system gives them: a product walks through many rows far apart.
    const size_t page = bytes >= (4 << 20) ? size_t{2} << 20 : 4096;
    const auto size = (static_cast<size_t>(bytes) + page - 1) / page * page;
    data_ = static_cast<unsigned char*>(std::aligned_alloc(page, size));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (page > 4096) (void)madvise(data_, size, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, size);
    size_ = static_cast<int64_t>(size);
  }
  return data_;
}

Operand Arena::take_operand(Products products, int64_t rows, int64_t ld) {
  Operand result;
  result.ld = ld;
  if (products == Products::f32) {
    result.f32 = take<float>(rows * ld);
  } else {
    result.high = take<uint16_t>(rows * ld);
    if (products == Products::bf16x3) result.low = take<uint16_t>(rows * ld);
  }
  return result;
}

Slopes Arena::take_slopes(Products products, int64_t rows, int64_t ld) {
  Slopes result;
  result.ld = ld;
  if (products == Products::bf16) {
    result.bf16 = take<uint16_t>(rows * ld);
  } else {
    result.f32 = take<float>(rows * ld);
  }
  return result;
}

Products products_for(Dtype dtype, bool split) {
  static const bool has_bf16 = probe_bf16();
  if (!has_bf16) return Products::f32;
  if (dtype == Dtype::bf16) return Products::bf16;
  return split ? Products::bf16x3 : Products::f32;
}

int64_t packed_bytes(Products products, int64_t depth, int64_t columns) {
  return padded(depth) * padded(columns) * (products == Products::bf16 ? 2 : 4);
}

PackedMatrix packed_view(Products products, int64_t depth, int64_t columns, const unsigned char* memory) {
  PackedMatrix result;
  result.ld = padded(columns);
  if (products == Products::f32) {
    result.f32 = reinterpret_cast<const float*>(memory);
    return result;
  }
  result.high = reinterpret_cast<const uint16_t*>(memory);
  if (products == Products::bf16x3) result.low = result.high + padded(depth) * result.ld;
  return result;
}

void pack_rows(Products products, const Rows& weight, int64_t out, int64_t in, int64_t row, unsigned char* transposed,
               unsigned char* plain) {
  thread_local Scratch scratch;
  const int64_t in_padded = padded(in), out_padded = padded(out);
  const int64_t rows = std::min(kPackedRows, out_padded - row), present = std::clamp<int64_t>(out - row, 0, rows);
  Arena count(nullptr);
  count.take_operand(products, kPackedRows, in_padded);
  Arena arena(scratch.reserve(count.used()));
  const Operand staged = arena.take_operand(products, kPackedRows, in_padded);
  const Rows from = weight.from_row(row);
  pointwise().load[static_cast<int>(products)](from, present, in, in_padded, staged);
  if (rows > present) {  // Rows of zeros: width 0 reads nothing.
    pointwise().load[static_cast<int>(products)](from, rows - present, 0, in_padded, staged.from_row(present));
  }
  if (products == Products::f32) {
    const auto* words = reinterpret_cast<const uint32_t*>(staged.f32);
    if (transposed != nullptr) {
      pointwise().transpose(words, in_padded, rows, in_padded, reinterpret_cast<uint32_t*>(transposed) + row, out_padded);
    }
    if (plain != nullptr) {
      std::memcpy(reinterpret_cast<float*>(plain) + row * in_padded, staged.f32,
                  static_cast<size_t>(rows * in_padded) * sizeof(float));
    }
    return;
  }
  for (const uint16_t* part : {staged.high, staged.low}) {
    if (part == nullptr) continue;
    const int64_t offset = part == staged.high ? 0 : in_padded * out_padded / 2;
    if (transposed != nullptr) {
      pointwise().transpose(reinterpret_cast<const uint32_t*>(part), in_padded / 2, rows, in_padded / 2,
                            reinterpret_cast<uint32_t*>(transposed) + offset + row, out_padded);
    }
    for (int64_t r = 0; plain != nullptr && r < rows; r += 2) {
      pointwise().interleave(part + r * in_padded, part + (r + 1) * in_padded, in_padded,
                             reinterpret_cast<uint32_t*>(plain) + offset + (row + r) / 2 * in_padded);
    }
  }
}

PackedMatrix transposed(Products products, const Operand& operand, int64_t rows, int64_t depth, unsigned char* memory) {
  PackedMatrix result = packed_view(products, depth, rows, memory);
  const auto turn = [&](const void* from, const void* to, int64_t words_per_row) {
    pointwise().transpose(static_cast<const uint32_t*>(from), operand.ld / (products == Products::f32 ? 1 : 2), rows,
                          words_per_row, const_cast<uint32_t*>(static_cast<const uint32_t*>(to)), result.ld);
  };
  if (products == Products::f32) {
    turn(operand.f32, result.f32, depth);
    return result;
  }
  turn(operand.high, result.high, (depth + 1) / 2);
  if (products == Products::bf16x3) turn(operand.low, result.low, (depth + 1) / 2);
  return result;
}

PackedMatrix paired(Products products, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory) {
  if (products == Products::f32) {
    PackedMatrix result;
    result.f32 = operand.f32;
    result.ld = operand.ld;
    return result;
  }
  // Zeros for the row that an odd number lacks.
  thread_local Scratch zeros;
  const auto* none = reinterpret_cast<const uint16_t*>(zeros.reserve(columns * static_cast<int64_t>(sizeof(uint16_t))));
  PackedMatrix result = packed_view(products, rows, columns, memory);
  const auto turn = [&](const uint16_t* from, const uint16_t* to) {
    for (int64_t r = 0; r < rows; r += 2) {
      const uint16_t* odd = r + 1 < rows ? from + (r + 1) * operand.ld : none;
      pointwise().interleave(from + r * operand.ld, odd, columns,
                             reinterpret_cast<uint32_t*>(const_cast<uint16_t*>(to)) + r / 2 * result.ld);
    }
  };
  turn(operand.high, result.high);
  if (products == Products::bf16x3) turn(operand.low, result.low);
  return result;
}

Operand turned_left(Products products, const Operand& operand, int64_t rows, int64_t columns, unsigned char* memory,
                    unsigned char* pairs) {
  Operand result;
  result.ld = padded(rows);
  if (products == Products::f32) {
    result.f32 = reinterpret_cast<float*>(memory);
    pointwise().transpose(reinterpret_cast<const uint32_t*>(operand.f32), operand.ld, rows, columns,
                          reinterpret_cast<uint32_t*>(memory), result.ld);
    return result;
  }
  const PackedMatrix matrix = paired(products, operand, rows, columns, pairs);
  result.high = reinterpret_cast<uint16_t*>(memory);
  const auto turn = [&](const uint16_t* from, uint16_t* to) {
    pointwise().transpose(reinterpret_cast<const uint32_t*>(from), matrix.ld, (rows + 1) / 2, columns,
                          reinterpret_cast<uint32_t*>(to), result.ld / 2);
  };
  turn(matrix.high, result.high);
  if (products == Products::bf16x3) {
    result.low = result.high + padded(columns) * result.ld;
    turn(matrix.low, result.low);
  }
  return result;
}

void multiply(Products products, int64_t rows, int64_t columns, int64_t depth, const Operand& a,
              const PackedMatrix& b, int64_t first_column, float* c, int64_t ldc, bool accumulate) {
  if (products == Products::f32) {
    // A part adds to C what it has summed by itself, so that rounding errors of a long sum do not add up in one.
    for (int64_t k = 0; k < depth; k += kPartOfSum) {
      at::native::cpublas::brgemm(rows, columns, std::min(kPartOfSum, depth - k), a.ld, b.ld, ldc, accumulate || k > 0,
                                  a.f32 + k, b.f32 + k * b.ld + first_column, c, false);
    }
    return;
  }
  const auto product = [&](const uint16_t* left, const uint16_t* right, bool add) {
    at::native::cpublas::brgemm(rows, columns, depth, a.ld, b.ld, ldc, add, bf16(left), bf16(right + 2 * first_column),
                                c, true);
  };
  if (products == Products::bf16) {
    product(a.high, b.high, accumulate);
    return;
  }
  // Small terms first.
  product(a.low, b.high, accumulate);
  product(a.high, b.low, true);
  product(a.high, b.high, true);
}

void release_products(Products products) {
  if (products != Products::f32) at::native::cpublas::brgemm_release(true);
}

}  // namespace tgdp
