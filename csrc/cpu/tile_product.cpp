#include "tile_product.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../common/portable.h"
#include "capability.h"

namespace tgdp {
namespace {

const at::BFloat16* bf16(const uint16_t* data) { return reinterpret_cast<const at::BFloat16*>(data); }

float read(const Rows& rows, int64_t index) {
  switch (rows.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(rows.data)[index];
    case Dtype::bf16:
      return static_cast<float>(static_cast<const at::BFloat16*>(rows.data)[index]);
    default:
      return static_cast<float>(static_cast<const at::Half*>(rows.data)[index]);
  }
}

// Whether the processor multiplies bf16 in hardware and this torch reaches it: a small product is tried, for a
// library that answers "supported" may mean an emulation or another layout.
bool probe_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (capability() < Capability::avx512 || !__builtin_cpu_supports("avx512bf16")) return false;
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
#else
  return false;
#endif
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

unsigned char* Scratch::reserve(int64_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const auto size = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    data_ = static_cast<unsigned char*>(std::aligned_alloc(64, size));
    if (data_ == nullptr) throw std::bad_alloc();
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

void pack_rows(Products products, const Rows& weight, int64_t out, int64_t in, bool transposed, int64_t begin,
               int64_t end, unsigned char* memory) {
  const int64_t depth = transposed ? in : out, columns = transposed ? out : in;
  const int64_t across = transposed ? 1 : weight.stride, along = transposed ? weight.stride : 1;
  const int64_t ld = padded(columns);
  const auto element = [&](int64_t k, int64_t n) {
    return k < depth && n < columns ? read(weight, k * across + n * along) : 0.0f;
  };
  // In squares, so that the strided side of a transposition stays in cache.
  constexpr int64_t kSquare = 32;
  if (products == Products::f32) {
    auto* to = reinterpret_cast<float*>(memory);
    const bool plain = weight.dtype == Dtype::f32;
    const auto* from = static_cast<const float*>(weight.data);
    for (int64_t k0 = begin; k0 < end; k0 += kSquare) {
      for (int64_t n0 = 0; n0 < ld; n0 += kSquare) {
        const int64_t k1 = std::min(k0 + kSquare, end), n1 = std::min(n0 + kSquare, ld);
        if (plain && k1 <= depth && n1 <= columns) {
          for (int64_t n = n0; n < n1; ++n) {
            for (int64_t k = k0; k < k1; ++k) to[k * ld + n] = from[k * across + n * along];
          }
          continue;
        }
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t n = n0; n < n1; ++n) to[k * ld + n] = element(k, n);
        }
      }
    }
    return;
  }
  auto* high = reinterpret_cast<at::BFloat16*>(memory);
  auto* low = high + padded(depth) * ld;
  const bool plain = weight.dtype == Dtype::bf16 && products == Products::bf16;
  const auto* from = static_cast<const uint16_t*>(weight.data);
  for (int64_t k0 = begin; k0 < end; k0 += kSquare) {
    for (int64_t n0 = 0; n0 < ld; n0 += kSquare) {
      const int64_t k1 = std::min(k0 + kSquare, end), n1 = std::min(n0 + kSquare, ld);
      if (plain && k1 <= depth && n1 <= columns) {
        auto* pairs = reinterpret_cast<uint32_t*>(memory);
        for (int64_t k = k0; k < k1; k += 2) {
          for (int64_t n = n0; n < n1; ++n) {
            const uint32_t even = from[k * across + n * along], odd = from[(k + 1) * across + n * along];
            pairs[k / 2 * ld + n] = even | odd << 16;
          }
        }
        continue;
      }
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t n = n0; n < n1; ++n) {
          const float value = element(k, n);
          const int64_t index = (k / 2 * ld + n) * 2 + k % 2;
          high[index] = at::BFloat16(value);
          if (products == Products::bf16x3) low[index] = at::BFloat16(value - static_cast<float>(high[index]));
        }
      }
    }
  }
}

void multiply(Products products, int64_t rows, int64_t columns, int64_t depth, const Operand& a,
              const PackedMatrix& b, int64_t first_column, float* c, int64_t ldc, bool accumulate) {
  if (products == Products::f32) {
    at::native::cpublas::brgemm(rows, columns, depth, a.ld, b.ld, ldc, accumulate, a.f32, b.f32 + first_column, c,
                                false);
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
